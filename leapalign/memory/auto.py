"""The fastest settings that fit a GPU, found by simulating candidates.

Where things live costs the most time, so that is settled first: the fastest place in which the smallest settings fit.
Then each stage gets the fastest of its settings whose peak fits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from leapalign.config import Config, override
from leapalign.memory.residency import Stage
from leapalign.memory.simulate import Simulation, gib, simulate
from leapalign.validation import UserError, validated

Settings = tuple[str, ...]
"""Assignments ``section.key=value``."""

PLACES: tuple[Settings, ...] = (
    ("memory.optimizer=device", "memory.weights=resident"),
    ("memory.optimizer=host", "memory.weights=resident"),
    ("memory.optimizer=host", "memory.weights=streamed"),
)
"""Fastest first: gradients leave with every micro-batch, streamed weights come with every forward, too."""
REWARD: tuple[Settings, ...] = (
    ("memory.checkpoint_decoder=false", "train.reward_chunk=null"),
    ("memory.checkpoint_decoder=false", "train.reward_chunk=1"),
    ("memory.checkpoint_decoder=true", "train.reward_chunk=1"),
)
POLICIES: tuple[Settings, ...] = tuple(
    (f"memory.checkpointing={name}", f"memory.checkpoint_every={every}")
    for name, every in (("none", 1), ("blocks", 4), ("blocks", 2), ("attention", 1), ("blocks", 1))
)
SMALLEST: Settings = ("rollout.batch_size=1", "train.microbatch=1", *REWARD[-1], *POLICIES[-1])
FILLED = 0.92
"""Share of the memory that tensors may take. The rest is for the allocator's gaps, libraries and the screen."""


def fastest(
    config: Config, gpu_memory: int, note: Callable[[str], None] = lambda _: None
) -> tuple[Settings, Config, Simulation]:
    """The settings that make ``config`` fit ``gpu_memory`` bytes at the least cost in time, and what they need.

    note: is told of each simulation. Raises UserError where nothing fits.
    """
    search = _Search(config, int(gpu_memory * FILLED), note)
    place = search.place()
    policies = POLICIES[-1:] if "memory.weights=streamed" in place else POLICIES
    batches = _sizes("rollout.batch_size", config.train.batch_size)
    batch = search.settled((*place, *SMALLEST), {"rollout": batches})["rollout"]
    one = search.settled((*place, *batch, "train.microbatch=1"), {"surrogate": policies, "reward": REWARD})
    fixed = (*place, *batch, *one["surrogate"], *one["reward"])
    microbatches = _sizes("train.microbatch", search.applied(fixed).rollout.batch_size)
    settings = (*fixed, *search.settled(fixed, {"surrogate": microbatches})["surrogate"])
    return settings, search.applied(settings), search.simulated(settings)


def _sizes(key: str, size: int) -> list[Settings]:
    """``key`` set to ``size`` and its halves, down to 1."""
    halves = [size]
    while halves[-1] % 2 == 0:
        halves.append(halves[-1] // 2)
    return [(f"{key}={half}",) for half in dict.fromkeys([*halves, 1])]


class _Search:
    """Simulations of one configuration under various settings."""

    def __init__(self, config: Config, gpu_memory: int, note: Callable[[str], None]) -> None:
        self._config, self._gpu_memory, self._note = config, gpu_memory, note
        self._found: dict[Settings, Simulation] = {}

    def applied(self, settings: Settings) -> Config:
        return validated(Config, override(dataclasses.asdict(self._config), settings), "memory --auto")

    def simulated(self, settings: Settings) -> Simulation:
        if settings not in self._found:
            self._found[settings] = found = simulate(self.applied(settings))
            self._note(f"{gib(found.device_peak)} GiB with {' '.join(settings)}")
        return self._found[settings]

    def place(self) -> Settings:
        """The first of `PLACES` that the smallest settings fit in."""
        for place in PLACES:
            found = self.simulated((*place, *SMALLEST))
            if found.device_peak <= self._gpu_memory:
                return place
        raise UserError(
            f"nothing fits {gib(self._gpu_memory)} GiB: with everything on the host and one image at a time it takes "
            f"{gib(found.device_peak)} GiB; reduce the size of the images"
        )

    def settled(self, fixed: Settings, ladders: Mapping[Stage, Sequence[Settings]]) -> dict[Stage, Settings]:
        """For each stage the first of its settings that fits; the last ones do. One simulation tries one of each.

        Peaks fall along a ladder, so that halving finds the place. The images of a rollout matter in every stage.
        """
        low, high = dict.fromkeys(ladders, 0), {name: len(ladder) - 1 for name, ladder in ladders.items()}
        while low != high:
            middle = {name: (low[name] + high[name]) // 2 for name in ladders}
            tried = [setting for name, ladder in ladders.items() for setting in ladder[middle[name]]]
            found = self.simulated((*fixed, *tried))
            for name in ladders:
                peak = found.device_peak if name == "rollout" else found.device[name].total
                if peak <= self._gpu_memory:
                    high[name] = middle[name]
                else:
                    low[name] = middle[name] + 1
        return {name: ladder[high[name]] for name, ladder in ladders.items()}
