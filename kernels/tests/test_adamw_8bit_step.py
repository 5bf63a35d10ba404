from __future__ import annotations

import pytest
import tolerances
import torch
from adamw_cases import (
    SETTINGS,
    SIZES,
    assert_same_states,
    by_backend,
    by_dtype,
    by_gradient_dtype,
    gradients,
    taken,
    weights,
)
from kernel_cases import LAYOUTS, WORDS
from leap_kernels import Adam8bitState, adamw_8bit_step_, stochastic_round_, use_backend
from leap_kernels._adamw_8bit import GROUPS
from leap_kernels._moments import MAP1, MAP2
from torch import Tensor

X = torch.ones(2, 300)
STATE = Adam8bitState.zeros_like(X)


def widened(codes: Tensor, absmax: Tensor, entries: Tensor) -> Tensor:
    """Return a moment in float64."""
    return (entries[codes.long()] * absmax.repeat_interleave(256)[: codes.numel()].view(codes.shape)).double()


# ---- backends agree ----------------------------------------------------------------------------------------


@pytest.mark.native
@by_gradient_dtype
@by_dtype
@pytest.mark.parametrize("size", [*SIZES, 300_007])
def test_native_bits_are_those_of_the_reference_on_any_number_of_threads(
    gradient_dtype: torch.dtype, dtype: torch.dtype, size: int
) -> None:
    parameter, steps = weights(size, dtype=dtype), gradients(3, size, dtype=gradient_dtype)
    expected = taken("reference", parameter, steps, offset=5, gradient_scale=0.37)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results = taken("native", parameter, steps, offset=5, gradient_scale=0.37)
        torch.set_num_threads(1)
        assert_same_states(results, expected)
        for result, want in zip(results, expected, strict=True):
            assert torch.equal(result[0].view(WORDS[dtype]), want[0].view(WORDS[dtype]))


@by_backend
def test_bits_are_those_of_stochastic_round(backend: str) -> None:
    parameter, steps = weights(3000, dtype=torch.bfloat16), gradients(1, 3000)
    ((exact, *_),) = taken(backend, parameter.float(), steps)
    for seed, offset in ((7, 0), (8, 0), ((1 << 64) - 1, 3), (7, 1 << 40)):
        ((stepped, *_),) = taken(backend, parameter, steps, seed=seed, offset=offset)
        rounded = stochastic_round_(torch.empty_like(parameter), exact, seed, offset)
        assert torch.equal(stepped.view(torch.int16), rounded.view(torch.int16))


@pytest.mark.interpreter
@pytest.mark.parametrize("offset", [0, 5, (1 << 62) + 3])
@by_gradient_dtype
@by_dtype
@pytest.mark.parametrize("size", [255, 256 * GROUPS + 1, 10_000])
def test_triton_bits_are_those_of_the_reference(
    size: int, dtype: torch.dtype, gradient_dtype: torch.dtype, offset: int
) -> None:
    parameter, steps = weights(size, dtype=dtype), gradients(3, size, dtype=gradient_dtype)
    expected, results = (
        taken(backend, parameter, steps, offset=offset, gradient_scale=0.37) for backend in ("reference", "triton")
    )
    assert_same_states(results, expected)
    for result, want in zip(results, expected, strict=True):
        assert torch.equal(result[0].view(WORDS[dtype]), want[0].view(WORDS[dtype]))


# ---- the step is that of AdamW -----------------------------------------------------------------------------


@by_backend
@by_gradient_dtype
def test_float32_weights_against_float64(backend: str, gradient_dtype: torch.dtype) -> None:
    parameter, steps = weights(3000), gradients(6, 3000, dtype=gradient_dtype)
    results = taken(backend, parameter, steps, gradient_scale=0.37)
    beta1, beta2 = SETTINGS["beta1"], SETTINGS["beta2"]
    old, m, v = parameter.double(), torch.zeros(3000).double(), torch.zeros(3000).double()
    for number, (result, gradient) in enumerate(zip(results, steps, strict=True), 1):
        g = 0.37 * gradient.double()
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        update = m / (1 - beta1**number) / ((v / (1 - beta2**number)).sqrt() + SETTINGS["eps"])
        exact = old - SETTINGS["lr"] * (update + SETTINGS["weight_decay"] * old)
        # A dozen roundings on the way to m, root and quotient, all relative to the terms of m.
        terms = update.abs() + (1 - beta1) * g.abs() / v.sqrt()
        bound = tolerances.elementwise(exact, old.abs() + SETTINGS["lr"] * 12 * terms, torch.float32, 3)
        assert ((result[0].double() - exact).abs() <= bound).all()
        old, m, v = result[0].double(), widened(*result[1:3], MAP1), widened(*result[3:], MAP2)


