"""Tests what verl needs of the quickstart's tokenizer, and what the supervised start leaves to
learn."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from verl.utils.tokenizer import hf_tokenizer
from verl.utils.tokenizer.chat_template import initialize_system_prompt
from verl.utils.tokenizer.continuous_token import QwenContinuousTokenBuilder

from qerl_verl.data.prompts import user_turn
from qerl_verl.kernels.nvfp4_dequantize import dequantize_nvfp4
from qerl_verl.kernels.nvfp4_quantize import nvfp4_global_scale, quantize_nvfp4
from qerl_verl.quickstart.arithmetic import Problem, split
from qerl_verl.quickstart.tiny_model import SupervisedStart, build_tokenizer, encode, make_tiny_model, sampled_accuracy

QUICK = SupervisedStart(steps=6, careless_steps=3, batch=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Makes a model as the quickstart's, with a start of a few steps."""
    folder = tmp_path_factory.mktemp("tiny_model")
    make_tiny_model(folder, split(seed=0)[0], start=QUICK)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Makes the quickstart's own model, which takes most of a minute."""
    folder = tmp_path_factory.mktemp("trained")
    make_tiny_model(folder, split(seed=0)[0])
    return folder


def sampling_entropy(model, problems, tokenizer) -> float:
    """Returns the mean entropy, in nats, of the tokens of an answer."""
    input_ids, labels = encode(problems, [p.answer for p in problems], tokenizer)
    with torch.no_grad():
        log_probs = model(input_ids=input_ids).logits[:, :-1].log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)[labels[:, 1:] >= 0].mean().item()


def round_linears_to_nvfp4(model) -> int:
    """Rounds every ``*_proj`` weight in place and returns the number of weights."""
    linears = [m for name, m in model.named_modules() if name.endswith("_proj")]
    for linear in linears:
        scale = nvfp4_global_scale(linear.weight.abs().max())
        packed, block_scale = quantize_nvfp4(linear.weight.detach(), scale)
        linear.weight.data = dequantize_nvfp4(packed, block_scale, scale, torch.float32)
    return len(linears)


@pytest.mark.slow
def test_it_is_sometimes_right_and_sometimes_wrong_also_in_nvfp4(trained):
    tokenizer = build_tokenizer()
    train, held_out = split(seed=0)
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    for problems in (train, held_out):
        assert 0.25 < sampled_accuracy(model, problems, tokenizer) < 0.6
    before = torch.cat([p.flatten() for p in model.parameters()])
    assert round_linears_to_nvfp4(model) == 14
    assert not torch.equal(before, torch.cat([p.flatten() for p in model.parameters()]))
    for problems in (train, held_out):
        assert 0.25 < sampled_accuracy(model, problems, tokenizer) < 0.6
        assert sampling_entropy(model, problems, tokenizer) > 0.3


@pytest.mark.slow
def test_sampled_accuracy_is_what_sampling_gives(trained):
    tokenizer, model = build_tokenizer(), AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    problems = [p for p in split(seed=0)[1] if len(p.question) == 6][:32]
    prompt = tokenizer.apply_chat_template(
        [user_turn(p.question) for p in problems], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    out = model.generate(**prompt, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=5, num_return_sequences=32)
    answers = tokenizer.batch_decode(out[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(answer == problems[i // 32].answer for i, answer in enumerate(answers)) / len(answers)
    # 1024 samples: a standard error of at most 0.016
    assert right == pytest.approx(sampled_accuracy(model, problems, tokenizer), abs=0.06)


def test_the_checkpoint_is_a_bfloat16_qwen2_that_any_nvfp4_kernel_can_take(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.config.model_type == "qwen2" and model.config.architectures == ["Qwen2ForCausalLM"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(m.in_features % 128 == 0 for n, m in model.named_modules() if n.endswith("_proj"))
    assert model.config.vocab_size == len(build_tokenizer())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_same_seed_makes_the_same_model(tmp_path):
    train, _ = split(seed=0)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_tiny_model(tmp_path / name, train, start=QUICK, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_it_leaves_pytorchs_threads_as_they_were(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        make_tiny_model(tmp_path, split(seed=0)[0], start=QUICK)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_reloading_keeps_the_tokenizer(checkpoint):
    ours = build_tokenizer()
    for theirs in (AutoTokenizer.from_pretrained(checkpoint), hf_tokenizer(str(checkpoint))):
        for text in ("12+9=", "system user assistant\n", "naïve 日本 \t\n\n x", "<|im_start|>user\n7-3=<|im_end|>\n"):
            assert theirs.encode(text) == ours.encode(text)
            assert theirs.decode(theirs.encode(text)) == text
        assert theirs.chat_template == ours.chat_template


def test_tokens_that_verl_and_a_short_prompt_need():
    tokenizer = build_tokenizer()
    for text in ("\n", "system", "user", "assistant", "<|im_start|>", "<|im_end|>"):
        assert len(tokenizer.encode(text)) == 1, text
    assert tokenizer.eos_token == "<|im_end|>"
    QwenContinuousTokenBuilder(tokenizer)
    assert initialize_system_prompt(tokenizer) == []


def test_the_chat_template_is_chatml_and_the_generation_prompt_a_prefix_of_the_answered_chat():
    tokenizer = build_tokenizer()
    chat = user_turn("2+3=")
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    answered = tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "5"}], tokenize=False)
    assert asked == "<|im_start|>user\n2+3=<|im_end|>\n<|im_start|>assistant\n"
    assert answered == asked + "5<|im_end|>\n"


def test_only_the_answer_and_the_end_of_the_turn_are_learned():
    tokenizer = build_tokenizer()
    input_ids, labels = encode([Problem(12, "+", 9), Problem(3, "-", 3)], ["21", "7"], tokenizer)
    assert [tokenizer.decode(row[row >= 0]) for row in labels] == ["21<|im_end|>", "7<|im_end|>"]
    for ids, row in zip(input_ids, labels, strict=True):
        assert torch.equal(ids[row >= 0], row[row >= 0])
        last = (row >= 0).nonzero().max()
        assert (ids[last + 1 :] == tokenizer.pad_token_id).all()
    # the wrong answer that was asked for is the one that is learned
    assert "0" not in tokenizer.decode(labels[1][labels[1] >= 0])
