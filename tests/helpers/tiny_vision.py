"""Makes images and a processor for the tiny models with a vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qerl_verl.quickstart.tiny_model import CHAT_TEMPLATE, build_tokenizer

START, END, IMAGE, VIDEO = "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
PATCH, MERGE = 14, 2
"""Pixels of a patch's side, and patches of an image token's side."""

TEMPLATE = CHAT_TEMPLATE.replace(
    "message['content'] +",
    "(message['content'] if message['content'] is string else ns.text) +",
).replace(
    "{% for message in messages %}",
    "{% for message in messages %}{% set ns = namespace(text='') %}"
    "{% if message['content'] is not string %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{% set ns.text = ns.text + part['text'] %}"
    f"{{% else %}}{{% set ns.text = ns.text + '{START}{IMAGE}{END}' %}}{{% endif %}}"
    "{% endfor %}{% endif %}",
)
"""ChatML whose content may be a list of texts and images."""


def vision_tokenizer():
    """Returns the quickstart's tokenizer with the special tokens of images and videos."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [START, END, IMAGE, VIDEO]}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def vision_settings() -> dict[str, int]:
    """Returns the settings of a tiny model that must fit :func:`vision_tokenizer`."""
    tokenizer = vision_tokenizer()
    number = tokenizer.convert_tokens_to_ids
    return {
        "vocab_size": len(tokenizer),
        "image_token_id": number(IMAGE),
        "video_token_id": number(VIDEO),
        "vision_start_token_id": number(START),
        "vision_end_token_id": number(END),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }


def write_processor(folder: Path, architecture: str) -> None:
    """Writes the files of tokenizer and processor. transformers' video processors need
    torchvision."""
    from transformers import Qwen2VLImageProcessor

    if architecture == "Qwen3VLForConditionalGeneration":
        from transformers import Qwen3VLProcessor as Processor
        from transformers import Qwen3VLVideoProcessor as VideoProcessor
    else:
        from transformers import Qwen2_5_VLProcessor as Processor
        from transformers import Qwen2VLVideoProcessor as VideoProcessor
    sides = {"patch_size": PATCH, "merge_size": MERGE}
    size = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": (8 * PATCH) ** 2}
    processor = Processor(
        image_processor=Qwen2VLImageProcessor(**sides, size=size),
        tokenizer=vision_tokenizer(),
        video_processor=VideoProcessor(**sides, size=size),
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)


def draw_image(seed: int, columns: int = 4, rows: int = 4):
    """Returns a PIL image of ``columns`` x ``rows`` patches in random colours."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (rows, columns, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize((columns * PATCH, rows * PATCH), Image.NEAREST)


@dataclass
class ImageSequence:
    """A sequence with one image, as verl's trainer and transformers' models receive it.

    Attributes:
        ids: ``[tokens]``, with an image token for each square of 2 x 2 patches.
        pixel_values: ``[patches, 3 * 2 * 14 * 14]``, as from an image processor.
        grid: ``[1, 3]``: frames, rows and columns of patches.
    """

    ids: torch.Tensor
    pixel_values: torch.Tensor
    grid: torch.Tensor

    def types(self, config) -> torch.Tensor:
        """Returns ``[1, tokens]``, 1 for image tokens and 0 for others."""
        return (self.ids == config.image_token_id).int()[None]

    def positions(self, model) -> torch.Tensor:
        """Returns the positions as verl gives them, ``[4, tokens]``.

        The rows are the position in the sequence, and those in time, height and width.

        Args:
            model: transformers' model, with the vision tower and without the output layer.
        """
        three, _ = model.get_rope_index(self.ids[None], self.types(model.config), image_grid_thw=self.grid)
        return torch.cat([torch.arange(len(self.ids))[None], three[:, 0]])


def image_sequences(config, count: int = 8, vocabulary: int = 200) -> list[ImageSequence]:
    """Returns sequences of unequal length with images of unequal size.

    Pixels are random, and tokens are below ``vocabulary``.
    """
    generator, found = torch.Generator().manual_seed(5), []
    for index in range(count):
        rows, columns = 4, 4 + 2 * (index % 2)
        tokens = rows * columns // MERGE**2
        before, behind = (torch.randint(3, vocabulary, (n,), generator=generator) for n in (1 + index % 3, 6 + index))
        middle = [config.vision_start_token_id, *[config.image_token_id] * tokens, config.vision_end_token_id]
        pixels = torch.randn(rows * columns, 3 * 2 * PATCH**2, generator=generator)
        ids = torch.cat([before, torch.tensor(middle), behind])
        found.append(ImageSequence(ids, pixels, torch.tensor([[1, rows, columns]])))
    return found


def image_prompts() -> list[tuple[list[int], object]]:
    """Returns token ids with one image token each, as vLLM takes them, and the image."""
    number = vision_tokenizer().convert_tokens_to_ids
    marks = [number(START), number(IMAGE), number(END)]
    return [
        ([5, 6, *marks, *range(10, 24)], draw_image(1)),
        ([*marks, 7, 7, 8, 9], draw_image(2, columns=6)),
        ([30, *marks, *range(60, 40, -1)], draw_image(3, columns=4, rows=8)),
    ]


def processed(folder: Path, ids: list[int], image) -> dict[str, torch.Tensor]:
    """Returns the other inputs of transformers' model for a prompt of vLLM: pixels, grid, token
    types."""
    from transformers import AutoConfig, AutoProcessor

    found = AutoProcessor.from_pretrained(folder).image_processor(image, return_tensors="pt")
    types = (torch.tensor([ids]) == AutoConfig.from_pretrained(folder).image_token_id).int()
    return {
        "pixel_values": found["pixel_values"],
        "image_grid_thw": found["image_grid_thw"],
        "mm_token_type_ids": types,
    }
