"""Diffusers' feed-forward of two linear layers with a GELU between them, which most families have.

Written for diffusers 0.42.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._patch_linear import of_gelu, of_modulated
from ._patch_parts import bare, empty, modulated, own_forward
from ._patch_rules import Function, Rule, of_forward
from .gelu_tanh import gelu_tanh


def gelu(self: Any, hidden_states: Tensor) -> Tensor:
    return own_forward(self, hidden_states) if empty(hidden_states) else gelu_tanh(self.proj(hidden_states))


def _unless_tanh(module: Any) -> str | None:
    return None if module.approximate == "tanh" else "its GELU is not in the tanh form"


def feed_forward(self: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
    if arguments or options or empty(hidden_states) or _unless_of_gelu(self) is not None:
        return own_forward(self, hidden_states, *arguments, **options)
    return _second(self, self.net[0].proj(hidden_states))


def forwarded(self: Any, norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Any:
    """Return `self(modulated(norm, x, shift, scale))` for a feed-forward, patched or not."""
    if "forward" in self.__dict__ and bare(self) and not empty(x) and _unless_of_gelu(self) is None:
        return _second(self, of_modulated(self.net[0].proj, norm, x, shift, scale))
    return self(modulated(norm, x, shift, scale))


def _second(self: Any, projected: Tensor) -> Tensor:
    return of_gelu(self.net[2], projected)


def _begins_with_gelu(module: Any) -> bool:
    return hasattr(module, "net") and type(module.net[0]).__name__ == "GELU"


def _unless_of_gelu(module: Any) -> str | None:
    if _begins_with_gelu(module) and len(module.net) == 3:
        first, dropout, _ = module.net
        fits = first.approximate == "tanh" and type(dropout) is nn.Dropout and dropout.p == 0
        if fits and bare(first) and bare(dropout):
            return None
    return "it is more than a GELU in the tanh form and a layer, or hooks are on its parts"


def _sources(module: Any) -> tuple[Function, ...]:
    first = type(module.net[0])
    return *of_forward(module), first.forward, first.gelu


RULES = (
    Rule(
        "GELU",
        "fa064e5ee7f62ebb",
        ("gelu_tanh",),
        gelu,
        _unless_tanh,
        lambda module: (*of_forward(module), type(module).gelu),
        applies=lambda module: hasattr(module, "proj"),
    ),
    Rule(
        "FeedForward",
        "e6509ef808924e65",
        ("gelu_tanh",),
        feed_forward,
        _unless_of_gelu,
        _sources,
        applies=_begins_with_gelu,
    ),
)
