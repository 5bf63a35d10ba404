"""Joins the direct and the nested gradient term of a leap into the cotangent of its velocity.

    s        = min(1, max_ratio * ||direct|| / ||nested||)     (B,)
    combined = coefficient * (direct + alpha * s * nested)     direct, nested: (B, ...); coefficient: (B,)

Norms are L2 over each sample, of any magnitude. Without max_ratio, and where the nested term is zero, s is 1.

Without max_ratio, one pass reads both terms, writes the result, and gathers the norms on the way. With it nothing
can be written before the norms are known, so the terms are read twice. The native code does this a few samples at a
time, and finds them in the caches again; on a GPU the second pass comes from memory unless both terms fit into its
L2 cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from ._arguments import PerSample, check_latents, compute_dtype, expand, per_sample, rows, size
from ._dispatch import choose, register, unsupported
from ._library import define
from ._triton import block_of_sample, jit, tl, triton

# ---- reference ---------------------------------------------------------------------------------------------


def reference(
    direct: Tensor, nested: Tensor, coefficient: Tensor, alpha: float, max_ratio: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine in plain PyTorch; `coefficient` (B,) sets the dtype of the arithmetic."""
    wide_direct, wide_nested = direct.to(coefficient.dtype), nested.to(coefficient.dtype)
    direct_norm, nested_norm = _norm(rows(wide_direct)), _norm(rows(wide_nested))
    share = _share(direct_norm, nested_norm, alpha, max_ratio)
    combined = expand(coefficient, direct) * (wide_direct + expand(share, nested) * wide_nested)
    return combined.to(direct.dtype).contiguous(), direct_norm, nested_norm


def _norm(values: Tensor) -> Tensor:
    """Return the norm of each row (B, n), in units of a power of two near its largest magnitude: squares overflow."""
    peak = values.abs().amax(dim=1)
    unit = torch.where(peak.isfinite() & (peak > 0), torch.frexp(peak).exponent, 0)[:, None]
    return torch.ldexp(torch.linalg.vector_norm(torch.ldexp(values, -unit), dim=1), unit[:, 0])


def _share(direct_norm: Tensor, nested_norm: Tensor, alpha: float, max_ratio: float | None) -> Tensor:
    """Return `alpha * s` (B,)."""
    if max_ratio is None:
        return torch.full_like(direct_norm, alpha)
    ratio = max_ratio * direct_norm / nested_norm
    return alpha * torch.where(nested_norm == 0, 1, ratio.clamp(max=1))


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK = 1024


@jit
def _norm_of_block(values):  # type: ignore[no-untyped-def]
    """Return the norm, as `_norm` computes it."""
    exponent = tl.max(tl.abs(values)).to(tl.int32, bitcast=True) & 0x7F800000
    # Of 0, infinity and NaN, and where the inverse would be subnormal, there is no power of two to divide by.
    usable = (exponent > 0) & (exponent < 0x7E800000)
    unit = tl.where(usable, exponent, 0x3F800000).to(tl.float32, bitcast=True)
    values *= 1.0 / unit
    return tl.sqrt(tl.sum(values * values)) * unit


