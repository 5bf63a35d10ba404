"""Launches the kernels of `group_norm_silu`: who takes which part of a tensor, and where the sums between them lie."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._group_norm_triton import (
    gradient_kernel,
    gradient_sums_kernel,
    group_gradients_kernel,
    group_moments_kernel,
    moments_kernel,
    silu_kernel,
)
from ._triton import triton

TILE = 1024
STEPS = 32
"""Most tiles of a program."""
CHANNELS = 128
"""Most channels of a tile, where channels lie side by side."""
SPANS = 64
"""Spans whose sums are added at a time."""


class Plan(NamedTuple):
    """How programs share out a tensor (B, C, N)."""

    channels: int
    places: int
    steps: int
    programs: int
    spans: int


def plan(batch: int, channels: int, places: int, last: bool) -> Plan:
    """Return tiles of 1024 elements that lie side by side, and as many for a program as there are, up to a limit."""
    of_tile = min(triton.next_power_of_2(channels), CHANNELS) if last else 1
    at_a_time = TILE // of_tile
    steps = min(STEPS, triton.next_power_of_2(triton.cdiv(places, at_a_time)))
    spans = triton.cdiv(places, at_a_time * steps)
    return Plan(of_tile, at_a_time, steps, batch * triton.cdiv(channels, of_tile) * spans, spans)


def triton_forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute output, mean and rstd; weight and bias in float32."""
    batch, channels = x.shape[:2]
    places = x[0, 0].numel()
    shared = plan(batch, channels, places, last)
    tile = (*shared[:3], last)
    out, partial = torch.empty_like(x), x.new_empty(2, batch, shared.spans, channels, dtype=torch.float32)
    mean = x.new_empty(batch, groups, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    with torch.cuda.device_of(x):
        moments_kernel[(shared.programs,)](x, *partial.unbind(), channels, places, *tile)
        group_moments_kernel[(batch * groups,)](
            *(*partial.unbind(), mean, rstd, channels, places, groups, shared.spans, eps),
            *(shared.places * shared.steps, triton.next_power_of_2(channels // groups), SPANS),
        )
        # Where none is given, nothing reads the pointer.
        silu_kernel[(shared.programs,)](
            *(x, mean, rstd, mean if weight is None else weight, mean if bias is None else bias, out),
            *(channels, places, groups, weight is not None, bias is not None, *tile),
        )
    return out, mean, rstd


def triton_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient at x, and those at weight and bias in float32."""
    batch, channels = x.shape[:2]
    groups, places = mean.shape[1], x[0, 0].numel()
    shared = plan(batch, channels, places, last)
    tile = (*shared[:3], last)
    out, partial = torch.empty_like(x), x.new_empty(2, batch, shared.spans, channels, dtype=torch.float32)
    sums, means = x.new_empty(2, batch, channels, dtype=torch.float32), mean.new_empty(2, batch, groups)
    weight_or_any, bias_or_any = mean if weight is None else weight, mean if bias is None else bias
    given = (weight is not None, bias is not None)
    with torch.cuda.device_of(x):
        gradient_sums_kernel[(shared.programs,)](
            *(grad, x, mean, rstd, weight_or_any, bias_or_any, *partial.unbind(), channels, places, groups),
            *(*given, *tile),
        )
        group_gradients_kernel[(batch * groups,)](
            *(*partial.unbind(), weight_or_any, *sums.unbind(), *means.unbind()),
            *(channels, places, groups, shared.spans),
            *(given[0], triton.next_power_of_2(channels // groups), SPANS),
        )
        gradient_kernel[(shared.programs,)](
            *(grad, x, mean, rstd, weight_or_any, bias_or_any, *means.unbind(), out, channels, places, groups),
            *(*given, *tile),
        )
    return out, sums[1].sum(dim=0), sums[0].sum(dim=0)
