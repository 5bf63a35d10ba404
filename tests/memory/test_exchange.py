"""Weights that change places with others, whatever happens on the way."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from leapalign.memory.exchange import exchanged
from leapalign.memory.residency import TRAFFIC
from leapalign.planning.ledger import StorageLedger

COUNT = 4
COPIES = 3 * COUNT
"""A way: each tensor is set aside, overwritten, and put into the other's place."""


class Interruption(BaseException):
    """Comes from outside, as KeyboardInterrupt does."""


class Interrupting(TorchDispatchMode):
    """Interrupts at the given copies, before or after they are made."""

    def __init__(self, *when: float) -> None:
        super().__init__()
        self._when, self._copies = when, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            return func(*args, **(kwargs or {}))
        number = self._copies
        self._copies += 1
        if number in self._when:
            raise Interruption(number)
        result = func(*args, **(kwargs or {}))
        if number + 0.5 in self._when:
            raise Interruption(number)
        return result


def pairs() -> tuple[list[nn.Parameter], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (1,), (2, 2, 2)]
    drawn = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2)]
    return [nn.Parameter(values) for values in drawn[0]], drawn[1]


def copies(tensors: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def equal(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_they_change_places_and_come_back() -> None:
    parameters, held = pairs()
    weights, values = copies(parameters), copies(held)
    with exchanged(parameters, held):
        assert equal(parameters, values)
        assert equal(held, weights)
    assert equal(parameters, weights)
    assert equal(held, values)


@pytest.mark.parametrize("half", [0, 0.5], ids=["before a copy", "after a copy"])
@pytest.mark.parametrize("copy", range(2 * COPIES))
def test_an_interruption_mixes_nothing(copy: int, half: float) -> None:
    """On the way there nothing is left exchanged, and the block is not entered; on the way back everything returns."""
    parameters, held = pairs()
    weights, values = copies(parameters), copies(held)
    entered = False
    with pytest.raises(Interruption), Interrupting(copy + half), exchanged(parameters, held):
        entered = True
    assert entered == (copy >= COPIES)
    assert equal(parameters, weights)
    assert equal(held, values)


def test_interruptions_upon_interruptions() -> None:
    parameters, held = pairs()
    weights, values = copies(parameters), copies(held)
    with pytest.raises(Interruption) as first, Interrupting(4, 6, 7.5, 11, 13), exchanged(parameters, held):
        pass
    assert first.value.args == (6,), "the first after the way back began; what led to it is its context"
    assert equal(parameters, weights)
    assert equal(held, values)


def test_what_fails_for_ever_is_not_tried_for_ever() -> None:
    parameters, held = pairs()
    with pytest.raises(Interruption), Interrupting(*range(COPIES, 100)), exchanged(parameters, held):
        pass


def test_an_error_within_the_block_comes_out_and_all_comes_back() -> None:
    parameters, held = pairs()
    weights = copies(parameters)
    with pytest.raises(KeyError), exchanged(parameters, held):
        raise KeyError
    assert equal(parameters, weights)


def test_weights_change_only_where_they_may() -> None:
    parameters, held = pairs()
    weights, log = copies(parameters), []

    @contextlib.contextmanager
    def changing() -> Iterator[None]:
        assert equal(parameters, weights if not log else held_before)
        log.append("changing")
        yield

    held_before = copies(held)
    with exchanged(parameters, held, changing):
        assert log == ["changing"]
    assert log == ["changing"] * 2


def test_one_tensor_is_there_twice_at_a_time() -> None:
    parameters, held = pairs()
    before = TRAFFIC.copy()
    with StorageLedger() as ledger:
        ledger.exclude(*parameters, *held)
        with exchanged(parameters, held):
            pass
    everything = sum(tensor.nbytes for tensor in held)
    assert ledger.peak == max(tensor.nbytes for tensor in held)
    assert {way: size for (_, way), size in (TRAFFIC - before).items()} == {
        "to_device": 2 * everything,
        "to_host": 2 * everything,
    }
