"""Data and model of the study at SmolLM2's scale: a task that the model solves now and then, and a start that knows its form.

GSM8K's training part is divided by row number. Even rows are for the supervised start and for GPTQ's calibration, odd rows
for RL, so that RL trains on problems whose answers the model has not been shown. Both parts are cut to problems of at most
``max_steps`` solution steps (counted by GSM8K's calculator annotations ``<<...>>``); so is the test part, of which the first
``VALIDATION`` problems are the runs' validation and all are for the evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qerl_verl.data.gsm8k import DATA_SOURCE, rows
from qerl_verl.data.prompts import write_parquet
from qerl_verl.data.sources import read_hub, read_jsonl

VALIDATION = 256


def solution_steps(row: dict[str, Any]) -> int:
    """Steps of a GSM8K solution, by its calculator annotations."""
    return row["extra_info"]["solution"].count("<<")


def read_split(local_dir: Path | None, split: str) -> Iterator[dict[str, Any]]:
    """Rows of verl's parquet, from ``local_dir/SPLIT.jsonl`` or the hub."""
    examples = read_jsonl(local_dir / f"{split}.jsonl") if local_dir else read_hub(DATA_SOURCE, "main", split)
    return rows(examples, split)


def write_data(local_dir: Path | None, out: Path, max_steps: int) -> dict[str, int]:
    """Write start, train, validation and test.parquet into ``out``.

    Args:
        local_dir: folder with GSM8K's train.jsonl and test.jsonl; None reads the hub.
        out: folder.
        max_steps: the most solution steps of a problem of RL, validation and test. The supervised start sees all lengths.

    Returns:
        File name -> rows.
    """
    train = list(read_split(local_dir, "train"))
    test = [row for row in read_split(local_dir, "test") if solution_steps(row) <= max_steps]
    parts = {
        "start": train[::2],
        "train": [row for row in train[1::2] if solution_steps(row) <= max_steps],
        "validation": test[:VALIDATION],
        "test": test,
    }
    return {name: write_parquet(part, out / f"{name}.parquet") for name, part in parts.items()}


def train_start(model: str, data: Path, out: Path, epochs: float, lr: float, batch_size: int, seed: int = 0) -> dict:
    """The supervised start: cross entropy of GSM8K's solutions after the prompt, in the chat template, all weights.

    Args:
        model: folder or name of the original model.
        data: ``start.parquet``.
        out: where the model goes, in bfloat16, with its tokenizer.
        epochs: passes over the data.
        lr: peak learning rate of AdamW; warm-up over 3 % and cosine decay.
        batch_size: sequences of an update.
        seed: of the order of the data.

    Returns:
        What was done, for the record; also written to ``out/start.json``.
    """
    import pandas
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # never seen: labels leave the padding out
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
    # float32 master weights under bfloat16 autocast: in bfloat16, most of the updates of this learning rate round away
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
            per_device_train_batch_size=batch_size,
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
    language_model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {
        "model": str(model), "examples": len(examples), "epochs": epochs, "lr": lr, "batch_size": batch_size, "seed": seed,
        "loss_mean": result.training_loss, "loss_last": [e["loss"] for e in trainer.state.log_history if "loss" in e][-1:],
        "seconds": result.metrics["train_runtime"],
    }  # fmt: skip
    (out / "start.json").write_text(json.dumps(record, indent=1))
    return record
