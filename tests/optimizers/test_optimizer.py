"""The optimizer step: clipping, rounding, movement, average, and what a checkpoint holds of it."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from leap_kernels import total_norm
from torch import Tensor, nn

from benchmarks.stochastic_rounding import CHANGES, Change, movement
from leapalign.config import HOST_OPTIMIZERS, EmaConfig, OptimizerConfig
from leapalign.inputs.validation import UserError
from leapalign.optimizers import OPTIMIZERS, get_optimizer
from leapalign.optimizers.optimizer import Optimizer
from leapalign.optimizers.weight_average import WeightAverage, base_share

ROUNDED = ("adamw_8bit", "adafactor")


def parameters(dtype: torch.dtype = torch.float32, count: int = 20_000) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((count // 100, 100), (300,))
    return [nn.Parameter((0.03 * torch.randn(shape, generator=generator)).to(dtype)) for shape in shapes]


def optimizer_of(weights: list[nn.Parameter], ema: str = "float32", **options: object) -> Optimizer:
    return Optimizer(weights, OptimizerConfig(**options), EmaConfig(dtype=ema), iterations=10, seed=3)


def give_gradients(weights: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)


def recorded(benchmark: str) -> list[dict[str, Any]]:
    """The lines of its results."""
    file = Path(__file__).parents[2] / "benchmarks" / "results" / f"{benchmark}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_adamw_is_pytorchs_with_clipping() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = optimizer_of(ours, learning_rate=1e-3, max_grad_norm=0.5, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        assert optimizer.step()["grad_norm"] == pytest.approx(float(expected))
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_norm_of_bfloat16_gradients_is_that_of_their_values() -> None:
    """Rounded to bfloat16, as PyTorch's is, it would be off by up to 2^-9."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(1000, generator=generator).bfloat16() for _ in range(50)]
    exact = torch.cat(gradients).double().norm()
    assert float(total_norm(gradients)) == pytest.approx(exact.item(), rel=1e-6)
    assert abs(float(torch.nn.utils.get_total_norm(gradients)) / exact.item() - 1) > 1e-4
    assert total_norm([]) == 0


def test_eight_bit_moments_follow_full_ones() -> None:
    """Clipping included: the coefficient is applied inside the step, in float32."""
    ours, theirs = parameters(), parameters()
    start = [weight.detach().clone() for weight in ours]
    bytes_, full = (
        optimizer_of(weights, name=name, learning_rate=1e-3, max_grad_norm=0.5)
        for weights, name in ((ours, "adamw_8bit"), (theirs, "adamw"))
    )
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        bytes_.step()
        full.step()
    for a, b, old in zip(ours, theirs, start, strict=True):
        moved = (b - old).detach()
        assert float((a - b).norm() / moved.norm()) < 0.05


def test_rounding_to_nearest_is_refused_with_the_share_that_would_not_move() -> None:
    weights = parameters(torch.bfloat16)
    with pytest.raises(UserError, match=r"step of 1e-05 would leave 89% of them where they are; choose adamw_8bit"):
        optimizer_of(weights, name="adamw", learning_rate=1e-5)
    # The share is what really happens.
    stepped = weights[0].detach() - torch.tensor(1e-5, dtype=torch.bfloat16)
    assert float((stepped == weights[0].detach()).float().mean()) == pytest.approx(0.89, abs=0.01)


@pytest.mark.bitsandbytes
def test_the_librarys_own_eight_bit_adamw_takes_its_own_steps() -> None:
    """Those of a bare bitsandbytes optimizer on clipped gradients, to the bit."""
    from bitsandbytes.optim import AdamW8bit

    ours, theirs = parameters(), parameters()
    optimizer = optimizer_of(ours, name="bnb_adamw_8bit", learning_rate=1e-3, max_grad_norm=0.5)
    bare = AdamW8bit(theirs, lr=1e-3, weight_decay=1e-4)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        norm = optimizer.step()["grad_norm"]
        for weight in theirs:
            weight.grad *= min(1.0, 0.5 / (norm + 1e-6))
        bare.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert {state["state1"].dtype for state in optimizer.rule.state.values()} >= {torch.uint8}


