"""What every profile in configs/ needs, simulated.

    python benchmarks/families.py

Writes benchmarks/results/families.jsonl, which tests/config/test_profile_sizes.py holds against the profiles. Profiles
whose settings are those of their line there are not simulated again: delete the file to have all of them simulated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from leapalign.config import Config, load_config
from leapalign.planning.model_skeleton import KNOWN_MODELS
from leapalign.planning.simulate import simulate, step_seconds

CONFIGS = Path(__file__).parents[1] / "configs"
RESULTS = Path(__file__).parent / "results" / "families.jsonl"
SECTIONS = (
    *("model", "rollout", "method", "reward", "regularization", "optimizer", "ema", "train", "memory", "kernels"),
    *("samples", "watch"),
)
"""Of a configuration, what its needs depend on."""


def profiles() -> dict[str, Path]:
    """Every profile by its name, such as ``flux1_dev/80gb``."""
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(CONFIGS.glob("*/*.yaml"))}


def card_of(profile: str) -> int:
    """The GB of memory of the card that a profile is for."""
    return int(profile.rpartition("/")[2].partition("gb")[0])


def fingerprint(config: Config) -> str:
    """The SHA-256 of all settings that its needs depend on, and of the configs of its model."""
    settings = {name: _told(getattr(config, name)) for name in SECTIONS}
    del settings["memory"]["shard"]  # that of several processes, and one is simulated
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path in sorted(KNOWN_MODELS[config.model.path].rglob("*.json")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _told(section: Any) -> Any:
    """Without what is off, so that a new key that nobody uses changes nothing."""
    if not dataclasses.is_dataclass(section):
        return section
    values = {field.name: _told(getattr(section, field.name)) for field in dataclasses.fields(section)}
    return {name: value for name, value in values.items() if value not in (None, False)}


def recorded() -> dict[str, dict[str, Any]]:
    """The line of each profile in the results."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {line["profile"]: line for line in map(json.loads, lines)}


def measured(profile: str) -> dict[str, Any]:
    """The line of one profile."""
    config = load_config(profiles()[profile])
    found = simulate(config)
    seconds = step_seconds(found, "RTX 4090" if card_of(profile) <= 24 else "H100")
    return {
        "profile": profile,
        "settings": fingerprint(config),
        "model": config.model.path,
        "height": config.model.height,
        "trainable_parameters": found.trainable_parameters,
        "device_peak_bytes": found.device_peak,
        "device_reserved_bytes": found.reserved,
        "host_peak_bytes": found.host_peak,
        "transfer_per_compute": {
            name: seconds[name]["transfer"] / seconds[name]["compute"] for name in ("rollout", "surrogate")
        },
    }


def main() -> None:
    lines = {name: line for name, line in recorded().items() if name in profiles()}
    stale = [
        name
        for name, path in profiles().items()
        if name not in lines or lines[name]["settings"] != fingerprint(load_config(path))
    ]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(measured, name) for name in stale]):
            line = done.result()
            print(f"{line['profile']}: {line['device_peak_bytes'] / 2**30:.2f} GiB", file=sys.stderr, flush=True)
            lines[line["profile"]] = line
            RESULTS.write_text("".join(f"{json.dumps(lines[name])}\n" for name in sorted(lines)))


if __name__ == "__main__":
    main()
