"""Tensors that the tests of `group_norm_silu` share, and its formula in plain PyTorch."""

from __future__ import annotations

import pytest
import tolerances
import torch
from kernel_cases import latents
from torch import Tensor
from torch.nn.functional import group_norm, silu

SHAPES = {
    "one-element-a-sample": ((2, 1, 1, 1), 1),
    "no-places": ((3, 6), 3),
    "narrow": ((2, 6, 3, 5), 2),
    "groups-of-one": ((2, 5, 3, 3), 5),
    "image": ((2, 8, 9, 7), 4),
    "longer-than-a-block": ((1, 2, 91, 97), 1),
    "longer-than-a-program": ((1, 2, 183, 181), 1),
    "video": ((1, 8, 2, 3, 5), 4),
}
by_shape = pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES)
Inputs = dict[str, Tensor]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, affine: bool = True) -> Inputs:
    x = latents(*shape).mul(0.7).add(0.4).to(dtype)
    drawn = {"x": x, "grad": latents(*shape, dtype=dtype)}
    names = ("weight", "bias") if affine else ()
    return drawn | {name: latents(shape[1], dtype=dtype) for name in names}


def channels_last(given: Inputs) -> Inputs:
    return {n: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for n, x in given.items()}


def eager(x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return silu(group_norm(x, groups, weight, bias, 1e-6))


def differentiated(function, given: Inputs, groups: int) -> dict[str, Tensor]:
    leaves = {name: value.detach().requires_grad_() for name, value in given.items() if name != "grad"}
    out = function(leaves["x"], groups, leaves.get("weight"), leaves.get("bias"))
    grads = torch.autograd.grad(out, list(leaves.values()), given["grad"])
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def in_double(given: Inputs) -> Inputs:
    return {name: value.double() for name, value in given.items()}


def assert_accurate(given: Inputs, groups: int, results: Inputs, cut: bool = False) -> None:
    """Check errors against float64; `cut` allows bfloat16 that was cut off, not rounded. All is on the CPU."""
    x, dtype = given["x"].double(), given["x"].dtype
    exacts = differentiated(eager, in_double(given), groups)
    size = x.numel() // len(x) // groups
    deviation = x.reshape(len(x) * groups, -1).var(dim=1, correction=0).add(1e-6).sqrt().min().item()
    normed, grad = x.abs().max().item() / deviation, given["grad"].abs().max().item()
    weight = given["weight"].abs().max().item() if "weight" in given else 1.0
    magnitude = 4 * max(1.0, normed) * max(1.0, weight) * max(1.0, grad)
    for name, exact in exacts.items():
        terms = x.numel() // x.shape[1] if name in ("weight", "bias") else size
        scale = magnitude * {"out": 1.0, "x": 1 / deviation}.get(name, terms**0.5)
        arithmetic, storage = tolerances.largest(exact, scale, terms, dtype, dtype)
        assert results[name].dtype == dtype
        error = (results[name].double() - exact).abs().max().item()
        assert error <= arithmetic + (2 if cut else 1) * storage, name
