"""What keys are called here that have another name, or another section, in diffusers' scripts and TRL."""

from __future__ import annotations

import json
from collections.abc import Mapping

from leapalign.config.profiles import SCHEMA
from leapalign.config.schema import keys

CALLED: Mapping[str, str] = {
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_weight_decay": "optimizer.weight_decay",
    "attn_implementation": "memory.attention",
    "base_model": "model.path",
    "betas": "optimizer.beta1 and optimizer.beta2",
    "bf16": "model.dtype",
    "cfg": "model.true_cfg_scale",
    "cfg_scale": "model.true_cfg_scale",
    "checkpointing_steps": "checkpoint.every",
    "checkpoints_total_limit": "checkpoint.keep",
    "clip_grad_norm": "optimizer.max_grad_norm",
    "dataset": "prompts.path",
    "dataset_name": "prompts.path",
    "ema_decay": "ema.decay",
    "enable_xformers_memory_efficient_attention": "memory.attention",
    "eval_steps": "samples.every or watch.every",
    "fp16": "model.dtype",
    "gradient_checkpointing": "memory.checkpointing",
    "guidance_scale": "model.guidance or model.true_cfg_scale",
    "image_size": "model.height and model.width",
    "lora": "model.lora_rank",
    "lora_layers": "model.lora_targets",
    "lora_r": "model.lora_rank",
    "lr": "optimizer.learning_rate",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "lr_warmup_steps": "optimizer.warmup_iterations",
    "max_steps": "train.iterations",
    "max_train_steps": "train.iterations",
    "micro_batch_size": "train.microbatch",
    "mixed_precision": "model.dtype",
    "model_id": "model.path",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "num_inference_steps": "rollout.num_steps",
    "num_train_steps": "train.iterations",
    "num_validation_images": "samples.count",
    "optim": "optimizer.name",
    "output_dir": "output",
    "per_device_eval_batch_size": "rollout.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "pretrained_model": "model.path",
    "pretrained_model_name_or_path": "model.path",
    "prompt_file": "prompts.path",
    "r": "model.lora_rank",
    "rank": "model.lora_rank",
    "resolution": "model.height and model.width",
    "reward_fn": "reward.name",
    "reward_funcs": "reward.name",
    "reward_model": "reward.name",
    "run_name": "output",
    "sample_batch_size": "rollout.batch_size",
    "sample_num_steps": "rollout.num_steps",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "steps": "train.iterations or rollout.num_steps",
    "target_modules": "model.lora_targets",
    "torch_dtype": "model.dtype",
    "train_batch_size": "train.batch_size",
    "train_data_dir": "prompts.path",
    "validation_epochs": "samples.every",
    "validation_prompt": "watch.prompts",
    "validation_prompts": "watch.prompts",
    "validation_steps": "samples.every",
    "warmup_steps": "optimizer.warmup_iterations",
}
"""The keys that are meant by each name."""

_UPLOAD = "nothing is uploaded; leapalign export writes a folder that can be"
_FIGURES = "figures go to metrics.jsonl and TensorBoard events in the run folder, output"
_LENGTH = "the length of a run is train.iterations here, optimizer steps of train.batch_size images"
_RESUME = "a run is continued by leapalign train --resume RUN"

INSTEAD: Mapping[str, str] = {
    "adam_epsilon": "it is fixed here",
    "cache_dir": "set the environment variable HF_HOME",
    "gradient_accumulation_steps": "an optimizer step takes train.batch_size images, train.microbatch at a time",
    "hub_model_id": _UPLOAD,
    "hub_token": _UPLOAD,
    "log_with": _FIGURES,
    "logging_dir": _FIGURES,
    "logging_steps": "every iteration is logged",
    "num_epochs": _LENGTH,
    "num_train_epochs": _LENGTH,
    "push_to_hub": _UPLOAD,
    "report_to": _FIGURES,
    "resume_from": _RESUME,
    "resume_from_checkpoint": _RESUME,
    "use_8bit_adam": "set optimizer.name to adamw_8bit",
    "use_ema": "an average is always kept; its decay is ema.decay",
    "use_lora": "set model.lora_rank",
    "wandb": _FIGURES,
}
"""What to do in place of a key that has no other name."""


def known_as(name: str) -> str | None:
    """What to write for a key ``name``, given without its section or by another's name; None where nobody knows.

    The keys of methods and rewards count, as `leapalign config` lists them.
    """
    last = name.rpartition(".")[2].replace("-", "_")
    if last in INSTEAD:
        return INSTEAD[last]
    candidates = dict.fromkeys(key for key in known_keys() if key.rpartition(".")[2] == last)
    meant = CALLED.get(last) or " or ".join(candidates)
    return f"it is called {meant} here" if meant else None


def known_keys() -> list[str]:
    """Every key, by the schema that is shipped."""
    return [key.name for key in keys(json.loads(SCHEMA.read_text(encoding="utf-8")))]
