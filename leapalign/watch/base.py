"""What the untouched model made of the held-out prompts: latents in the run folder, which drift is measured from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from leapalign.config import Config
from leapalign.config.resuming import RESUMED, UNLESS_WATCHED, settings_of
from leapalign.inputs.validation import UserError, brief
from leapalign.prompts.order import digest_of
from leapalign.rewards import reward_names
from leapalign.storage.durable import beside
from leapalign.storage.modes import save_file

FILE = "watch_base.safetensors"
_MADE_WITH = "made_with"


def save_base(run: Path, latents: Tensor, config: Config, prompts: Sequence[str]) -> None:
    """Writes ``latents (N, ...)``, and what they were made with. Raises UserError."""
    with beside(run / FILE) as partial:
        # As one entry: several would be written in any order, and the file should be the same every time.
        save_file({"latents": latents.contiguous()}, partial, {_MADE_WITH: json.dumps(_made_with(config, prompts))})


def load_base(run: Path, config: Config, prompts: Sequence[str]) -> Tensor:
    """The latents of `save_base`. Raises UserError where they are missing, damaged, or were made otherwise."""
    path = run / FILE
    try:
        with safe_open(path, "pt") as file:
            made_with, latents = json.loads(file.metadata()[_MADE_WITH]), file.get_tensor("latents")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot read '{path}' ({brief(error)}), which the watch compares with; put it back from a copy, or set "
            "watch.every=0"
        ) from None
    for name, value in _made_with(config, prompts).items():
        # What is scored since, or was then, has nothing to be compared with.
        if made_with.get(name, value) != value:
            raise UserError(
                f"{name} has changed since the base was measured, which the watch compares with; set it back, or set "
                "watch.every=0"
            )
    return latents


def _made_with(config: Config, prompts: Sequence[str]) -> dict[str, Any]:
    """By config key, whatever decides what the base model draws, and how that is scored."""
    settings = settings_of(config)
    made = {key: settings[key] for key, reason in RESUMED.items() if reason == UNLESS_WATCHED}
    named = zip(reward_names(config.watch.rewards), made.pop("watch.rewards"), strict=True)
    return {
        **made,
        "watch.prompts": digest_of(prompts),
        # A threshold is no part of a score.
        "reward": [{key: value for key, value in one.items() if key != "threshold"} for one in config.rewards],
        **{f"{name} of watch.rewards": reward for name, reward in named},
    }
