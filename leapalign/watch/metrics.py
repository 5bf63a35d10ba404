"""What the watch measures, by name."""

from __future__ import annotations

from collections.abc import Mapping

from leapalign.config import Config
from leapalign.rewards import reward_names
from leapalign.watch import image_statistics as statistics

OF_IMAGES = {
    "saturation": statistics.saturation,
    "sharpness": statistics.sharpness,
    "edge_density": statistics.edge_density,
}


def metric_names(config: Config) -> list[str]:
    """What is measured: ``held_out_reward``, the weighted sum of what is trained on, and of several each one as
    ``held_out_reward_NAME``; ``held_out_NAME`` of each of ``watch.rewards``; and the statistics of the images."""
    trained = reward_names(config.rewards) if len(config.rewards) > 1 else []
    return [
        "held_out_reward",
        *(f"held_out_reward_{name}" for name in trained),
        *(f"held_out_{name}" for name in reward_names(config.watch.rewards)),
        *OF_IMAGES,
        "diversity",
        "drift",
    ]


def shown(record: Mapping[str, float], base: Mapping[str, float]) -> str:
    """A line for people: each metric, and in brackets what it was at the base."""
    names = [name for name in record if name in base and name != "iteration"]
    values = [f"{name} {record[name]:.3g} ({base[name]:.3g})" for name in names]
    return f"watch, iteration {record['iteration']:.0f}, in brackets the base's: {', '.join(values)}"
