"""``config_history.jsonl``: which settings made which iterations.

A record holds ``settings`` by dotted key, and after which ``iteration`` they came into force: the first one all of
them, after 0, each further one what a resumed run changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leapalign.config import Config, load_config
from leapalign.config.resuming import PROMPTS_DIGEST, settings_of
from leapalign.prompts.order import digest_of
from leapalign.storage.json_lines import read_records, write_records

FILE = "config_history.jsonl"


def recorded(config: Config, prompts: Sequence[str]) -> dict[str, Any]:
    """What a record says of ``config``: all but where the run lies, and which ``prompts`` its file held."""
    settings = settings_of(config)
    del settings["output"]
    return {**settings, PROMPTS_DIGEST: digest_of(prompts)}


def trained_with(run: Path, iteration: int) -> dict[str, Any]:
    """The settings of the iterations up to ``iteration``, by which the last of them was made; none for 0.

    Of a run without a history they are those of its ``config.yaml``.
    """
    settings: dict[str, Any] = {}
    for record in _before(run, iteration):
        settings |= record["settings"]
    if not settings and iteration and (run / "config.yaml").exists():
        return settings_of(load_config(run / "config.yaml"))
    return settings


def note_settings(run: Path, iteration: int, settings: dict[str, Any]) -> None:
    """Records that the iterations after ``iteration`` are made with ``settings``; what was to come after it is gone.

    Raises UserError where it cannot be written.
    """
    before = trained_with(run, iteration) if (run / FILE).exists() else {}
    changed = {key: value for key, value in settings.items() if key not in before or before[key] != value}
    records = _before(run, iteration)
    write_records(run / FILE, [*records, {"iteration": iteration, "settings": changed}] if changed else records)


def _before(run: Path, iteration: int) -> list[dict[str, Any]]:
    return [record for record in read_records(run / FILE) if record["iteration"] < iteration]
