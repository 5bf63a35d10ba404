"""Which steps of a trajectory a method may draw from, and whether images share a draw: the same options for all."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from leapalign.inputs.bounds import NonNegativeInt
from leapalign.methods.base import SurrogateMethod


@dataclass(frozen=True)
class StepDraws(SurrogateMethod):
    """Base of methods that draw steps. One adds ``draw_steps`` and ``plan``, and where all steps are too many
    ``own_range``.

    Raises ValueError for options that contradict each other.
    """

    per_image: bool = True
    """Whether every image has its own steps, or an iteration one set for all, as in FlowBP."""
    index_range: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """First and last step that may carry gradient; null: the method's own range."""
    tail_ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    """In place of ``index_range``, the share of steps at the end that may carry gradient, rounded up (FlowBP)."""

    def __post_init__(self) -> None:
        if self.index_range is not None and self.tail_ratio is not None:
            raise ValueError("index_range and tail_ratio both say which steps may carry gradient; leave one out")

    def draw(self, num_steps: int, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """What ``draw_steps`` draws, ``(..., B)``, for each image or once for all.

        Raises ValueError where the steps do not suffice, or the index range is not one.
        """
        drawn = self.draw_steps(self.window(num_steps), batch_size if self.per_image else 1, generator)
        return {name: steps.expand(*steps.shape[:-1], batch_size) for name, steps in drawn.items()}

    @abstractmethod
    def draw_steps(self, window: range, batch_size: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Named steps of ``window``, ``(..., batch_size)`` int64; -1 takes no part."""

    def window(self, num_steps: int) -> range:
        """The steps that may carry gradient. Raises ValueError where the index range is not one."""
        if self.tail_ratio is not None:
            return range(num_steps - math.ceil(num_steps * self.tail_ratio), num_steps)
        if self.index_range is None:
            return self.own_range(num_steps)
        first, last = self.index_range
        if not first <= last < num_steps:
            raise ValueError(f"index_range [{first}, {last}] is not a range of the steps 0 to {num_steps - 1}")
        return range(first, last + 1)

    def own_range(self, num_steps: int) -> range:
        """The steps that may carry gradient where the options leave it to the method: here all."""
        return range(num_steps)

    def refuse_beside_a_range(self, option: str) -> None:
        """Raises ValueError where ``option``, which says the method's own range, was given beside another."""
        if self.index_range is None and self.tail_ratio is None:
            return
        if getattr(self, option) != getattr(type(self), option):
            given = "index_range" if self.tail_ratio is None else "tail_ratio"
            raise ValueError(f"{option} and {given} both say which steps may carry gradient; leave one out")
