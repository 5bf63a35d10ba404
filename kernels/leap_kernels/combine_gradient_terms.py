"""Joins the direct and the nested gradient term of a leap into the cotangent of its velocity.

    s        = min(1, max_ratio * ||direct|| / ||nested||)     (B,)
    combined = coefficient * (direct + alpha * s * nested)     direct, nested: (B, ...); coefficient: (B,)

Norms are L2 over each sample. Without max_ratio, and where the nested term is zero, s is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import PerSample, check_latents, compute_dtype, expand, per_sample, rows
from ._dispatch import choose, only_reference, register

_OP = register("combine_gradient_terms", only_reference)


def reference(
    direct: Tensor, nested: Tensor, coefficient: Tensor, alpha: float, max_ratio: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine in plain PyTorch; `coefficient` (B,) sets the dtype of the arithmetic."""
    wide_direct, wide_nested = direct.to(coefficient.dtype), nested.to(coefficient.dtype)
    direct_norm = torch.linalg.vector_norm(rows(wide_direct), dim=1)
    nested_norm = torch.linalg.vector_norm(rows(wide_nested), dim=1)
    scale = torch.ones_like(direct_norm)
    if max_ratio is not None:
        ratio = max_ratio * direct_norm / nested_norm
        scale = torch.where(nested_norm == 0, scale, ratio.clamp(max=1))
    combined = expand(coefficient, direct) * (wide_direct + expand(alpha * scale, nested) * wide_nested)
    return combined.to(direct.dtype), direct_norm, nested_norm


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
        The combined term (B, ...) in the dtype of `direct`; `||direct||` and `||nested||`, each (B,), float32
        (float64 for float64 arithmetic).

    Raises:
        ValueError: on a wrong shape, dtype or device, an empty batch, or a negative `max_ratio`.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    check_latents("combine_gradient_terms", direct=direct, nested=nested)
    if max_ratio is not None and not max_ratio >= 0:
        raise ValueError(f"combine_gradient_terms needs max_ratio >= 0 or None, not {max_ratio}.")
    dtype = compute_dtype(direct, nested)
    per_row = per_sample("combine_gradient_terms", "coefficient", coefficient, direct, dtype)
    choose(_OP, direct, nested)
    return reference(direct, nested, per_row, alpha, max_ratio)
