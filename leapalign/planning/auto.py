"""The fastest settings that fit a GPU, found by simulating candidates.

Where things live costs the most time, so that is settled first: the fastest place in which the smallest settings fit.
Then each stage gets the fastest of its settings whose peak fits. A simulation ends after the last stage that matters.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from leapalign.config import Config, config_from, override
from leapalign.inputs.validation import UserError
from leapalign.memory.residency import Stage, watched
from leapalign.planning.allowance import allowance
from leapalign.planning.simulate import Simulation, gib, simulate
from leapalign.trainer import Trainer

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
FILLED = 0.95
"""Share that tensors may take of what is left beside the allowance. The rest is for the allocator's gaps."""


def for_tensors(gpu_memory: int) -> int:
    """Bytes that tensors may take of a card sold with ``gpu_memory``."""
    return int((gpu_memory - allowance(gpu_memory)) * FILLED)


def fastest(
    config: Config, gpu_memory: int, note: Callable[[str], None] = lambda _: None
) -> tuple[Settings, Config, Simulation]:
    """The settings that make ``config`` fit ``gpu_memory`` bytes at the least cost in time, and what they need.

    note: is told of each simulation. Raises UserError where nothing fits.
    """
    search = _Search(config, for_tensors(gpu_memory), note)
    place = search.place()
    batch = search.batch(place)
    policies = POLICIES[-1:] if "memory.weights=streamed" in place else POLICIES
    one = search.settled((*place, *batch, "train.microbatch=1"), {"surrogate": policies, "reward": REWARD})
    settings = search.microbatch((*place, *batch, *one["surrogate"], *one["reward"]))
    return settings, search.applied(settings), search.simulated(settings)


def _sizes(size: int) -> list[int]:
    """``size`` and its halves, down to 1."""
    halves = [size]
    while halves[-1] % 2 == 0:
        halves.append(halves[-1] // 2)
    return list(dict.fromkeys([*halves, 1]))


def _until(end: Stage | None) -> Callable[[Trainer], Any]:
    """An iteration that ends as the stage ``end`` begins; None: a whole one."""

    class Enough(Exception):
        pass

    def watch(name: Stage) -> contextlib.AbstractContextManager[None]:
        if name == end:
            raise Enough
        return contextlib.nullcontext()

    def iterate(trainer: Trainer) -> None:
        with contextlib.suppress(Enough), watched(watch):
            trainer.train_one()

    return iterate


class _Search:
    """Simulations of one configuration under various settings."""

    def __init__(self, config: Config, room: int, note: Callable[[str], None]) -> None:
        self._config, self._room, self._note = config, room, note
        self._found: dict[tuple[str, Stage | None], Simulation] = {}

    def applied(self, settings: Settings) -> Config:
        return config_from(override(dataclasses.asdict(self._config), settings), "memory --auto")

    def simulated(self, settings: Settings, end: Stage | None = None) -> Simulation:
        """Of an iteration up to the stage ``end``; None: of a whole one."""
        config = self.applied(settings)
        key = repr(config), end
        if key not in self._found:
            self._found[key] = found = simulate(config, _until(end))
            self._note(f"{gib(found.device_peak)} GiB{f' before {end}' if end else ''} with {' '.join(settings)}")
        return self._found[key]

    def place(self) -> Settings:
        """The first of `PLACES` that the smallest settings fit in."""
        for place in PLACES:
            settings = (*place, *SMALLEST)
            # What lives throughout may be too much already, which a rollout shows.
            for end in ("reward", None):
                found = self.simulated(settings, end)
                if found.device_peak > self._room:
                    break
            else:
                return place
        raise UserError(
            f"nothing fits: tensors may take {gib(max(self._room, 0))} GiB of this memory, and with everything on the "
            f"host and one image at a time they take {gib(found.device_peak)} GiB; reduce the size of the images"
        )

    def batch(self, place: Settings) -> Settings:
        """The most images a rollout: their latents fit beside each stage as it is for one image, and so does theirs."""
        one = self.simulated((*place, *SMALLEST)).device
        for size in _sizes(self._config.train.batch_size):
            batch = f"rollout.batch_size={size}"
            least = max(peak.total + (size - 1) * peak.by_role.get("latents", 0) for peak in one.values())
            settings = (*place, *SMALLEST, batch)
            if least <= self._room and self.simulated(settings, "reward").device_peak <= self._room:
                break
        return (batch,)

    def microbatch(self, fixed: Settings) -> Settings:
        """``fixed`` and the most samples in a forward with gradient that fit."""
        one = self.simulated((*fixed, "train.microbatch=1")).device["surrogate"]
        for size in _sizes(self.applied(fixed).rollout.batch_size):
            settings = (*fixed, f"train.microbatch={size}")
            # Not all that counts as activations grows; where this is too much by far, nothing has to be run.
            least = one.total + 0.9 * (size - 1) * one.by_role.get("activations", 0)
            if size == 1 or (least <= self._room and self.simulated(settings).device_peak <= self._room):
                break
        return settings

    def settled(self, fixed: Settings, ladders: Mapping[Stage, Sequence[Settings]]) -> dict[Stage, Settings]:
        """For each stage the first of its settings that fits; the last ones do. One simulation tries one of each.

        Peaks fall along a ladder, so that halving finds the place.
        """
        low, high = dict.fromkeys(ladders, 0), {name: len(ladder) - 1 for name, ladder in ladders.items()}
        while low != high:
            middle = {name: (low[name] + high[name]) // 2 for name in ladders}
            tried = [setting for name, ladder in ladders.items() for setting in ladder[middle[name]]]
            found = self.simulated((*fixed, *tried), "optimizer")
            for name in ladders:
                if found.device[name].total <= self._room:
                    high[name] = middle[name]
                else:
                    low[name] = middle[name] + 1
        return {name: ladder[high[name]] for name, ladder in ladders.items()}
