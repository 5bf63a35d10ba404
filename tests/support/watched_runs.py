"""Runs that the watch measures."""

from __future__ import annotations

from pathlib import Path

from small_runs import config_of

from leapalign.config import Config, save_config

HELD_OUT = ["a green circle", "three crosses", "a blue square and a circle"]
METRICS = ("held_out_reward", "saturation", "sharpness", "edge_density", "diversity", "drift")


def watched(parts: Path, output: Path, *assignments: str) -> Config:
    """A run of four iterations, measured after every other one."""
    file = parts / "held_out.txt"
    if not file.exists():  # Another process may be reading it.
        file.write_text("\n".join(HELD_OUT))
    return config_of(parts, output, "watch.every=2", f"watch.prompts={file}", *assignments)


def other_reward(parts: Path) -> str:
    return f"watch.rewards=[{{name: clipscore, path: {parts / 'reward'}}}]"


def train_command(parts: Path, output: Path, *assignments: str) -> list[str]:
    """The command line that trains a run of `watched`."""
    path = output.with_suffix(".yaml")
    save_config(watched(parts, output, *assignments), path)
    return ["train", "--config", str(path)]
