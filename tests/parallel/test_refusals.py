"""What several processes cannot do is refused by name, with the remedy, and one process may do it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from parallel_runs import config

from leapalign.inputs.validation import UserError
from leapalign.parallel.refusals import refuse_unsupported

REFUSED = {
    "memory.weights streamed": ("memory.weights=streamed", "memory.checkpointing=blocks", "model.lora_rank=2"),
    "memory.optimizer host": ("memory.optimizer=host", "optimizer.name=adamw_8bit"),
    "optimizer.name adafactor": ("optimizer.name=adafactor",),
    "optimizer.name bnb_adamw_8bit": ("optimizer.name=bnb_adamw_8bit",),
    "model.quantization": ("model.quantization=nf4", "model.lora_rank=2"),
    "model.compile": ("model.compile=true",),
    "rollout.cache": ("rollout.cache={name: first_block}",),
    "regularization.base_velocity": ("regularization.base_velocity=0.1",),
    "diagnostics.true_gradient_every": ("diagnostics.true_gradient_every=2",),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_named_with_a_remedy(name: str, parts: Path, tmp_path: Path) -> None:
    asked = config(parts, tmp_path / "run", *REFUSED[name])
    refuse_unsupported(asked, 1)
    with pytest.raises(UserError, match=f"^{re.escape(name)} works with one process only; set it to .*, or train with"):
        refuse_unsupported(asked, 2)


def test_rollouts_are_divided_evenly(parts: Path, tmp_path: Path) -> None:
    """Those of ``train.batch_size`` images, where this is less."""
    asked = config(parts, tmp_path / "run", "rollout.batch_size=8")
    for count in (1, 2, 4):
        refuse_unsupported(asked, count)
    with pytest.raises(UserError, match="the 4 images of a rollout cannot be divided among 3 processes"):
        refuse_unsupported(asked, 3)
