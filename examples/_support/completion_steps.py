"""Steps on completions with the clock beside them: those of ``fit``, and those of PEFT with Trainer."""

import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

import scalabl_pyro as sp

from .random_texts import word_tokenizer


def now() -> float:
    """Return the time once the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def ends_of_fit(llm: nn.Module, rows: list[dict], num_steps: int, targets: list[str], **options: Any) -> list[float]:
    """Return the times at which the steps of ``fit`` end. All rows are one batch; the model is as before afterwards.

    Args:
        llm: Base model.
        rows: Prompts and completions.
        num_steps: Number of steps.
        targets: Names of the adapted layers.
        options: Further arguments of ``fit``.
    """
    task, blora = sp.Completion(word_tokenizer()), sp.bayesian_lora(llm, r=8, target_modules=targets)
    ends: list[float] = []
    own = {"num_steps": num_steps, "batch_size": len(rows), "progress": False}
    try:
        sp.fit(blora, task, rows, callbacks=[lambda row: ends.append(now())], **own, **options)
    finally:
        blora.unload()
    return ends


def ends_of_trainer(
    llm: nn.Module, rows: list[dict], num_steps: int, targets: list[str], **arguments: Any
) -> list[float]:
    """Return the times at which the steps of Trainer end, with PEFT's LoRA and the loss on the completions only.

    Args:
        llm: Base model, which is as before afterwards.
        rows: Prompts and completions. All of them are one batch.
        num_steps: Number of steps.
        targets: Names of the adapted layers.
        arguments: Further arguments of ``TrainingArguments``.
    """
    task = sp.Completion(word_tokenizer())
    data = []
    for example in map(task.encode, rows):
        ids = example.inputs["input_ids"]
        data.append({"input_ids": ids, "labels": [-100] * (len(ids) - len(example.target)) + example.target})
    model = get_peft_model(llm, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *given: Any, **options: Any) -> None:
            ends.append(now())

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder,
            max_steps=num_steps,
            per_device_train_batch_size=len(rows),
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            **arguments,
        )
        collator = DataCollatorForSeq2Seq(task.tokenizer)
        try:
            Trainer(model, options, train_dataset=data, data_collator=collator, callbacks=[Clock()]).train()
        finally:
            model.unload()
    return ends
