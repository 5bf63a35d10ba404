"""Stable Diffusion 3's transformer in diffusers, where queries and keys are normed, as in 3.5. Its other norms and its
feed-forwards are those of FLUX.1.

Written for diffusers 0.42.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ._patch_attention import Attend, processor_sources, unless_normed, without_norms
from ._patch_feed_forward import forwarded
from ._patch_linear import several
from ._patch_parts import empty, modulated, own_forward, unless_plain, with_residual
from ._patch_rules import Rule
from .qk_norm_rope import QK, qk_norm_rope


def ada_layer_norm_zero_x(self: Any, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
    shift, scale, gate, *of_mlp, shift2, scale2, gate2 = self.linear(self.silu(emb)).chunk(9, dim=1)
    first, second = (modulated(self.norm, hidden_states, *pair) for pair in ((shift, scale), (shift2, scale2)))
    return first, gate, *of_mlp, second, gate2


def joint_attention(
    attend: Attend,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Any:
    if not attend.takes(self) or options or attention_mask is not None or empty(encoder_hidden_states):
        return own_forward(self, hidden_states, encoder_hidden_states, attention_mask, **options)
    query, key, value = (
        part.unflatten(-1, (self.heads, -1)) for part in several(hidden_states, self.to_q, self.to_k, self.to_v)
    )
    weights, eps = (self.norm_q.weight, self.norm_k.weight), self.norm_q.eps
    if encoder_hidden_states is None:
        query, key = qk_norm_rope(query, key, *weights, eps=eps)
    else:
        added = several(encoder_hidden_states, self.add_q_proj, self.add_k_proj, self.add_v_proj)
        of_text = [part.unflatten(-1, (self.heads, -1)) for part in added]
        added_weights = self.norm_added_q.weight, self.norm_added_k.weight
        image = QK(query, key, *weights)
        query, key = qk_norm_rope(of_text[0], of_text[1], *added_weights, eps=eps, before=image)
        value = torch.cat([value, of_text[2]], dim=1)
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    out = functional.scaled_dot_product_attention(query, key, value)
    out = out.transpose(1, 2).flatten(2, 3)
    attended = self.to_out[1](self.to_out[0](out[:, : hidden_states.shape[1]]))
    if encoder_hidden_states is None:
        return attended
    text = out[:, hidden_states.shape[1] :]
    return attended, text if self.context_pre_only else self.to_add_out(text)


def joint_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    if self._chunk_size is not None:
        return own_forward(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    options, image, text = joint_attention_kwargs or {}, hidden_states, encoder_hidden_states
    normed, gate, mlp_shift, mlp_scale, mlp_gate, *of_second = self.norm1(image, emb=temb)
    if self.context_pre_only:
        text_normed = self.norm1_context(text, temb)
    else:
        text_normed, text_gate, text_shift, text_scale, text_mlp_gate = self.norm1_context(text, emb=temb)
    attended, text_attended = self.attn(hidden_states=normed, encoder_hidden_states=text_normed, **options)
    image = with_residual(image, gate, attended)
    if self.use_dual_attention:
        normed, gate = of_second
        image = with_residual(image, gate, self.attn2(hidden_states=normed, **options))
    image = with_residual(image, mlp_gate, forwarded(self.ff, self.norm2, image, mlp_shift, mlp_scale))
    if self.context_pre_only:
        return None, image
    text = with_residual(text, text_gate, text_attended)
    of_text = forwarded(self.ff_context, self.norm2_context, text, text_shift, text_scale)
    return with_residual(text, text_mlp_gate, of_text), image


RULES = (
    Rule("SD35AdaLayerNormZeroX", "447682c6b939c97a", ("adaln_modulate",), ada_layer_norm_zero_x, unless_plain("norm")),
    Rule(
        "Attention",
        "d6236d8fc00b8541",
        ("qk_norm_rope",),
        joint_attention,
        unless_normed,
        processor_sources,
        Attend.of,
        lambda module: type(module.processor).__name__ == "JointAttnProcessor2_0",
        without_norms,
    ),
    Rule(
        "JointTransformerBlock",
        "9dd8f9decdd27284",
        ("adaln_modulate", "gated_residual"),
        joint_block,
        unless_plain("norm2", "norm2_context"),
    ),
)
