"""The prompts of the training data against tokenizer, processor and length: one row a case."""

import io
import json
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from qerl_verl.config.checks import prompts, vision

SHORT = {"data.filter_overlong_prompts": True, "data.max_prompt_length": 16}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "settings", "expected"),
    [
        (TEMPLATE, SHORT, None),
        (None, SHORT, "its tokenizer has no chat template, which verl makes every prompt with; give one with actor_rollout_ref"),
        (None, {}, "its tokenizer has no chat template"),
        (None, {"actor_rollout_ref.model.custom_chat_template": TEMPLATE}, None),
        (None, {"actor_rollout_ref.rollout.agent.agent_loop_config_path": "mine.yaml"}, None),
        (TEMPLATE, {**SHORT, "data.train_files": "text.parquet"}, "leaves 1 of 8 prompts, fewer than data.train_batch_size=8"),
        (TEMPLATE, {**SHORT, "data.train_files": "text.parquet", "data.train_batch_size": 1}, None),
        # nothing is dropped
        (TEMPLATE, {"data.max_prompt_length": 16, "data.train_files": "text.parquet"}, None),
        ("{{ raise_exception('no system role') }}", {}, "the chat template of"),
        ("{{ raise_exception('no system role') }}", SHORT, "fails on the first prompt: no system role"),
    ],
)  # fmt: skip
def test_prompts_that_no_rollout_can_begin_with(
    configured, files, bf16_checkpoint, tmp_path, template, settings, expected
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bf16_checkpoint)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    problems = prompts.find_problems(configured(settings), tmp_path / "model")
    assert len(problems) == (expected is not None), problems
    assert expected is None or expected in problems[0]


def test_prompts_are_read_until_one_batch_is_full(configured, files, bf16_checkpoint, monkeypatch):
    """So the check costs what one batch costs, also of a large data set."""
    taken = []
    read = prompts._rows
    monkeypatch.setattr(prompts, "_rows", lambda *a: (taken.append(p) or p for p in read(*a)))
    assert prompts.find_problems(configured({**SHORT, "data.max_prompt_length": 64}), bf16_checkpoint) == []
    assert len(taken) == 8


def test_verl_still_drops_every_prompt_when_the_template_fails():
    """Why a missing chat template is refused: verl prints the error of each row and takes the row
    for too long."""
    import inspect

    from verl.utils.dataset.rl_dataset import RLHFDataset

    source = inspect.getsource(RLHFDataset.maybe_filter_out_long_prompts)
    assert source.count("return self.max_prompt_length + 1") == 2


PER_IMAGE = 9


class Processor:
    """Counts a token a character, and :data:`PER_IMAGE` for an image."""

    image_processor = SimpleNamespace(patch_size=14)
    chat_template = None

    def tokenizer(self, text, add_special_tokens):
        return {"input_ids": list(text)}

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        parts = [part for m in messages for part in ([m["content"]] if isinstance(m["content"], str) else m["content"])]
        return "".join(part if isinstance(part, str) else part.get("text", "") for part in parts)

    def __call__(self, text, images, videos, **arguments):
        return {"input_ids": [list(text[0]) + [0] * PER_IMAGE * len(images)]}


def picture():
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (56, 56)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": "a.png"}


@pytest.fixture
def images(tmp_path, monkeypatch, write_prompts):
    """Returns a folder with ``images.parquet``: sixteen prompts of five letters, every other one
    with an image. The packages that read images are stood in for."""
    from verl.utils.dataset.rl_dataset import RLHFDataset

    asked = [[{"role": "user", "content": "<image>" * (i % 2) + "what?"}] for i in range(16)]
    write_prompts(
        tmp_path / "images.parquet",
        16,
        prompt=asked,
        images=[[picture()] * (i % 2) for i in range(16)],
    )
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3VLForConditionalGeneration"]}))
    monkeypatch.chdir(tmp_path)
    tokenizer = SimpleNamespace(chat_template="{{ messages }}")
    monkeypatch.setattr(
        prompts,
        "_load",
        lambda get, folder, kind: Processor() if kind == "AutoProcessor" else tokenizer,
    )
    monkeypatch.setattr(vision, "PACKAGES", {})

    def find_images(messages, image_patch_size, config):
        found = [p for m in messages if isinstance(m["content"], list) for p in m["content"] if p["type"] == "image"]
        return found or None, None, None

    monkeypatch.setattr(RLHFDataset, "_process_multi_modal_info", staticmethod(find_images))
    return tmp_path


