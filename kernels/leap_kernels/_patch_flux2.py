"""FLUX.2's transformer in diffusers. Its last norm is FLUX.1's.

Written for diffusers 0.42.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._patch_attention import Attend, halved, normed_and_turned, processor_sources, unless_normed
from ._patch_flux import attention
from ._patch_parts import empty, modulated, own_forward, unless_plain, with_residual, within_half
from ._patch_rules import Rule
from .swiglu import swiglu


def feed_forward_gate(self: Any, x: Tensor) -> Tensor:
    return own_forward(self, x) if empty(x) else swiglu(x)


def double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    image, text = hidden_states, encoder_hidden_states
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _vectors(temb_mod_img, 6)
    text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = _vectors(temb_mod_txt, 6)
    attended, text_attended = self.attn(
        hidden_states=modulated(self.norm1, image, shift, scale),
        encoder_hidden_states=modulated(self.norm1_context, text, text_shift, text_scale),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    image = with_residual(image, gate, attended)
    image = with_residual(image, mlp_gate, self.ff(modulated(self.norm2, image, mlp_shift, mlp_scale)))
    text = with_residual(text, text_gate, text_attended)
    forwarded = self.ff_context(modulated(self.norm2_context, text, text_mlp_shift, text_mlp_scale))
    return within_half(with_residual(text, text_mlp_gate, forwarded)), image


def single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Any:
    if encoder_hidden_states is not None:
        text_seq_len = encoder_hidden_states.shape[1]
        hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = _vectors(temb_mod, 3)
    attended = self.attn(
        hidden_states=modulated(self.norm, hidden_states, shift, scale),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    out = within_half(with_residual(hidden_states, gate, attended))
    return (out[:, :text_seq_len], out[:, text_seq_len:]) if split_hidden_states else out


def _vectors(modulation: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split modulation (B, count C) or (B, S, count C)."""
    return modulation.chunk(count, dim=-1)


def parallel_attention(
    attend: Attend,
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Any:
    """Attention and feed-forward side by side, of one projection."""
    if not attend.takes(self) or options:
        return own_forward(self, hidden_states, attention_mask, image_rotary_emb, **options)
    projected = self.to_qkv_mlp_proj(hidden_states)
    of_heads, of_mlp = 3 * self.inner_dim, self.mlp_hidden_dim * self.mlp_mult_factor
    width = projected.shape[-1] * of_heads // (of_heads + of_mlp)
    heads, forwarded = projected.split([width, projected.shape[-1] - width], dim=-1)
    query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in heads.chunk(3, dim=-1))
    tables = None if image_rotary_emb is None else halved(image_rotary_emb, query.device)
    query, key = normed_and_turned(self, query, key, None, tables)
    attended = attend(self, query, key, value, attention_mask)
    return self.to_out(torch.cat([attended, self.mlp_act_fn(forwarded)], dim=-1))


def _unless_joint(module: Any) -> str | None:
    return "it has no projections of a text" if module.added_kv_proj_dim is None else unless_normed(module)


_BLOCK = ("adaln_modulate", "gated_residual")

RULES = (
    Rule("Flux2SwiGLU", "0caf2addea5d5fce", ("swiglu",), feed_forward_gate),
    Rule(
        "Flux2Attention", "e0f4912938d3010e", ("qk_norm_rope",), attention, _unless_joint, processor_sources, Attend.of
    ),
    Rule(
        "Flux2ParallelSelfAttention",
        "f8eea2c87e43eb63",
        ("qk_norm_rope",),
        parallel_attention,
        unless_normed,
        processor_sources,
        Attend.of,
    ),
    Rule(
        "Flux2TransformerBlock",
        "b5d26783a67cbd6d",
        _BLOCK,
        double_block,
        unless_plain("norm1", "norm1_context", "norm2", "norm2_context"),
    ),
    Rule("Flux2SingleTransformerBlock", "e1baa440356a9b3a", _BLOCK, single_block, unless_plain("norm")),
)
