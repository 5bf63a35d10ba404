"""Latent shapes and memory layouts the kernel tests share, and every op with the formula it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import leap_kernels as ops
import pytest
import tolerances
import torch
from torch import Tensor

HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = (
    "reference",
    pytest.param("native", marks=pytest.mark.native),
    pytest.param("triton", marks=pytest.mark.interpreter),
)
SHAPES = {
    "one-element": (1, 1),
    "scalar-samples": (5,),
    "prime": (3, 1009),
    "packed-image": (2, 81, 64),
    "longer-than-a-block": (2, 8192 + 17),
    "video": (2, 4, 3, 5, 7),
}
WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def latents(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return normal noise, rounded to `dtype`."""
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def sigmas(batch: int) -> tuple[Tensor, Tensor]:
    """Return per-sample noise levels, the first above the second."""
    levels = torch.rand(2, batch).sort(dim=0, descending=True).values
    return levels[0], levels[1]


LAYOUTS = {
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "strided": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0],
    "offset": lambda x: torch.cat([x[:1], x])[1:],
    "batch-last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded": lambda x: x[:1, :1].expand_as(x),
}

# ---- every op, by its formula ------------------------------------------------------------------------------

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """An op on given inputs, and the same in plain PyTorch, which autograd differentiates.

    Inputs have the names of the op's arguments. Those called x..., v... and so on are latents (B, ...), the others are
    per-sample. `depth` bounds every intermediate value, in units of the largest input. The gradient of a `surrogate`
    is not the derivative of its value: that is what the op is for.
    """

    latents: tuple[str, ...]
    op: Callable[..., Outputs]
    formula: Callable[..., Outputs]
    depth: float
    per_sample: tuple[str, ...] = ()
    differentiable: tuple[str, ...] = ()
    surrogate: bool = False
    returns_argument: bool = False

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
        """Draw latents, sigmas that descend, and the gradient of the first output."""
        drawn = {name: latents(*shape, dtype=dtype) for name in (*self.latents, "grad")}
        levels = torch.rand(len(self.per_sample), shape[0]).sort(dim=0, descending=True).values
        return drawn | dict(zip(self.per_sample, levels, strict=True))

    def run(self, inputs: Inputs, formula: bool = False) -> Outputs:
        """Return the outputs of the op (or of its formula) and the gradients at what is differentiable."""
        leaves = {
            name: value.detach().requires_grad_(name in self.differentiable)
            for name, value in inputs.items()
            if name != "grad"
        }
        outputs = (self.formula if formula else self.op)(**leaves)
        if not self.differentiable:
            return outputs
        grad = inputs["grad"] if outputs[0].ndim else torch.ones_like(outputs[0])
        gradients = torch.autograd.grad(outputs[0], [leaves[name] for name in self.differentiable], grad)
        return *(output.detach() for output in outputs), *gradients


def rows(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))


def mean(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).mean(dim=1)


def norm(x: Tensor) -> Tensor:
    return x.reshape(len(x), -1).square().sum(dim=1).sqrt()


def leap(x: Tensor, velocity: Tensor, sigma_from: Tensor, sigma_to: Tensor) -> Outputs:
    return (x - rows(sigma_from - sigma_to, x) * velocity,)


def connector(x: Tensor, velocity: Tensor, sigma_from: Tensor, sigma_to: Tensor, target: Tensor) -> Outputs:
    (xhat,) = leap(x, velocity, sigma_from, sigma_to)
    return xhat + (target - xhat).detach(), mean((target - xhat).abs())


def distances(
    x_k: Tensor, v_k: Tensor, x_j: Tensor, v_j: Tensor, x_end: Tensor, sigma_k: Tensor, sigma_j: Tensor
) -> Outputs:
    first = (x_j - leap(x_k, v_k, sigma_k, sigma_j)[0]).abs()
    return mean(first), mean((x_end - (x_j - rows(sigma_j, x_j) * v_j)).abs())


def euler(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor) -> Outputs:
    return (x + rows(sigma_next - sigma, x) * velocity,)


def guided(
    x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, uncond_velocity: Tensor, guidance_scale: Tensor
) -> Outputs:
    scale = rows(guidance_scale, x)
    return euler(x, scale * velocity + (1 - scale) * uncond_velocity, sigma, sigma_next)


def scaled(x: Tensor, factor: Tensor) -> Outputs:
    return (rows(factor, x) * x + (1 - rows(factor, x)) * x.detach(),)


