"""Keys by the names that people bring from other trainers, and without their section."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import TINY

from leapalign.cli import main
from leapalign.config import Config, config_from, load_config, override
from leapalign.config.names import CALLED, INSTEAD, known_keys
from leapalign.inputs.validation import UserError, validated

BROUGHT = {
    "learning_rate": "it is called optimizer.learning_rate here",
    "optimizer.lr": "it is called optimizer.learning_rate here",
    "train.max_steps": "it is called train.iterations here",
    "train.learning_rate": "it is called optimizer.learning_rate here",
    "batch_size": "it is called rollout.batch_size or train.batch_size here",
    "path": "it is called model.path or prompts.path or reward.path here",
    "alpha": "it is called method.alpha here",
    "model.seed": "it is called seed here",
    "output_dir": "it is called output here",
    "report_to": "TensorBoard events in the run folder",
    "num_train_epochs": "train.iterations",
    "max_train_steps": "train.iterations",
    "train_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.microbatch",
    "gradient_checkpointing": "memory.checkpointing",
    "mixed_precision": "model.dtype",
    "pretrained_model_name_or_path": "model.path",
    "resolution": "model.height and model.width",
    "rank": "model.lora_rank",
    "lr_scheduler": "optimizer.schedule",
    "lr_warmup_steps": "optimizer.warmup_iterations",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_weight_decay": "optimizer.weight_decay",
    "checkpointing_steps": "checkpoint.every",
    "checkpoints_total_limit": "checkpoint.keep",
    "resume_from_checkpoint": "leapalign train --resume RUN",
    "validation_prompt": "watch.prompts",
    "guidance_scale": "model.guidance or model.true_cfg_scale",
    "num_inference_steps": "rollout.num_steps",
    "use_8bit_adam": "set optimizer.name to adamw_8bit",
    "max_grad_norm": "optimizer.max_grad_norm",
    "use_ema": "ema.decay",
    "logging_dir": "run folder",
    "push_to_hub": "leapalign export",
}


@pytest.mark.parametrize(("key", "meant"), BROUGHT.items(), ids=BROUGHT)
def test_the_key_that_is_meant_is_named(key: str, meant: str) -> None:
    with pytest.raises(UserError) as told:
        config_from(override({}, [f"{key}=1"]), "config")
    assert str(told.value).startswith(f"config: unknown key '{key}'; ")
    assert meant in str(told.value)


def test_so_it_is_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optimizer: {lr: 1.0e-5}\n")
    with pytest.raises(UserError, match=r"unknown key 'optimizer\.lr'; it is called optimizer\.learning_rate here"):
        load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("flags", "meant"),
    [
        (["--learning_rate", "1e-5"], "called optimizer.learning_rate here"),
        (["--learning-rate=1e-5"], "called optimizer.learning_rate here"),
        (["--use_8bit_adam"], "set optimizer.name to adamw_8bit"),
        (["--output_dir", "x"], "called output here"),
        (["--train.iterations=3"], "called train.iterations here"),
        (["max_steps", "3"], "called train.iterations here"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_and_as_an_option(flags: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--config", TINY, *flags])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert meant in last
    assert "section.key=value" in last


def test_every_key_that_is_named_is_one() -> None:
    named = {key for text in CALLED.values() for key in re.split(" or | and ", text)}
    named |= {key for text in INSTEAD.values() for key in re.findall(r"[a-z]\w*\.[a-z]\w*", text)} - {"metrics.jsonl"}
    assert named <= set(known_keys())


def test_a_typo_is_still_a_typo() -> None:
    with pytest.raises(UserError, match=r"unknown key 'train\.iteration'; did you mean 'iterations'\?"):
        config_from({"train": {"iteration": 3}}, "config")


@pytest.mark.parametrize("assignment", ["model=some/model", "method=draft_k", "reward=pickscore", "reward=[pickscore]"])
def test_a_name_in_the_place_of_keys_is_told(assignment: str) -> None:
    key = assignment.partition("=")[0]
    with pytest.raises(UserError, match=rf"^config: '{key}(\.0)?' is .+, and needs keys of its own; see"):
        validated(Config, override({}, [assignment]), "config")
