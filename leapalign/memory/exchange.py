"""Weights that change places with values in host memory, one tensor after the other, so that none is there twice."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from leapalign.memory.residency import made_for, note_traffic

_TRIES = 3
"""So often one step is taken before it is given up."""


@contextlib.contextmanager
def exchanged(
    parameters: Sequence[Tensor],
    held: Sequence[Tensor],
    changing: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[None]:
    """Within the block ``parameters`` hold what ``held`` did, and the other way round; after it, to the bit, as before.

    Tensors of one shape and dtype in pairs, of which those in ``held`` are in host memory. ``changing`` is entered
    while they change places. Interrupted on the way there, what was exchanged is exchanged back; interrupted on the way
    back, the rest follows before the interruption does.
    """
    there, back = _Pass(parameters, held), _Pass(parameters, held)

    def return_all() -> None:
        with changing():
            there.run(there.begun)
            back.run(there.begun)

    try:
        with changing():
            there.run(len(parameters))
        yield
    finally:
        _to_the_end(return_all, lambda: there.steps + back.steps)


class _Pass:
    """Tensors that change places, the first ones first, in steps of which each may be taken again when interrupted."""

    def __init__(self, parameters: Sequence[Tensor], held: Sequence[Tensor]) -> None:
        self._pairs = list(zip(parameters, held, strict=True))
        self._aside: Tensor | None = None
        self.steps = 0

    @property
    def begun(self) -> int:
        """Of how many tensors steps were taken."""
        return -(-self.steps // 3)

    @torch.no_grad()
    def run(self, count: int) -> None:
        """Takes the steps that are left of the first ``count`` tensors."""
        while self.steps < 3 * count:
            number, step = divmod(self.steps, 3)
            parameter, held = self._pairs[number]
            if step == 0:
                with made_for("weights"):
                    self._aside = parameter.clone()
            elif step == 1:
                parameter.copy_(held)
                note_traffic("to_device", held.nbytes)
            else:
                assert self._aside is not None
                held.copy_(self._aside)
                note_traffic("to_host", held.nbytes)
            self.steps += 1
            if step == 2:
                self._aside = None


def _to_the_end(run: Callable[[], None], steps: Callable[[], int]) -> None:
    """Runs anew after each interruption, and raises the first at the end, or where one step failed `_TRIES` times."""
    first, interrupted = None, Counter[int]()
    while True:
        try:
            run()
            break
        except BaseException as interruption:
            first = first or interruption
            interrupted[steps()] += 1
            if interrupted[steps()] == _TRIES:
                break
    if first is not None:
        raise first