def combine(direct: Tensor, nested: Tensor, coefficient: Tensor, max_ratio: float | None) -> Outputs:
    norms = norm(direct), norm(nested)
    cap = torch.ones_like(norms[0]) if max_ratio is None else (max_ratio * norms[0] / norms[1]).clamp(max=1)
    return rows(coefficient, direct) * (direct + 0.3 * rows(cap, direct) * nested), *norms


def loss(reward: Tensor, first: Tensor, second: Tensor) -> Outputs:
    weight = 1 / (first.clamp(min=0.1) + second.clamp(min=0.1))
    return (weight * (0.6 - reward).relu()).mean(), weight


def accumulated(total: Tensor, value: Tensor) -> Outputs:
    return (total + value,)


def ema(average: Tensor, weights: Tensor) -> Outputs:
    return (0.9 * average + 0.1 * weights,)


SIGMAS = ("sigma_from", "sigma_to")
CASES = {
    "leap_update": Case(("x", "velocity"), lambda **i: ops.leap_update(**i)[:1], leap, 2, SIGMAS, ("x", "velocity")),
    "leap_update/target": Case(
        ("x", "velocity", "target"), ops.leap_update, connector, 3, SIGMAS, ("x", "velocity"), surrogate=True
    ),
    "leap_distances": Case(
        ("x_k", "v_k", "x_j", "v_j", "x_end"), ops.leap_distances, distances, 3, ("sigma_k", "sigma_j")
    ),
    "scale_gradient": Case(("x",), lambda **i: (ops.scale_gradient(**i),), scaled, 1, ("factor",), ("x",), True, True),
    "euler_step": Case(
        ("x", "velocity"), lambda **i: (ops.euler_step(**i),), euler, 2, ("sigma", "sigma_next"), ("x", "velocity")
    ),
    "euler_step/guidance": Case(
        ("x", "velocity", "uncond_velocity"),
        lambda **i: (ops.euler_step(**i),),
        guided,
        4,
        ("guidance_scale", "sigma", "sigma_next"),
        ("x", "velocity", "uncond_velocity"),
    ),
    **{
        f"combine_gradient_terms/{max_ratio}": Case(
            ("direct", "nested"),
            partial(lambda max_ratio, **i: ops.combine_gradient_terms(**i, alpha=0.3, max_ratio=max_ratio), max_ratio),
            partial(combine, max_ratio=max_ratio),
            2,
            ("coefficient",),
        )
        for max_ratio in (None, 0.5)
    },
    "consistency_weighted_loss": Case(
        (),
        lambda reward, first, second: ops.consistency_weighted_loss(reward, (first, second), 0.6, 0.1),
        loss,
        10,
        ("first", "reward", "second"),
        ("reward",),
    ),
    "accumulate_": Case(
        ("total", "value"),
        lambda total, value: (ops.accumulate_(total.clone(), value),),
        accumulated,
        1,
        returns_argument=True,
    ),
    "ema_update_": Case(
        ("average", "weights"),
        lambda average, weights: (ops.ema_update_(average.clone(), weights, 0.9),),
        ema,
        2,
        returns_argument=True,
    ),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def assert_accurate(case: Case, inputs: Inputs, results: Outputs, cut: bool = False) -> None:
    """Check errors: within what the arithmetic allows, and at most twice that of the reference in the same dtype.

    `cut` allows a bfloat16 result that was cut off, not rounded. Inputs and results are on the CPU.
    """
    with ops.use_backend("reference"):
        references = case.run(inputs)
    exacts = case.run({name: value.double() for name, value in inputs.items()}, formula=True)
    magnitude = case.depth * max(value.abs().max().item() for value in inputs.values())
    grad = inputs["grad"]
    for result, reference, exact in zip(results, references, exacts, strict=True):
        assert result.dtype == reference.dtype
        assert result.shape == reference.shape == exact.shape
        error, at_reference = ((value.double() - exact).abs().max().item() for value in (result, reference))
        count = grad.numel() // len(grad) if result.ndim < 2 else 1
        arithmetic, storage = tolerances.largest(exact, magnitude, count, grad.dtype, result.dtype)
        cut_off = cut and result.dtype == torch.bfloat16
        assert error <= arithmetic + (2 if cut_off else 1) * storage
        assert error <= 2 * at_reference + arithmetic + (2 * storage if cut_off else 0)
