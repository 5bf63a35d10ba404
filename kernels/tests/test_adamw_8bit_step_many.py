"""Many parameters in one call: the bits of one call each, and a launch for each kind of them."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest
import torch
from adamw_cases import FLOATS, SETTINGS, by_backend, gradients, weights
from kernel_cases import LAYOUTS, WORDS
from leap_kernels import Adam8bitState, adamw_8bit_step_, adamw_8bit_step_many_, use_backend
from leap_kernels._adamw_8bit import GROUPS
from torch import Tensor

MODULE = sys.modules["leap_kernels.adamw_8bit_step_many"]
BLOCK = 256 * GROUPS
# One element, parts of a group, whole groups, one more than a program takes, several programs.
SIZES = (1, 16, 255, 256, 257, BLOCK, BLOCK + 1, 2 * BLOCK + 304)
NUMBERS = {name: value for name, value in SETTINGS.items() if name != "offset"} | {"gradient_scale": 0.37}


class Parameters:
    """Weights of each size and dtype with a gradient of each dtype, and how far each of them has come."""

    def __init__(self) -> None:
        kinds = list(itertools.product(SIZES, FLOATS, FLOATS))
        self.weights = [weights(size, dtype=dtype) for size, dtype, _ in kinds]
        self.gradients = [gradients(1, size, dtype=dtype)[0] for size, _, dtype in kinds]
        self.states = [Adam8bitState.zeros_like(weight) for weight in self.weights]
        self.steps = [1 + number % 3 for number in range(len(kinds))]
        self.offsets = [(1 << 40) + 8 * number if number % 5 else 3 * number for number in range(len(kinds))]

    def each(self) -> list[tuple[Any, ...]]:
        lists = (self.weights, self.gradients, self.states, self.steps, self.offsets)
        return list(zip(*lists, strict=True))

    def tensors(self) -> list[Tensor]:
        return [tensor for weight, _, state, *_ in self.each() for tensor in (weight, *state.tensors())]


def assert_same_bits(tensors: list[Tensor], others: list[Tensor]) -> None:
    for got, want in zip(tensors, others, strict=True):
        as_words = WORDS.get(want.dtype, want.dtype)
        assert torch.equal(got.view(as_words), want.view(as_words))


@by_backend
@pytest.mark.parametrize("seed", [7, (1 << 64) - 3])
def test_bits_are_those_of_one_call_each(backend: str, seed: int) -> None:
    together, alone = Parameters(), Parameters()
    for theirs, ours in zip(alone.weights + alone.gradients, together.weights + together.gradients, strict=True):
        theirs.copy_(ours)
    numbers = NUMBERS | {"seed": seed}
    for _ in range(2):
        with use_backend(backend, strict=True):
            adamw_8bit_step_many_(
                *zip(*[each[:3] for each in together.each()], strict=True),
                **numbers,
                steps=together.steps,
                offsets=together.offsets,
            )
        with use_backend("reference"):
            for weight, gradient, state, step, offset in alone.each():
                adamw_8bit_step_(weight, gradient, state, step=step, offset=offset, **numbers)
        assert_same_bits(together.tensors(), alone.tensors())


@pytest.mark.interpreter
def test_there_is_a_launch_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[torch.dtype, torch.dtype, int, bool, bool]] = []
    launch = MODULE.launch

    def counted(first: Any, jobs: Any, whole_counters: bool, aligned: bool) -> None:
        dtypes = first.parameter.dtype, first.gradient.dtype
        launches.append((*dtypes, len(jobs.rows), whole_counters, aligned))
        launch(first, jobs, whole_counters, aligned)

    monkeypatch.setattr(MODULE, "launch", counted)

    def step(sizes: list[int], offsets: list[int], dtype: torch.dtype = torch.bfloat16) -> None:
        many = [weights(size, dtype=dtype) for size in sizes]
        states = [Adam8bitState.zeros_like(weight) for weight in many]
        steps = [1] * len(sizes)
        with use_backend("triton", strict=True):
            adamw_8bit_step_many_(many, many, states, **NUMBERS, steps=steps, offsets=offsets)

    half = (torch.bfloat16, torch.bfloat16)
    step([16] * 50, [16 * number for number in range(50)])
    assert launches == [(*half, 50, True, True)]
    launches.clear()
    # A size, and a position, of its own.
    step([16, 17, 16, 32], [0, 16, 33, 40])
    assert launches == [(*half, 2, True, True), (*half, 1, True, False), (*half, 1, False, True)]


@pytest.mark.interpreter
def test_misaligned_memory_is_not_taken_for_aligned() -> None:
    together = torch.zeros(64, dtype=torch.bfloat16)
    for tensor, expected in ((together[16:32], True), (together[1:17], False), (together[16:31], False)):
        assert MODULE.aligned((tensor,)) is expected


@by_backend
def test_strided_tensors_and_empty_ones(backend: str) -> None:
    plain = [weights(3, 8, 90, dtype=torch.bfloat16) for _ in LAYOUTS]
    layouts = [layout for name, layout in LAYOUTS.items() if name != "expanded"]
    (gradient,) = gradients(1, 3, 8, 90)
    many = [weights(0, 3), *(layout(weight) for layout, weight in zip(layouts, plain, strict=False)), weights(0)]
    of_each = [torch.zeros(0, 3), *(layout(gradient) for layout in layouts), torch.zeros(0)]
    states = [Adam8bitState.zeros_like(weight) for weight in many]
    offsets = [16 * number for number in range(len(many))]
    with use_backend(backend, strict=True):
        adamw_8bit_step_many_(many, of_each, states, **NUMBERS, steps=[2] * len(many), offsets=offsets)
        for position, weight in enumerate(plain[: len(layouts)], 1):
            state = Adam8bitState.zeros_like(weight)
            adamw_8bit_step_(weight, gradient, state, **NUMBERS, step=2, offset=offsets[position])
            assert_same_bits([many[position].contiguous(), *states[position].tensors()], [weight, *state.tensors()])


@by_backend
def test_nothing_to_step(backend: str) -> None:
    with use_backend(backend, strict=True):
        adamw_8bit_step_many_([], [], [], **NUMBERS, steps=[], offsets=[])
        empty = torch.zeros(0)
        adamw_8bit_step_many_([empty], [empty], [Adam8bitState.zeros_like(empty)], **NUMBERS, steps=[1], offsets=[0])


def test_every_tensor_counts_as_changed() -> None:
    many = [torch.nn.Parameter(weights(300)), torch.nn.Parameter(weights(5))]
    states = [Adam8bitState.zeros_like(weight) for weight in many]
    tensors = [*many, *(tensor for state in states for tensor in state.tensors())]
    versions = [tensor._version for tensor in tensors]
    adamw_8bit_step_many_(
        many, [torch.ones_like(weight) for weight in many], states, **NUMBERS, steps=[1, 1], offsets=[0, 300]
    )
    assert all(tensor._version > version for tensor, version in zip(tensors, versions, strict=True))


X = torch.ones(2, 300)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gradients": [X]}, "got 2 parameters, 1 gradients, 2 states, 2 steps and 2 offsets"),
        ({"parameters": [X, X.to("meta")]}, "on one device, but they are on cpu and meta"),
        ({"parameters": [X, X.half()]}, "many_ takes float32 and bfloat16, but parameter is torch.float16"),
        ({"gradients": [X, X[:1]]}, "alike"),
        ({"states": [Adam8bitState.zeros_like(X), Adam8bitState.zeros_like(X[0])]}, "start with Adam8bitState"),
        ({"steps": [1, 0]}, "counts steps from 1, not 0"),
        ({"lr": -1.0}, "lr"),
        ({"seed": -1}, "seed"),
        ({"offsets": [0, -1]}, "offset"),
    ],
)
def test_wrong_arguments_are_named_before_anything_moves(changed: dict[str, Any], message: str) -> None:
    parameters = [X.clone(), X.clone()]
    arguments = {
        "parameters": parameters,
        "gradients": [X, X],
        "states": [Adam8bitState.zeros_like(X) for _ in range(2)],
        "steps": [1, 1],
        "offsets": [0, 600],
        **NUMBERS,
    }
    with pytest.raises(ValueError, match=message):
        adamw_8bit_step_many_(**(arguments | changed))
    assert all(torch.equal(parameter, X) for parameter in parameters)
