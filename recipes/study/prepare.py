"""Makes data and model of the study at SmolLM2's scale: a task that the model sometimes solves, and
a start that knows its form.

A problem is given with the beginning of its solution, so that at most ``remaining`` lines of it are
left to write. GSM8K's training part is divided by row number. Even rows are for the supervised
start and for GPTQ's calibration, odd rows for RL, so that RL trains on problems whose answers the
model has not seen. The first ``VALIDATION`` problems of the test part are the runs' validation; all
of it is for the evaluation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qerl_verl.data.gsm8k import DATA_SOURCE, rows
from qerl_verl.data.prompts import write_parquet
from qerl_verl.data.sources import read_hub, read_jsonl

VALIDATION = 256
START_FILE = "start.json"
"""Record of the supervised start, in the folder of its model."""


def give_beginning(row: dict[str, Any], remaining: int) -> dict[str, Any]:
    """Returns a row of :func:`qerl_verl.data.gsm8k.rows` with the first lines of the solution in
    the prompt.

    Args:
        row: its ``extra_info.solution`` is the whole solution, with the line ``#### number``.
        remaining: largest number of lines before that line that are left to write.

    Returns:
        The row with the longer prompt and the rest of the solution; ``row`` itself where no line is
        given.
    """
    *lines, answer = row["extra_info"]["solution"].strip().split("\n")
    if len(lines) <= remaining:
        return row
    given, rest = lines[:-remaining], lines[-remaining:]
    turn = dict(row["prompt"][0])
    turn["content"] += "\n\nThe solution begins with these lines; go on from there:\n" + "\n".join(given)
    extra = row["extra_info"] | {"solution": "\n".join([*rest, answer])}
    return row | {"prompt": [turn], "extra_info": extra}


def read_split(local_dir: Path | None, split: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of verl's parquet, from ``local_dir/SPLIT.jsonl`` or the hub."""
    examples = read_jsonl(local_dir / f"{split}.jsonl") if local_dir else read_hub(DATA_SOURCE, "main", split)
    return rows(examples, split)


def _both_forms(row: dict[str, Any], remaining: int) -> list[dict[str, Any]]:
    short = give_beginning(row, remaining)
    return [row] if short is row else [row, short]


def write_data(local_dir: Path | None, out: Path, remaining: int) -> dict[str, int]:
    """Writes start, train, validation and test.parquet into ``out``.

    Args:
        local_dir: folder with GSM8K's train.jsonl and test.jsonl; None reads the hub.
        out: folder.
        remaining: see :func:`give_beginning`. The supervised start sees each problem whole and
            shortened.

    Returns:
        File name -> number of rows.
    """
    train, test = list(read_split(local_dir, "train")), list(read_split(local_dir, "test"))
    shortened = [give_beginning(row, remaining) for row in test]
    parts = {
        "start": [r for row in train[::2] for r in _both_forms(row, remaining)],
        "train": [give_beginning(row, remaining) for row in train[1::2]],
        "validation": shortened[:VALIDATION],
        "test": shortened,
    }
    return {name: write_parquet(part, out / f"{name}.parquet") for name, part in parts.items()}


def check_folder(out: Path) -> None:
    """Refuses a folder whose data or model may not be replaced.

    Raises:
        SystemExit: runs of the study have used them, or the model is another one.
    """
    if any((out / "runs").glob("*")):
        raise SystemExit(
            f"{out / 'runs'} has runs with the data and the model of {out}; give another folder with --out"
        )
    model = out / "model"
    if (model / "config.json").exists() and not (model / START_FILE).exists():
        raise SystemExit(f"{model} holds a model that this command did not make; give another folder with --out")


def train_start(model: str, data: Path, out: Path, epochs: float, lr: float, batch_size: int, seed: int = 0) -> dict:
    """Trains the supervised start: cross entropy of GSM8K's solutions after the prompt, all
    weights.

    Args:
        model: folder or name of the original model.
        data: ``start.parquet``.
        out: folder for the model, in bfloat16, with its tokenizer.
        epochs: passes over the data.
        lr: peak learning rate of AdamW; warm-up over 3 % and cosine decay.
        batch_size: sequences of an update, divided over the GPUs of a ``torchrun``.
        seed: seed of the order of the data.

    Returns:
        A record of the training, which is also written to ``out/start.json``.
    """
    import pandas
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(model)
    # never seen: labels leave the padding out
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    examples = []
    for row in pandas.read_parquet(data).to_dict("records"):
        prompt = tokenizer.apply_chat_template(list(row["prompt"]), add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(row["extra_info"]["solution"], add_special_tokens=False)["input_ids"]
        answer_ids.append(tokenizer.eos_token_id)
        examples.append(
            {"input_ids": prompt_ids + answer_ids, "labels": [-100] * len(prompt_ids) + answer_ids}
            | {"attention_mask": [1] * (len(prompt_ids) + len(answer_ids))}
        )
    # float32 master weights under bfloat16 autocast: in bfloat16, most of the updates of this
    # learning rate round away
    language_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    gpu = torch.cuda.is_available()
    trainer = Trainer(
        model=language_model,
        args=TrainingArguments(
            output_dir=str(out / "trainer"),
            num_train_epochs=epochs,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            per_device_train_batch_size=max(1, batch_size // int(os.environ.get("WORLD_SIZE", "1"))),
            weight_decay=0.0,
            bf16=gpu,
            use_cpu=not gpu,
            seed=seed,
            save_strategy="no",
            logging_steps=20,
            report_to="none",
            dataloader_num_workers=0,
        ),
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    )
    result = trainer.train()
    record = {
        "model": str(model), "examples": len(examples), "epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed,
        "loss_mean": result.training_loss, "loss_last": [e["loss"] for e in trainer.state.log_history if "loss" in e][-1:],
        "seconds": result.metrics["train_runtime"],
    }  # fmt: skip
    if trainer.is_world_process_zero():
        out.mkdir(parents=True, exist_ok=True)
        # first: the model is this command's
        (out / START_FILE).write_text(json.dumps(record, indent=1))
        language_model.to(torch.bfloat16).save_pretrained(out)
        tokenizer.save_pretrained(out)
    return record