@pytest.mark.bitsandbytes
def test_the_librarys_optimizers_are_refused_where_they_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="bnb_paged_adamw_8bit pages memory of an NVIDIA GPU"):
        optimizer_of(parameters(), name="bnb_paged_adamw_8bit")
    with pytest.raises(UserError, match="bnb_adamw_8bit rounds bfloat16 weights to nearest"):
        optimizer_of(parameters(torch.bfloat16), name="bnb_adamw_8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"needs bitsandbytes .*; install it with pip install bitsandbytes"):
        optimizer_of(parameters(), name="bnb_adamw_8bit")


@pytest.mark.parametrize("name", ROUNDED)
def test_small_updates_arrive_in_bfloat16(name: str) -> None:
    """Two thousand steps of 1e-5, a tenth of what rounding to nearest would need to see."""
    full, rounded = (movement(name, CHANGES["update"], dtype, 1 << 14, 2000) for dtype in ("float32", "stochastic"))
    assert full == pytest.approx(0.02, rel=1e-4)
    assert rounded == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("name", ROUNDED)
def test_small_decay_arrives_in_bfloat16(name: str) -> None:
    decay = Change(gradient=0.0, learning_rate=1e-3, weight_decay=1e-2)
    full, rounded = (movement(name, decay, dtype, 1 << 16, 2000) for dtype in ("float32", "stochastic"))
    assert full == pytest.approx(0.03 * math.sqrt(2 / math.pi) * (1 - (1 - 1e-5) ** 2000), rel=0.01)
    assert rounded == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("name", ROUNDED)
def test_decay_beside_an_update_is_not_lost(name: str) -> None:
    """A billionth of the weight a step, as by default: of 1 - 1e-9 float32 makes 1."""
    decayed, plain = ([nn.Parameter(torch.full((1000, 1000), 0.02))] for _ in range(2))
    for weights, decay in ((decayed, 1e-4), (plain, 0.0)):
        optimizer = optimizer_of(weights, name=name, learning_rate=1e-5, weight_decay=decay)
        give_gradients(weights, 0)
        optimizer.step()
    assert float((plain[0].double() - decayed[0].double()).mean()) == pytest.approx(0.02e-9, rel=0.2)


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_scaled_in_float32(name: str, dtype: torch.dtype) -> None:
    """Also those of bfloat16 weights, which host memory holds in float32."""
    narrow, wide = parameters(dtype), parameters(dtype)
    give_gradients(narrow, 0)
    for weights, gradients in (
        (narrow, [weight.grad.bfloat16() for weight in narrow]),
        (wide, [weight.grad.bfloat16().float() / 3 for weight in narrow]),
    ):
        rule = get_optimizer(weights, OptimizerConfig(name=name, learning_rate=1e-2), seed=5)
        rule.gradients, rule.gradient_scale = gradients, 1 / 3 if weights is narrow else 1.0
        rule.step()
    for a, b in zip(narrow, wide, strict=True):
        # The same bits round what is all but the same.
        same = torch.isclose(a, b, rtol=1e-6, atol=1e-7)
        assert float(same.float().mean()) > 0.999


def test_recorded_movements_are_those_of_float32() -> None:
    lines = recorded("stochastic_rounding")
    assert {(line["optimizer"], line["change"]) for line in lines} == set(itertools.product(ROUNDED, CHANGES))
    assert all(abs(line["stochastic_to_float32"] - 1) < 0.01 for line in lines)
    assert all(line["nearest_to_float32"] < 0.05 for line in lines)


def test_recorded_sums_in_bfloat16_are_those_of_float32() -> None:
    """So gradients of an iteration may add up in bfloat16."""
    lines = recorded("gradient_accumulation")
    assert [line["passes"] for line in lines] == [2, 8, 32]
    assert all(line["relative_error"] < 0.01 for line in lines)
    assert all(abs(line["norm_ratio"] - 1) < 1e-3 for line in lines)


def test_every_optimizer_has_a_name_in_the_configuration() -> None:
    assert set(get_args(get_type_hints(OptimizerConfig)["name"])) == set(OPTIMIZERS)
    assert set(HOST_OPTIMIZERS) <= set(OPTIMIZERS)


def test_movement_is_counted() -> None:
    weights = parameters()
    optimizer = optimizer_of(weights, weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    weights[0].grad.view(-1)[:1024] = 1.0
    assert optimizer.step()["moved"] == pytest.approx(1024 / (4096 + 300))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_average_reaches_weights_that_stay(dtype: str) -> None:
    """In bfloat16, too, where rounding to nearest would stop a hundred steps of the format away."""
    weights = [nn.Parameter(torch.full((5000,), 1.0, dtype=torch.bfloat16))]
    average = WeightAverage(weights, EmaConfig(dtype=dtype, decay=0.995), seed=0)
    with torch.no_grad():
        weights[0].fill_(1.5)
    for _ in range(400):
        average.update()
    expected = 1.5 - 0.5 * 0.995**400
    assert float(average.tensors[0].float().mean()) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("options", "ages", "base"),
    [
        # The recipe: decay^300 of the base, which counts as 300 iterations old.
        ({}, 154.76, 0.2223),
        ({"warmup": True}, 30.0, 0.0),
        ({"warmup": True, "decay": 0.98}, 30.0, 0.0),
        ({"start": 100}, None, 0.0),
        ({"interval": 10}, None, 0.995**30),
    ],
)
def test_what_an_average_of_300_iterations_is_made_of(options: dict[str, Any], ages: float | None, base: float) -> None:
    """Each iteration moves a weight of its own from 0 to 1: the average holds the shares."""
    config = EmaConfig(**options)
    weights = [nn.Parameter(torch.zeros(300, dtype=torch.float64))]
    average = WeightAverage(weights, config, seed=0)
    for iteration in range(300):
        with torch.no_grad():
            weights[0].zero_()
            weights[0][iteration] = 1
        average.update()
    shares = average.tensors[0].double()
    assert base_share(config, 300) == pytest.approx(base, abs=1e-4)
    assert 1 - shares.sum().item() == pytest.approx(base, abs=1e-4)
    if ages is not None:
        age = (torch.arange(299, -1, -1) * shares).sum() + 300 * base_share(config, 300)
        assert age.item() == pytest.approx(ages, abs=0.01)
    elif "start" in options:
        # The hundredth iteration's weights take the base's place.
        assert (shares[:99] == 0).all()
        assert shares[99].item() == pytest.approx(0.995**200, abs=1e-6)
    else:
        assert (shares > 0).nonzero().flatten().tolist() == list(range(9, 300, 10))


@pytest.mark.parametrize("ema", ["float32", "bfloat16"])
def test_weights_come_back_from_the_average(ema: str) -> None:
    weights = parameters(torch.bfloat16)
    optimizer = optimizer_of(weights, ema, name="adamw_8bit")
    own = [weight.detach().clone() for weight in weights]
    optimizer.average.tensors[0].zero_()
    averages = [tensor.clone() for tensor in optimizer.average.tensors]
    with optimizer.averaged_weights():
        assert all(torch.equal(weight, average.bfloat16()) for weight, average in zip(weights, averages, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(optimizer.average.tensors, averages, strict=True))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("adamw", torch.float32),
        ("adamw_8bit", torch.bfloat16),
        ("adafactor", torch.bfloat16),
        pytest.param("bnb_adamw_8bit", torch.float32, marks=pytest.mark.bitsandbytes),
    ],
)
@pytest.mark.parametrize("ema", ["float32", "bfloat16"])
def test_restored_state_continues_to_the_bit(name: str, dtype: torch.dtype, ema: str) -> None:
    whole = parameters(dtype)
    optimizer = optimizer_of(whole, ema, name=name, learning_rate=1e-3, warmup_iterations=3)
    for step in range(2):
        give_gradients(whole, step)
        optimizer.step()
    resumed = [nn.Parameter(weight.detach().clone()) for weight in whole]
    other = optimizer_of(resumed, ema, name=name, learning_rate=1e-3, warmup_iterations=3)
    saved: dict[str, Tensor] = {key: value.clone() for key, value in optimizer.tensors().items()}
    other.load(saved, optimizer.scalars(), [average.to(dtype) for average in optimizer.average.tensors])
    for step in range(2, 4):
        for weights, one in ((whole, optimizer), (resumed, other)):
            give_gradients(weights, step)
            one.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(optimizer.average.tensors, other.average.tensors, strict=True))
