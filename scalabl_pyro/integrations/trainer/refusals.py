"""Refuses options of a Trainer that would be ignored, or that would train something else than the ELBO."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

#: Arguments of a Trainer's constructor that must stay unset, with the reason and what to do.
UNUSED_ARGUMENTS = {
    "model": "the LLM is the first argument, as bayesian_lora(llm) returns it",
    "model_init": "the model must carry one Bayesian LoRA: build a trainer per trial instead",
    "compute_loss_func": "the loss is the negative ELBO: write a task with your likelihood instead",
    "optimizers": "the optimizer has one group per learning rate: set lr, lr_A, lr_loc and lr_scale",
    "optimizer_cls_and_kwargs": "the optimizer has one group per learning rate: set lr, lr_A, lr_loc and lr_scale",
    "preprocess_logits_for_metrics": "metrics need the log probabilities of all draws: use compute_metrics",
    "peft_config": "the LLM has Bayesian LoRA already: pass these options to bayesian_lora(llm, ...)",
    "quantization_config": "the LLM is loaded already: pass it to from_pretrained of the LLM",
}

#: Switches of TrainingArguments and SFTConfig that must be off, with the reason and what to do.
OFF = {
    "fp16": "loss scaling would hide losses that are not finite: use bf16=True or float32",
    "fp16_full_eval": "it would round guide and factors: leave it out",
    "bf16_full_eval": "it would round guide and factors: leave it out, or use bf16=True",
    "deepspeed": "its optimizer has not been tested with these parameter groups: use scalabl_pyro.fit",
    "fsdp": "it has not been tested: use scalabl_pyro.fit, which trains sharded models",
    "parallelism_config": "it has not been tested: use scalabl_pyro.fit",
    "torch_compile": "draws are bound by hooks that a compiled model does not call: leave it out",
    "label_smoothing_factor": "it is not part of a likelihood: leave it out",
    "auto_find_batch_size": "after a lack of memory it starts again from trained parameters, with other noise: lower "
    "per_device_train_batch_size, and raise gradient_accumulation_steps",
    "neftune_noise_alpha": "noise on embeddings is a second source of noise that the ELBO does not know: leave it out",
    "push_to_hub": "a checkpoint is not a model that the Hub could load: use posterior().save_pretrained(path) and "
    "upload that folder",
    "batch_eval_metrics": "calibration needs the predictions of all rows at once: leave it out",
    "use_liger_kernel": "it replaces the forward pass that draws are bound to: leave it out",
    "packing": "one row is one observation with its own draw, and packing joins rows: leave it out",
    "eval_packing": "one row is one observation, and packing joins rows: leave it out",
    "padding_free": "one row is one observation with its own draw, and padding-free batches join rows: leave it out",
    "activation_offloading": "it has not been tested: use gradient_checkpointing=True",
    "router_aux_loss_coef": "the loss of a router is not part of a likelihood: leave it out",
}

#: Options that have one allowed value.
ONLY = {
    "optim": (("adamw_torch", "adamw_torch_fused"), "other optimizers have not been tested with these groups"),
    "loss_type": (("nll",), "another loss is not a likelihood"),
    "eval_do_concat_batches": ((True,), "metrics need the predictions of all rows at once"),
}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Check the arguments of the constructor.

    Args:
        given: Arguments that go on to the Trainer, by name.

    Raises:
        TypeError: ``args`` is missing.
        ValueError: An argument would be ignored.
    """
    if given.get("args") is None:
        raise TypeError("args is missing: pass args=TrainingArguments(output_dir=..., ...), or SFTConfig(...).")
    for name, reason in UNUSED_ARGUMENTS.items():
        value = given.get(name)
        if value is not None and value != (None, None):
            raise ValueError(f"{name}= cannot be used here: {reason}.")
    check_training_arguments(given["args"])


def check_training_arguments(args: Any) -> None:
    """Check TrainingArguments, or those of a trainer that is built on Trainer.

    Raises:
        ValueError: An option would be ignored, or has not been tested.
    """
    for name, reason in OFF.items():
        value = getattr(args, name, None)
        if value:
            raise ValueError(f"{name}={value!r} cannot be used here: {reason}.")
    for name, (allowed, reason) in ONLY.items():
        value = getattr(args, name, allowed[0])
        value = getattr(value, "value", value)
        if value not in allowed:
            raise ValueError(f"{name}={value!r} cannot be used here: {reason}. Use {' or '.join(map(repr, allowed))}.")
    _check_recomputation(args)
    template = getattr(args, "chat_template_path", None)
    if template is not None and not Path(template).is_file():
        raise ValueError(
            f"chat_template_path={template!r} cannot be used here: cloning a template may add tokens to an LLM that is "
            "wrapped already. Give the path of a .jinja file, or set tokenizer.chat_template."
        )
    if args.world_size > 1 or (args.n_gpu > 1 and torch.cuda.is_available()):
        raise ValueError(
            f"{max(args.world_size, args.n_gpu)} devices cannot be used here: noise and KL are right for one process "
            "with one GPU. Set CUDA_VISIBLE_DEVICES=0, or use scalabl_pyro.fit, which trains on several GPUs."
        )


def check_placement(llm: Any) -> None:
    """Check that the LLM lies on one device, because the Trainer moves it.

    Raises:
        ValueError: It lies on several devices.
    """
    devices = set((getattr(llm, "hf_device_map", None) or {}).values())
    if len(devices) > 1:
        raise ValueError(
            f"The LLM lies on several devices ({', '.join(sorted(map(str, devices)))}), which has not been tested with "
            "a Trainer: use scalabl_pyro.fit, or load the LLM without device_map."
        )


def _check_recomputation(args: Any) -> None:
    """Check the options of gradient checkpointing, which is that of the library."""
    for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        options = dict(getattr(args, name, None) or {})
        options.pop("use_reentrant", None)  # blocks never run in the reentrant form
        wrong = {key: value for key, value in options.items() if value and (key, value) != ("every_n_layers", 1)}
        if wrong:
            raise ValueError(f"{name}={wrong} cannot be used here: each adapted block runs again. Leave it out.")
