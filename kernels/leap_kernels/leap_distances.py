"""How far the two leaps land from the real rollout.

    d_j   = mean |x_j   - (x_k - (sigma_k - sigma_j) * v_k)|       first leap, from k to j
    d_end = mean |x_end - (x_j - sigma_j * v_j)|                   second leap, from j to the image

All latents and velocities are (B, ...), the means run over each sample, d_j and d_end are (B,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import (
    PerSample,
    check_latents,
    compute_dtype,
    expand,
    per_sample,
    rows,
    sigma_difference,
)
from ._dispatch import choose, only_reference, register

_OP = register("leap_distances", only_reference)


def reference(
    x_k: Tensor, v_k: Tensor, x_j: Tensor, v_j: Tensor, x_end: Tensor, delta: Tensor, sigma_j: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute both distances in plain PyTorch; `delta = sigma_k - sigma_j` and `sigma_j` are (B,)."""
    x_k, v_k, x_j, v_j, x_end = (tensor.to(delta.dtype) for tensor in (x_k, v_k, x_j, v_j, x_end))
    first = x_j - (x_k - expand(delta, x_k) * v_k)
    second = x_end - (x_j - expand(sigma_j, x_j) * v_j)
    return rows(first.abs()).mean(dim=1), rows(second.abs()).mean(dim=1)


@torch.no_grad()
def leap_distances(
    x_k: Tensor,
    v_k: Tensor,
    x_j: Tensor,
    v_j: Tensor,
    x_end: Tensor,
    sigma_k: PerSample,
    sigma_j: PerSample,
) -> tuple[Tensor, Tensor]:
    """Measure `d_j = mean |x_j - xhat_j|` and `d_end = mean |x_end - xhat_end|` for each sample.

    `xhat_j = x_k - (sigma_k - sigma_j) v_k` and `xhat_end = x_j - sigma_j v_j`. No gradient passes.
    Arithmetic is float32 (float64 if a tensor is float64). Any strides are taken.

    Args:
        x_k: latents (B, ...) at the start of the first leap; float32, bfloat16, float16 or float64, like all.
        v_k: velocity there, shape of `x_k`.
        x_j: latents where the first leap should land and the second starts, shape of `x_k`.
        v_j: velocity there, shape of `x_k`.
        x_end: the generated latents, shape of `x_k`.
        sigma_k: noise level at k; a number, or a tensor () or (B,).
        sigma_j: noise level at j; likewise.

    Returns:
        `d_j` and `d_end`, each (B,), float32 (float64 for float64 arithmetic).

    Raises:
        ValueError: on a wrong shape, dtype or device, or an empty batch.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    tensors = (x_k, v_k, x_j, v_j, x_end)
    check_latents("leap_distances", x_k=x_k, v_k=v_k, x_j=x_j, v_j=v_j, x_end=x_end)
    dtype = compute_dtype(*tensors)
    delta = sigma_difference("leap_distances", ("sigma_k", "sigma_j"), sigma_k, sigma_j, x_k, dtype)
    choose(_OP, *tensors)
    return reference(*tensors, delta, per_sample("leap_distances", "sigma_j", sigma_j, x_k, dtype))