@jit
def combine_kernel(  # type: ignore[no-untyped-def]
    direct_ptr,
    nested_ptr,
    coefficient_ptr,
    share_ptr,
    out_ptr,
    direct_norm_ptr,
    nested_norm_ptr,
    per_sample,
    blocks,
    NORMS: tl.constexpr,
    OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample, at, inside = block_of_sample(per_sample, blocks, BLOCK)
    direct = tl.load(direct_ptr + at, mask=inside, other=0.0).to(tl.float32)
    nested = tl.load(nested_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        # Masked lanes are 0. Each block owns its sums: no atomics, one order.
        tl.store(direct_norm_ptr + program, _norm_of_block(direct))
        tl.store(nested_norm_ptr + program, _norm_of_block(nested))
    if OUT:
        combined = tl.load(coefficient_ptr + sample) * (direct + tl.load(share_ptr + sample) * nested)
        tl.store(out_ptr + at, combined.to(out_ptr.dtype.element_ty), mask=inside)


def triton_forward(
    direct: Tensor, nested: Tensor, coefficient: Tensor, alpha: float, max_ratio: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine with Triton; arguments as for `reference`."""
    direct, nested = direct.contiguous(), nested.contiguous()
    batch, per_sample = size(direct)
    blocks = triton.cdiv(per_sample, BLOCK)
    out = torch.empty_like(direct)
    norms_of_blocks = torch.empty(2, batch, blocks, dtype=torch.float32, device=direct.device)

    def launch(share: Tensor, norms: bool, write: bool) -> None:
        combine_kernel[(batch * blocks,)](
            direct, nested, coefficient, share, out, *norms_of_blocks, per_sample, blocks, norms, write, BLOCK
        )

    with torch.cuda.device_of(direct):
        # The norms-only pass reads no share: any tensor will do.
        once = max_ratio is None
        launch(torch.full_like(coefficient, alpha) if once else coefficient, norms=True, write=once)
        direct_norm, nested_norm = (
            torch.linalg.vector_norm(norms, dim=1, dtype=torch.float64).float() for norms in norms_of_blocks
        )
        if not once:
            launch(_share(direct_norm, nested_norm, alpha, max_ratio), norms=False, write=True)
    return out, direct_norm, nested_norm


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_forward(
    direct: Tensor, nested: Tensor, coefficient: Tensor, alpha: float, max_ratio: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine with native/combine.cpp; arguments as for `reference`."""
    direct, nested = direct.contiguous(), nested.contiguous()
    out = torch.empty_like(direct)
    norms = torch.empty_like(coefficient), torch.empty_like(coefficient)
    limit = -1.0 if max_ratio is None else max_ratio
    _native.call(
        "leap_combine",
        direct,
        nested,
        coefficient,
        alpha,
        limit,
        out,
        *norms,
        *size(direct),
        direct.dtype,
        nested.dtype,
    )
    return out, *norms


# ---- dispatch ----------------------------------------------------------------------------------------------

_OP = register("combine_gradient_terms", unsupported)
_FORWARD = {"triton": triton_forward, "native": native_forward, "reference": reference}


def _run(
    direct: Tensor, nested: Tensor, coefficient: Tensor, alpha: float, max_ratio: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _FORWARD[choose(_OP, direct, nested)](direct, nested, coefficient, alpha, max_ratio)


def _fake(
    direct: Tensor, nested: Tensor, coefficient: Tensor, alpha: float, max_ratio: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    combined = torch.empty_like(direct, memory_format=torch.contiguous_format)
    return combined, torch.empty_like(coefficient), torch.empty_like(coefficient)


_combine = define(
    "combine_gradient_terms(Tensor direct, Tensor nested, Tensor coefficient, float alpha, float? max_ratio)"
    " -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    unit="sample",
)


@torch.no_grad()
def combine_gradient_terms(
    direct: Tensor,
    nested: Tensor,
    coefficient: PerSample,
    alpha: float,
    max_ratio: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `coefficient * (direct + alpha * s * nested)` and the norms of both terms, without gradients.

    `s = min(1, max_ratio * ||direct|| / ||nested||)` per sample caps the nested term; it is 1 where
    `max_ratio` is None (the paper) or the nested term is zero. Arithmetic is float32 (float64 if a tensor is
    float64). Any strides are taken.

    Args:
        direct: gradient at the latents (B, ...), float32, bfloat16, float16 or float64.
        nested: what came back through the later velocity, shape of `direct`.
        coefficient: derivative of the leap's end with respect to its velocity; a number, or a tensor () or
            (B,).
        alpha: discount of the nested term.
        max_ratio: the largest norm of the nested term, before `alpha`, in units of the direct one; None for
            no limit.

    Returns:
        The combined term (B, ...), contiguous and of the dtype of `direct`; `||direct||` and `||nested||`, each
        (B,), float32 (float64 for float64 arithmetic).

    Raises:
        ValueError: on a wrong shape, dtype or device, an empty batch, or a negative `max_ratio`.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    check_latents("combine_gradient_terms", direct=direct, nested=nested)
    if max_ratio is not None and not max_ratio >= 0:
        raise ValueError(f"combine_gradient_terms needs max_ratio >= 0 or None, not {max_ratio}.")
    dtype = compute_dtype(direct, nested)
    per_row = per_sample("combine_gradient_terms", "coefficient", coefficient, direct, dtype)
    combined, direct_norm, nested_norm = _combine(direct, nested, per_row, alpha, max_ratio)
    return combined, direct_norm, nested_norm