@pytest.mark.native
@pytest.mark.parametrize("weight_decay", [0.0, 1.0], ids=["update", "decay"])
def test_bfloat16_weights_move_as_float32_ones_and_rounding_to_nearest_stops_them(weight_decay: float) -> None:
    """2,000 updates of 1e-5, or as many decays by a factor 1 - 1e-5."""
    start = weights(50_000, dtype=torch.bfloat16)
    gradient = torch.full((50_000,), 0.0 if weight_decay else 1e-3)
    settings = SETTINGS | {"lr": 1e-5, "weight_decay": weight_decay}
    exact, ours, nearest = start.float(), start.clone(), start.clone()
    states = [Adam8bitState.zeros_like(start) for _ in range(3)]
    with use_backend("native", strict=True):
        for step in range(1, 2001):
            draws = settings | {"offset": step * start.numel(), "step": step}
            adamw_8bit_step_(exact, gradient, states[0], **draws)
            adamw_8bit_step_(ours, gradient, states[1], **draws)
            nearest.copy_(adamw_8bit_step_(nearest.float(), gradient, states[2], **draws))
    towards = start.double().sign() if weight_decay else torch.ones(50_000).double()
    moved, ours_moved, nearest_moved = (
        ((after.double() - start.double()) * towards).mean().item() for after in (exact, ours, nearest)
    )
    distance = start.double().abs().mean().item() * (1 - (1 - 1e-5) ** 2000) if weight_decay else 2000 * 1e-5
    assert moved == pytest.approx(-distance, rel=0.002)
    assert ours_moved == pytest.approx(moved, rel=0.01)
    assert abs(nearest_moved) < 0.5 * abs(moved)


@by_backend
@pytest.mark.parametrize(("weight_decay", "expected"), [(0.0, 1.0), (1.0, 1 - 2**-24)])
def test_decay_and_update_are_rounded_together(backend: str, weight_decay: float, expected: float) -> None:
    """Of 2e-8 each, either would be lost at 1, whose neighbour is at 6e-8; and 1 - 2e-8 is 1 as a factor."""
    settings = {"lr": 2e-8, "eps": 0.0, "weight_decay": weight_decay}
    ((stepped, *_),) = taken(backend, torch.ones(1), [torch.ones(1)], **settings)
    assert stepped.item() == expected


# ---- what is not finite ------------------------------------------------------------------------------------


@by_backend
@by_dtype
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_group(backend: str, dtype: torch.dtype, value: float) -> None:
    parameter, clean = weights(1000, dtype=dtype), gradients(3, 1000)
    clean[0][300] = 0
    spoilt = [clean[0].clone(), *clean[1:]]
    spoilt[0][300] = value
    results, expected = taken(backend, parameter, spoilt), taken(backend, parameter, clean)
    inside = torch.zeros(1000, dtype=torch.bool)
    inside[256:512] = True
    for result, want in zip(results, expected, strict=True):
        for got, good in zip(result, want, strict=True):
            outside = ~inside if len(got) == 1000 else torch.arange(len(got)) != 1
            assert torch.equal(got[outside], good[outside])
    hit = torch.arange(1000) == 300
    assert torch.equal(results[0][0].isnan(), hit)
    # An infinite absmax spoils its group at the next step; a NaN spoils none but its own weight.
    assert torch.equal(results[1][0].isnan(), hit if value != value else inside)
    if value != value:
        for position, moment in ((1, "first"), (3, "second")):
            assert results[0][position][300] == 0, moment
            assert torch.equal(results[0][position][~hit], expected[0][position][~hit]), moment


