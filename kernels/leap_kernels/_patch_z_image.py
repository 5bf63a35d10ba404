"""Z-Image's transformer in diffusers. Its blocks norm by a root mean square, for which there is no op.

Written for diffusers 0.42.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._patch_attention import Attend, normed_and_turned, of_complex, processor_sources, unless_normed
from ._patch_linear import several
from ._patch_parts import modulated, own_forward, unless_plain, with_residual
from ._patch_rules import Rule, of_forward
from .swiglu import swiglu


def attention(
    attend: Attend,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    freqs_cis: Tensor | None = None,
    **options: Any,
) -> Any:
    if not attend.takes(self) or options:
        options |= {"freqs_cis": freqs_cis}
        return own_forward(self, hidden_states, encoder_hidden_states, attention_mask, **options)
    query, key, value = (
        part.unflatten(-1, (self.heads, -1)) for part in several(hidden_states, self.to_q, self.to_k, self.to_v)
    )
    tables = None if freqs_cis is None else of_complex((freqs_cis,), query.device)
    query, key = normed_and_turned(self, query, key, None, tables)
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask[:, None, None, :]
    out = self.to_out[0](attend(self, query, key, value, attention_mask))
    return self.to_out[1](out) if len(self.to_out) > 1 else out


def feed_forward(self: Any, x: Tensor) -> Any:
    return self.w2(swiglu(self.w1(x), self.w3(x)))


def block(
    self: Any,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor | None,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Any:
    if noise_mask is not None:
        return own_forward(self, x, attn_mask, freqs_cis, adaln_input, noise_mask, adaln_noisy, adaln_clean)
    scale, gate, mlp_scale, mlp_gate = self.adaLN_modulation(adaln_input).unsqueeze(1).chunk(4, dim=2)
    normed = self.attention_norm1(x) * (1 + scale)
    attended = self.attention(normed, attention_mask=attn_mask, freqs_cis=freqs_cis)
    x = with_residual(x, gate.tanh(), self.attention_norm2(attended))
    forwarded = self.feed_forward(self.ffn_norm1(x) * (1 + mlp_scale))
    return with_residual(x, mlp_gate.tanh(), self.ffn_norm2(forwarded))


def _unless_modulated(module: Any) -> str | None:
    return None if module.modulation else "it has no modulation, and no gates"


def final_layer(
    self: Any,
    x: Tensor,
    c: Tensor | None = None,
    noise_mask: Tensor | None = None,
    c_noisy: Tensor | None = None,
    c_clean: Tensor | None = None,
) -> Any:
    if noise_mask is not None or c is None:
        return own_forward(self, x, c, noise_mask, c_noisy, c_clean)
    return self.linear(modulated(self.norm_final, x, None, self.adaLN_modulation(c)))


RULES = (
    Rule(
        "Attention",
        "4b8fbb8f72a64efb",
        ("qk_norm_rope",),
        attention,
        unless_normed,
        processor_sources,
        Attend.of,
        lambda module: type(module.processor).__name__ == "ZSingleStreamAttnProcessor",
    ),
    Rule(
        "FeedForward",
        "332a7163bc00ce0b",
        ("swiglu",),
        feed_forward,
        sources=lambda module: (*of_forward(module), type(module)._forward_silu_gating),
        applies=lambda module: hasattr(module, "_forward_silu_gating"),
    ),
    Rule("ZImageTransformerBlock", "0010ab78ad4019c9", ("gated_residual",), block, _unless_modulated),
    Rule(
        "FinalLayer",
        "3ff23ca1b52cbfde",
        ("adaln_modulate",),
        final_layer,
        unless_plain("norm_final"),
        applies=lambda module: hasattr(module, "norm_final"),
    ),
)
