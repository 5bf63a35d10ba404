"""How far the two leaps land from the real rollout.

    d_j   = mean |x_j   - (x_k - (sigma_k - sigma_j) * v_k)|       first leap, from k to j
    d_end = mean |x_end - (x_j - sigma_j * v_j)|                   second leap, from j to the image

All latents and velocities are (B, ...), the means run over each sample, d_j and d_end are (B,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._arguments import PerSample, check_latents, compute_dtype, expand, per_sample, rows, sigma_difference, size
from ._dispatch import choose, register, unsupported
from ._library import define
from ._triton import block_of_sample, jit, tl, triton

# ---- reference ---------------------------------------------------------------------------------------------


def reference(
    x_k: Tensor, v_k: Tensor, x_j: Tensor, v_j: Tensor, x_end: Tensor, delta: Tensor, sigma_j: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute both distances in plain PyTorch; `delta = sigma_k - sigma_j` and `sigma_j` are (B,)."""
    x_k, v_k, x_j, v_j, x_end = (tensor.to(delta.dtype) for tensor in (x_k, v_k, x_j, v_j, x_end))
    first = x_j - (x_k - expand(delta, x_k) * v_k)
    second = x_end - (x_j - expand(sigma_j, x_j) * v_j)
    return rows(first.abs()).mean(dim=1), rows(second.abs()).mean(dim=1)


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK = 1024


@jit
def distances_kernel(  # type: ignore[no-untyped-def]
    x_k_ptr,
    v_k_ptr,
    x_j_ptr,
    v_j_ptr,
    x_end_ptr,
    delta_ptr,
    sigma_j_ptr,
    first_ptr,
    second_ptr,
    per_sample,
    blocks,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample, at, inside = block_of_sample(per_sample, blocks, BLOCK)
    x_k = tl.load(x_k_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v_k = tl.load(v_k_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x_j = tl.load(x_j_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v_j = tl.load(v_j_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x_end = tl.load(x_end_ptr + at, mask=inside, other=0.0).to(tl.float32)
    first = x_j - (x_k - tl.load(delta_ptr + sample) * v_k)
    second = x_end - (x_j - tl.load(sigma_j_ptr + sample) * v_j)
    # Masked lanes hold 0 - 0 and add nothing. Each block owns its sums: no atomics, one order.
    tl.store(first_ptr + program, tl.sum(tl.abs(first)))
    tl.store(second_ptr + program, tl.sum(tl.abs(second)))


def triton_forward(
    x_k: Tensor, v_k: Tensor, x_j: Tensor, v_j: Tensor, x_end: Tensor, delta: Tensor, sigma_j: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute both distances with Triton; arguments as for `reference`."""
    tensors = [tensor.contiguous() for tensor in (x_k, v_k, x_j, v_j, x_end)]
    batch, per_sample = size(x_k)
    blocks = triton.cdiv(per_sample, BLOCK)
    first, second = torch.empty(2, batch, blocks, dtype=torch.float32, device=x_k.device)
    with torch.cuda.device_of(x_k):
        distances_kernel[(batch * blocks,)](*tensors, delta, sigma_j, first, second, per_sample, blocks, BLOCK)
    return first.sum(dim=1) / per_sample, second.sum(dim=1) / per_sample


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_forward(
    x_k: Tensor, v_k: Tensor, x_j: Tensor, v_j: Tensor, x_end: Tensor, delta: Tensor, sigma_j: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute both distances with native/leap_update.cpp; arguments as for `reference`."""
    tensors = [tensor.contiguous() for tensor in (x_k, v_k, x_j, v_j, x_end)]
    first, second = torch.empty_like(delta), torch.empty_like(delta)
    _native.call("leap_distances", *tensors, delta, sigma_j, first, second, *size(x_k), x_k.dtype, v_k.dtype)
    return first, second


# ---- dispatch ----------------------------------------------------------------------------------------------


def eligible(backend: str, *tensors: Tensor) -> str | None:
    """Say why `backend` cannot take x_k, v_k, x_j, v_j and x_end, or return None if it can."""
    latents, velocities = {x.dtype for x in tensors[::2]}, {v.dtype for v in tensors[1::2]}
    if backend == "native" and (len(latents) > 1 or len(velocities) > 1):
        return "native code needs latents of one dtype and velocities of one dtype"
    return unsupported(backend, *tensors)


_OP = register("leap_distances", eligible)
_FORWARD = {"triton": triton_forward, "native": native_forward, "reference": reference}


def _run(
    x_k: Tensor, v_k: Tensor, x_j: Tensor, v_j: Tensor, x_end: Tensor, delta: Tensor, sigma_j: Tensor
) -> tuple[Tensor, Tensor]:
    tensors = (x_k, v_k, x_j, v_j, x_end)
    return _FORWARD[choose(_OP, *tensors)](*tensors, delta, sigma_j)


def _fake(
    x_k: Tensor, v_k: Tensor, x_j: Tensor, v_j: Tensor, x_end: Tensor, delta: Tensor, sigma_j: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(delta), torch.empty_like(delta)


_distances = define(
    "leap_distances(Tensor x_k, Tensor v_k, Tensor x_j, Tensor v_j, Tensor x_end, Tensor delta, Tensor sigma_j)"
    " -> (Tensor, Tensor)",
    _run,
    _fake,
    unit="sample",
)


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
    first, second = _distances(*tensors, delta, per_sample("leap_distances", "sigma_j", sigma_j, x_k, dtype))
    return first, second