@by_backend
def test_a_group_of_nothing_but_nan_has_no_largest_magnitude(backend: str) -> None:
    parameter = weights(300)
    ((stepped, *moments),) = taken(backend, parameter, [torch.full((300,), torch.nan)])
    assert stepped.isnan().all()
    assert not any(tensor.any() for tensor in moments)


# ---- arguments ---------------------------------------------------------------------------------------------


def test_state_is_shaped_as_the_parameter() -> None:
    for tensor, (dtype, shape) in zip(
        STATE.tensors(), 2 * ((torch.uint8, (2, 300)), (torch.float32, (3,))), strict=True
    ):
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)
        assert not tensor.any()


@by_backend
@by_dtype
@pytest.mark.parametrize("layout", [layout for name, layout in LAYOUTS.items() if name != "expanded"])
def test_strided_parameters_are_stepped_in_place_in_row_major_order(backend: str, dtype: torch.dtype, layout) -> None:
    plain, (gradient,) = weights(3, 8, 90, dtype=dtype), gradients(1, 3, 8, 90)
    (expected,) = taken(backend, plain, [gradient])
    parameter, state = layout(plain), Adam8bitState.zeros_like(plain)
    with use_backend(backend, strict=True):
        assert adamw_8bit_step_(parameter, layout(gradient), state, step=1, **SETTINGS) is parameter
    for got, want in zip((parameter, *state.tensors()), expected, strict=True):
        assert torch.equal(got, want)


def test_parameters_and_empty_tensors() -> None:
    parameter = torch.nn.Parameter(X.clone())
    state = Adam8bitState.zeros_like(parameter)
    versions = [tensor._version for tensor in (parameter, *state.tensors())]
    assert adamw_8bit_step_(parameter, X, state, **SETTINGS, step=1) is parameter
    assert parameter.is_leaf
    assert (parameter < 1).all()
    assert all(tensor._version > old for tensor, old in zip((parameter, *state.tensors()), versions, strict=True))
    empty = torch.zeros(0, 3)
    assert adamw_8bit_step_(empty, empty, Adam8bitState.zeros_like(empty), **SETTINGS, step=1) is empty


def test_compiles_to_one_graph() -> None:
    def step(parameter: Tensor, gradient: Tensor, state: Adam8bitState) -> Tensor:
        return adamw_8bit_step_(parameter, 2 * gradient, state, **SETTINGS, step=1) + 1

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        parameter, state = X.clone(), Adam8bitState.zeros_like(X)
        results.append((function(parameter, X, state), parameter, *state.tensors()))
    for eager, compiled in zip(*results, strict=True):
        assert eager.any()
        assert torch.equal(eager, compiled)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"parameter": X.half()}, "parameter is torch.float16"),
        ({"gradient": X.double()}, "gradient is torch.float64"),
        ({"gradient": X[:, 1:]}, "alike"),
        ({"parameter": X[:1].expand(2, 300)}, "expanded"),
        ({"state": Adam8bitState.zeros_like(X.flatten())}, "start with Adam8bitState.zeros_like"),
        ({"state": Adam8bitState(STATE.state1, STATE.absmax1, STATE.state2, STATE.absmax2[1:])}, r"\(3,\)"),
        ({"state": Adam8bitState(STATE.state1.char(), *STATE.tensors()[1:])}, "torch.int8"),
        ({"state": Adam8bitState(STATE.state1.t().contiguous().t(), *STATE.tensors()[1:])}, "contiguous"),
        ({"step": 0}, "counts steps from 1"),
        ({"lr": -1e-3}, "lr"),
        ({"eps": float("nan")}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": -0.1}, "beta2"),
        ({"seed": 1 << 64}, "seed"),
        ({"offset": (1 << 63) - 599}, "offset"),
    ],
)
def test_wrong_arguments_are_named(changed, message) -> None:
    arguments = {"parameter": X, "gradient": X, "state": STATE, "step": 1, **SETTINGS} | changed
    with pytest.raises(ValueError, match=message):
        adamw_8bit_step_(**arguments)
    assert not any(tensor.any() for tensor in STATE.tensors())
