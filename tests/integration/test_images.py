"""Two steps of main_ppo on prompts with images: a random model, its processor and its data made on
the spot.

The decoder is in NVFP4 with the adapter and the noise, the vision tower in 16 bits, in verl's actor
and in vLLM alike."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qerl_verl.cli.main import main as qerl
from qerl_verl.data.prompts import prompt_row, write_parquet
from tests.helpers.tiny_families import make_family
from tests.helpers.tiny_vision import draw_image, vision_settings, write_processor
from tests.integration.tiny_job import Job

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("torchvision", "qwen_vl_utils")),
        reason="images need torchvision and qwen-vl-utils",
    ),
]
NAMES = {"qwen3": "Qwen3VLForConditionalGeneration", "qwen2_5": "Qwen2_5_VLForConditionalGeneration"}
STEPS = 2


def image_rows(count: int) -> list[dict]:
    """Prompts of one image and a question, in the columns of verl's example scripts."""
    rows = []
    for index in range(count):
        file = io.BytesIO()
        draw_image(index, columns=4 + 2 * (index % 2)).save(file, format="PNG")
        row = prompt_row("shapes", f"<image>How many are {index}?", str(index), index=index)
        rows.append(row | {"images": [{"bytes": file.getvalue()}]})
    return rows


def overrides_of(folder: Path, name: str) -> list[str]:
    """Returns a run's model and data under ``folder``, and its settings: those of verl's example
    for geometry3k with LoRA."""
    make_family(name, folder / "model", **vision_settings())
    write_processor(folder / "model", name)
    write_parquet(image_rows(16), folder / "train.parquet")
    write_parquet(image_rows(4), folder / "validation.parquet")
    rollout, actor = "actor_rollout_ref.rollout", "actor_rollout_ref.actor"
    return [
        "+qerl=nvfp4",
        f"qerl.aqn.num_stages={STEPS}",
        "qerl.aqn.sigma_end=0.02",
        "qerl.aqn.sigma_start=0.02",
        f"qerl.cache_dir={folder / 'cache'}",
        "algorithm.adv_estimator=grpo",
        f"data.train_files={folder / 'train.parquet'}",
        f"data.val_files={folder / 'validation.parquet'}",
        "data.image_key=images",
        "data.train_batch_size=4",
        "data.max_prompt_length=64",
        "data.max_response_length=8",
        "data.filter_overlong_prompts=True",
        "data.truncation=error",
        f"actor_rollout_ref.model.path={folder / 'model'}",
        "actor_rollout_ref.model.lora_rank=8",
        "actor_rollout_ref.model.target_modules=all-linear",
        "actor_rollout_ref.model.exclude_modules='.*visual.*'",
        f"{rollout}.n=4",
        f"{rollout}.max_model_len=128",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=8",
        f"{actor}.ppo_mini_batch_size=4",
        f"{actor}.ppo_micro_batch_size_per_gpu=8",
        f"{actor}.optim.lr=1e-3",
        f"reward.custom_reward_function.path={HERE / 'digit_reward.py'}",
        "reward.custom_reward_function.name=letter_score",
        "trainer.logger=[file]",
        f"trainer.total_training_steps={STEPS}",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        f"trainer.save_freq={STEPS}",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
    ]


@pytest.fixture(scope="module", params=NAMES)
def run(request, tmp_path_factory):
    """Returns the metrics by step, the log and the folder of a run."""
    folder = tmp_path_factory.mktemp(request.param)
    job = Job(folder / "run", overrides_of(folder, NAMES[request.param])).start()
    try:
        assert job.wait(1000) == 0, job.tail()
    finally:
        job.end()
    return job.metrics(), job.log.read_text(errors="replace"), folder


def test_it_trains_on_images(run):
    metrics, log, _ = run
    assert set(metrics) >= set(range(1, STEPS + 1))
    assert all(metrics[step]["actor/grad_norm"] > 0 for step in range(1, STEPS + 1))
    assert metrics[1]["prompt_length/min"] >= 20
    assert "8 layers (qkv_proj 2, o_proj 2, gate_up_proj 2, down_proj 2)" in log


def test_rollout_and_actor_agree_but_for_the_noise(run):
    """Step 1 samples without noise: rounding to the compute dtype is all that parts the two."""
    metrics, _, _ = run
    difference = {step: metrics[step]["training/rollout_probs_diff_mean"] for step in (1, 2)}
    assert difference[1] < 2e-3 and difference[2] > 2 * difference[1]
    assert [metrics[step]["qerl/aqn_sigma_effective"] for step in (1, 2)] == pytest.approx([0, 0.02], rel=0.2)


def test_the_adapter_is_the_decoders(run):
    _, _, folder = run
    adapter = folder / "checkpoints" / f"global_step_{STEPS}" / "actor" / "lora_adapter"
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2 and all("language_model.layers." in name for name in tensors)
    assert any(t.abs().sum() > 0 for name, t in tensors.items() if "lora_B" in name)
    assert "visual" in json.loads((adapter / "adapter_config.json").read_text())["exclude_modules"]


RECIPE = [
    "actor_rollout_ref.model.use_remove_padding=True",
    "actor_rollout_ref.model.enable_gradient_checkpointing=True",
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.actor.kl_loss_coef=0.01",
    "actor_rollout_ref.actor.kl_loss_type=low_var_kl",
    "actor_rollout_ref.actor.freeze_vision_tower=True",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=8",
    "actor_rollout_ref.ref.fsdp_config.param_offload=True",
    "actor_rollout_ref.rollout.enable_chunked_prefill=False",
    "algorithm.use_kl_in_reward=False",
]
"""Settings of verl's example scripts for geometry3k, beside :func:`overrides_of`."""


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_with_images_composes(tmp_path, capsys, name, platform):
    overrides = [
        *overrides_of(tmp_path, NAMES[name]),
        *RECIPE,
        "actor_rollout_ref.rollout.tensor_model_parallel_size=1",
    ]
    assert qerl(["explain", "--platform", platform, "ppo_trainer", *overrides]) == 0, capsys.readouterr().out
    assert capsys.readouterr().out.rstrip().endswith("problems: none")
