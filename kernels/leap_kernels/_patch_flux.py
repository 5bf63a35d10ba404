"""FLUX.1's transformer in diffusers, and the norms that other models have, too.

Written for diffusers 0.42.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._patch_attention import Attend, halved, normed_and_turned, processor_sources, unless_normed
from ._patch_feed_forward import RULES as FEED_FORWARD_RULES
from ._patch_feed_forward import forwarded
from ._patch_linear import of_gelu, several
from ._patch_parts import bare, empty, modulated, own_forward, unless_plain, with_residual, within_half
from ._patch_rules import Rule

# ---- norms ---------------------------------------------------------------------------------------


def ada_layer_norm_zero(
    self: Any,
    x: Tensor,
    timestep: Any = None,
    class_labels: Any = None,
    hidden_dtype: Any = None,
    emb: Tensor | None = None,
) -> tuple[Tensor, ...]:
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    shift, scale, gate, *of_mlp = self.linear(self.silu(emb)).chunk(6, dim=1)
    return modulated(self.norm, x, shift, scale), gate, *of_mlp


def ada_layer_norm_zero_single(self: Any, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    return modulated(self.norm, x, shift, scale), gate


def ada_layer_norm_continuous(self: Any, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return modulated(self.norm, x, shift, scale)


# ---- blocks --------------------------------------------------------------------------------------------------------


def attention(
    attend: Attend,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Any:
    """Attention of FLUX.1: over text and image with weights of their own, or over both already joined."""
    joint = encoder_hidden_states is not None
    own = options or self.fused_projections or empty(encoder_hidden_states)
    if own or not attend.takes(self) or joint == (self.added_kv_proj_dim is None):
        return own_forward(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **options)
    query, key, value = (
        part.unflatten(-1, (-1, self.head_dim)) for part in several(hidden_states, self.to_q, self.to_k, self.to_v)
    )
    before = None
    if encoder_hidden_states is not None:
        added = several(encoder_hidden_states, self.add_q_proj, self.add_k_proj, self.add_v_proj)
        *before, of_text = (part.unflatten(-1, (-1, self.head_dim)) for part in added)
        value = torch.cat([of_text, value], dim=1)
    tables = None if image_rotary_emb is None else halved(image_rotary_emb, query.device)
    query, key = normed_and_turned(self, query, key, before, tables)
    out = attend(self, query, key, value, attention_mask)
    if encoder_hidden_states is None:
        return out
    text, image = out.split_with_sizes([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
    return self.to_out[1](self.to_out[0](image.contiguous())), self.to_add_out(text.contiguous())


def double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    image, text = hidden_states, encoder_hidden_states
    normed, gate, mlp_shift, mlp_scale, mlp_gate = self.norm1(image, emb=temb)
    text_normed, text_gate, text_shift, text_scale, text_mlp_gate = self.norm1_context(text, emb=temb)
    attended, text_attended, *of_adapter = self.attn(
        hidden_states=normed,
        encoder_hidden_states=text_normed,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    image = with_residual(image, gate, attended)
    image = with_residual(image, mlp_gate, forwarded(self.ff, self.norm2, image, mlp_shift, mlp_scale))
    for more in of_adapter:
        image = image + more
    text = with_residual(text, text_gate, text_attended)
    of_text = forwarded(self.ff_context, self.norm2_context, text, text_shift, text_scale)
    return within_half(with_residual(text, text_mlp_gate, of_text)), image


def single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    length = encoder_hidden_states.shape[1]
    residual = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    normed, gate = self.norm(residual, emb=temb)
    projected = self.proj_mlp(normed)
    attended = self.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    if _unless_gelu(self) is None:
        both = of_gelu(self.proj_out, projected, beside=attended)
    else:
        both = self.proj_out(torch.cat([attended, self.act_mlp(projected)], dim=2))
    out = within_half(with_residual(residual, gate, both))
    text, image = out.split_with_sizes([length, out.shape[1] - length], dim=1)
    return text, image


def _unless_gelu(module: Any) -> str | None:
    act = module.act_mlp
    return (
        None
        if type(act) is nn.GELU and act.approximate == "tanh" and bare(act)
        else "its act_mlp is no GELU in the tanh form, or has hooks"
    )


RULES = (
    Rule("AdaLayerNormZero", "93374820c014f812", ("adaln_modulate",), ada_layer_norm_zero, unless_plain("norm")),
    Rule(
        "AdaLayerNormZeroSingle",
        "d48dfb2b1e75e64f",
        ("adaln_modulate",),
        ada_layer_norm_zero_single,
        unless_plain("norm"),
    ),
    Rule(
        "AdaLayerNormContinuous",
        "da3e50ebcd024fc2",
        ("adaln_modulate",),
        ada_layer_norm_continuous,
        unless_plain("norm"),
    ),
    *FEED_FORWARD_RULES,
    Rule(
        "FluxAttention", "1178aa0fee6536e6", ("qk_norm_rope",), attention, unless_normed, processor_sources, Attend.of
    ),
    Rule(
        "FluxTransformerBlock",
        "0b184cbe172708b6",
        ("adaln_modulate", "gated_residual"),
        double_block,
        unless_plain("norm2", "norm2_context"),
    ),
    Rule("FluxSingleTransformerBlock", "57350a6dab842b40", ("gelu_tanh", "gated_residual"), single_block, _unless_gelu),
)
