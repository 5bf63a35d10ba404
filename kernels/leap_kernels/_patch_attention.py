"""What patched attention has in common: norms and rotary embedding in one op, and the module's own attention kernel."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._patch_parts import bare
from .qk_norm_rope import QK, qk_norm_rope

_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


class Attend(NamedTuple):
    """The attention of a processor: whether it is still a module's, and the kernel that it would call."""

    processor: type
    norm: type
    dispatch: Callable[..., Tensor] | None
    """Diffusers' choice of a kernel, where the processor has one."""

    @classmethod
    def of(cls, module: Any) -> tuple[Attend]:
        processor = type(module.processor)
        dispatch = processor.__call__.__globals__.get("dispatch_attention_fn")
        return (cls(processor, type(module.norm_q), dispatch),)

    def takes(self, module: Any) -> bool:
        """Say whether the processor and the norms are those of when the module was patched."""
        if type(module.processor) is not self.processor:
            return False
        return all(type(norm) is self.norm and bare(norm) for norm in _norms(module))

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Return the attention (B, S, H D) of queries, keys and values (B, S, H, D)."""
        assert self.dispatch is not None
        processor = module.processor
        out = self.dispatch(
            query,
            key,
            value,
            attn_mask=mask,
            backend=processor._attention_backend,
            parallel_config=processor._parallel_config,
        )
        return out.flatten(2, 3).to(query.dtype)


def _norms(module: Any) -> list[Any]:
    return [norm for name in _NORMS if (norm := getattr(module, name, None)) is not None]


def processor_sources(module: Any) -> tuple[Callable[..., Any], ...]:
    """Return what a rule replaces of an attention module: its `forward`, its processor, and what that calls to turn
    and to norm."""
    call = type(module.processor).__call__
    code, known = getattr(call, "__code__", None), getattr(call, "__globals__", {})
    turning = [known[name] for name in code.co_names if name.startswith("apply_rotary_emb")] if code else []
    norm = type(module.norm_q)
    # PyTorch's own norm is what its documentation says.
    norming = [] if norm.__module__.startswith("torch.") or module.norm_q is None else [norm.forward]
    return type(module).forward, call, *turning, *norming


def without_norms(module: Any) -> str | None:
    """Say that a module does not norm queries and keys, so that there is less source than a rule knows, or None."""
    return "its queries and keys are not normed" if module.norm_q is None or module.norm_k is None else None


def unless_normed(module: Any) -> str | None:
    """Say why `qk_norm_rope` does not norm the queries and keys of a module, or return None."""
    if module.norm_q is None or module.norm_k is None:
        return without_norms(module)
    if getattr(module, "fused_projections", False):
        return "its projections are fused"
    norms = _norms(module)
    for norm in norms:
        weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        if type(norm).__name__ != "RMSNorm" or bias is not None or (weight is not None and weight.ndim != 1):
            return "queries and keys are not normed by a root mean square over each head"
        if not bare(norm):
            return "hooks are on its norms"
    if norms[0].eps is None or any(norm.eps != norms[0].eps for norm in norms):
        return "its norms have no eps, or several"
    return None


def normed_and_turned(
    module: Any, query: Tensor, key: Tensor, before: list[Tensor] | None, tables: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Norm queries and keys, behind those of a text `before`, if any, and turn them by tables of `halved`."""
    cos, sin = (None, None) if tables is None else tables
    weights = module.norm_q.weight, module.norm_k.weight
    first = None if before is None else QK(before[0], before[1], module.norm_added_q.weight, module.norm_added_k.weight)
    return qk_norm_rope(query, key, *weights, cos, sin, module.norm_q.eps, before=first)


def halved(rotary: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tables (S, D/2) of tables (S, D) that hold each number twice."""
    return _shared(lambda cos, sin: (cos[:, ::2], sin[:, ::2]), rotary, device)


def of_complex(rotary: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tables (S, D/2) or (B, S, D/2) of complex ones, of which there may be several behind each other."""
    return _shared(_parts, rotary, device)


def _parts(*tables: Tensor) -> tuple[Tensor, Tensor]:
    joined = tables[0] if len(tables) == 1 else torch.cat(tables, dim=-2)
    return joined.real, joined.imag


class _Tables(NamedTuple):
    """Tables that were made of a tensor and others, and are kept at that tensor."""

    others: list[weakref.ref[Tensor]]
    tables: tuple[Tensor, Tensor]


def _shared(
    make: Callable[..., tuple[Tensor, Tensor]], sources: tuple[Tensor, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the contiguous tables that are made of `sources`, once for all blocks, which save them for gradients.

    They are kept at the first of the sources, so that a block that is recomputed finds them, as it has to.
    """
    kept = None if torch.compiler.is_compiling() else getattr(sources[0], "leap_kernels_tables", None)
    if kept is not None and kept.tables[0].device == device and _are(kept.others, sources[1:]):
        return kept.tables
    cos, sin = (table.to(device).contiguous() for table in make(*sources))
    if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
        made: Any = sources[0]
        made.leap_kernels_tables = _Tables([weakref.ref(one) for one in sources[1:]], (cos, sin))
    return cos, sin


def _are(kept: list[weakref.ref[Tensor]], sources: tuple[Tensor, ...]) -> bool:
    return len(kept) == len(sources) and all(one() is source for one, source in zip(kept, sources, strict=True))
