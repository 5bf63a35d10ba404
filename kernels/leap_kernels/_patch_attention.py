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

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
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


def unless_normed(module: Any) -> str | None:
    """Say why `qk_norm_rope` does not norm the queries and keys of a module, or return None."""
    if module.norm_q is None or module.norm_k is None:
        return "its queries and keys are not normed"
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
    module: Any, query: Tensor, key: Tensor, before: list[Tensor] | None, rotary: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Norm queries and keys, behind those of a text `before`, if any, and turn them by diffusers' tables (S, D)."""
    cos, sin = (None, None) if rotary is None else halved(rotary, query.device)
    weights = module.norm_q.weight, module.norm_k.weight
    first = None if before is None else QK(before[0], before[1], module.norm_added_q.weight, module.norm_added_k.weight)
    return qk_norm_rope(query, key, *weights, cos, sin, module.norm_q.eps, before=first)


_last: tuple[weakref.ref[Tensor], tuple[Tensor, Tensor]] | None = None


def halved(rotary: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tables (S, D/2) of tables (S, D) that hold each number twice: once for all blocks, which share them."""
    global _last
    cos, sin = rotary
    if torch.compiler.is_compiling():
        return cos[:, ::2].to(device).contiguous(), sin[:, ::2].to(device).contiguous()
    kept = _last
    if kept is not None and kept[0]() is cos and kept[1][0].device == device:
        return kept[1]
    tables = cos[:, ::2].to(device).contiguous(), sin[:, ::2].to(device).contiguous()
    if not torch.is_inference_mode_enabled():
        _last = weakref.ref(cos), tables
    return tables