@pytest.mark.parametrize(
    ("longest", "batch", "expected"),
    [
        (5 + PER_IMAGE, 16, None),
        (5 + PER_IMAGE - 1, 8, None),
        (
            5 + PER_IMAGE - 1,
            16,
            "leaves 8 of 16 prompts, image tokens included, fewer than data.train_batch_size=16",
        ),
        (4, 8, "leaves 0 of 16 prompts"),
    ],
)
def test_the_tokens_of_images_count(configured, images, longest, batch, expected):
    settings = {"data.filter_overlong_prompts": True, "data.max_prompt_length": longest}
    settings |= {"data.train_files": "images.parquet", "data.train_batch_size": batch}
    problems = prompts.find_problems(configured(settings), images)
    assert len(problems) == (expected is not None) and (expected is None or expected in problems[0])


def test_an_image_that_cannot_be_read_is_named_with_the_processor(configured, images, write_prompts):
    asked = [[{"role": "user", "content": "<image>what?"}]]
    write_prompts(
        images / "images.parquet",
        1,
        prompt=asked,
        images=[[{"bytes": b"no image", "path": "a.png"}]],
    )
    settings = {"data.train_files": "images.parquet", "data.filter_overlong_prompts": True}
    (problem,) = prompts.find_problems(configured(settings), images)
    assert "the processor of" in problem and "fails on the first prompt: cannot identify image file" in problem


@pytest.mark.parametrize("missing", [{"a_package_that_nobody_has": "why"}, {}])
def test_without_what_reads_images_the_check_of_the_model_speaks(configured, images, monkeypatch, missing):
    monkeypatch.setattr(vision, "PACKAGES", missing)
    if not missing:
        tokenizer = SimpleNamespace(chat_template="{{ messages }}")
        monkeypatch.setattr(
            prompts,
            "_load",
            lambda get, folder, kind: tokenizer if kind == "AutoTokenizer" else None,
        )
    settings = {
        "data.train_files": "images.parquet",
        "data.filter_overlong_prompts": True,
        "data.max_prompt_length": 1,
    }
    assert prompts.find_problems(configured(settings), images) == []


@pytest.mark.parametrize("name", ["Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"])
def test_the_count_is_that_of_verls_filter(configured, tmp_path, monkeypatch, write_prompts, name):
    """On rows with and without images of two sizes, for every length."""
    pytest.importorskip("torchvision")
    pytest.importorskip("qwen_vl_utils")
    from transformers import AutoProcessor
    from verl.utils.dataset.rl_dataset import RLHFDataset

    from tests.helpers import tiny_vision

    tiny_vision.write_processor(tmp_path / "model", name)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"architectures": [name]}))

    def image(i):
        file = io.BytesIO()
        tiny_vision.draw_image(i, columns=4 + 2 * (i % 3 == 0)).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": "a.png"}

    asked = [[{"role": "user", "content": "<image>" * (i % 2) + "what?" * (1 + i % 3)}] for i in range(12)]
    write_prompts(tmp_path / "i.parquet", 12, prompt=asked, images=[[image(i)] * (i % 2) for i in range(12)])
    settings = {
        "data.filter_overlong_prompts": True,
        "data.train_files": str(tmp_path / "i.parquet"),
    }
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    kept = []
    for longest in (1, *range(20, 60, 6), 500):
        config = configured({**settings, "data.max_prompt_length": longest, "data.train_batch_size": 13})
        with monkeypatch.context() as changed:
            changed.setattr(
                prompts,
                "look_at",
                lambda get, key: prompts.Files(key, (str(tmp_path / "i.parquet"),), 12),
            )
            (problem,) = prompts.find_problems(config, tmp_path / "model")
        OmegaConf.update(config, "data.filter_overlong_prompts_workers", None, force_add=True)
        OmegaConf.update(config, "data.cache_dir", str(tmp_path / "cache"), force_add=True)
        kept.append(len(RLHFDataset(str(tmp_path / "i.parquet"), processor.tokenizer, config.data, processor)))
        assert f"leaves {kept[-1]} of 12 prompts" in problem
    assert kept[0] == 0 and kept[-1] == 12 and len(set(kept)) > 3
