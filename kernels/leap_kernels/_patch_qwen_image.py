"""Qwen-Image's transformer in diffusers. Its last norm and its feed-forwards are those of FLUX.1.

Written for diffusers 0.42.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._patch_attention import Attend, normed_and_turned, of_complex, processor_sources, unless_normed
from ._patch_feed_forward import forwarded
from ._patch_linear import several
from ._patch_parts import modulated, own_forward, unless_plain, with_residual, within_half
from ._patch_rules import Rule, of_forward


def joint_attention(
    attend: Attend,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states_mask: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Any:
    if not attend.takes(self) or options or encoder_hidden_states is None or attention_mask is not None:
        own = {"encoder_hidden_states_mask": encoder_hidden_states_mask, "image_rotary_emb": image_rotary_emb}
        return own_forward(self, hidden_states, encoder_hidden_states, attention_mask, **own, **options)
    if encoder_hidden_states_mask is not None:
        of_image = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
        attention_mask = torch.cat([encoder_hidden_states_mask, of_image], dim=1)[:, None, None, :]
    width, length = self.inner_dim // self.heads, encoder_hidden_states.shape[1]
    projected = several(hidden_states, self.to_q, self.to_k, self.to_v)
    query, key, value = (part.unflatten(-1, (-1, width)) for part in projected)
    added = several(encoder_hidden_states, self.add_q_proj, self.add_k_proj, self.add_v_proj)
    *before, of_text = (part.unflatten(-1, (-1, width)) for part in added)
    # Of the image first; tokens stand the other way round.
    tables = None if image_rotary_emb is None else of_complex(image_rotary_emb[::-1], query.device)
    query, key = normed_and_turned(self, query, key, before, tables)
    out = attend(self, query, key, torch.cat([of_text, value], dim=1), attention_mask)
    image = self.to_out[0](out[:, length:].contiguous())
    if len(self.to_out) > 1:
        image = self.to_out[1](image)
    return image, self.to_add_out(out[:, :length].contiguous())


def block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Any = None,
) -> Any:
    image, text, mask, rotary = hidden_states, encoder_hidden_states, encoder_hidden_states_mask, image_rotary_emb
    if self.zero_cond_t or modulate_index is not None:
        return own_forward(self, image, text, mask, temb, rotary, joint_attention_kwargs, modulate_index)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.img_mod(temb).chunk(6, dim=-1)
    text_shift, text_scale, text_gate, text_mlp_shift, text_mlp_scale, text_mlp_gate = self.txt_mod(temb).chunk(
        6, dim=-1
    )
    attended, text_attended = self.attn(
        hidden_states=modulated(self.img_norm1, image, shift, scale),
        encoder_hidden_states=modulated(self.txt_norm1, text, text_shift, text_scale),
        encoder_hidden_states_mask=mask,
        image_rotary_emb=rotary,
        **(joint_attention_kwargs or {}),
    )
    image = with_residual(image, gate, attended)
    text = with_residual(text, text_gate, text_attended)
    image = with_residual(image, mlp_gate, forwarded(self.img_mlp, self.img_norm2, image, mlp_shift, mlp_scale))
    of_text = forwarded(self.txt_mlp, self.txt_norm2, text, text_mlp_shift, text_mlp_scale)
    return within_half(with_residual(text, text_mlp_gate, of_text)), within_half(image)


RULES = (
    Rule(
        "Attention",
        "5f314f6060e6f943",
        ("qk_norm_rope",),
        joint_attention,
        unless_normed,
        processor_sources,
        Attend.of,
        lambda module: type(module.processor).__name__ == "QwenDoubleStreamAttnProcessor2_0",
    ),
    Rule(
        "QwenImageTransformerBlock",
        "1ca81049fe8461ee",
        ("adaln_modulate", "gated_residual"),
        block,
        unless_plain("img_norm1", "img_norm2", "txt_norm1", "txt_norm2"),
        lambda module: (*of_forward(module), type(module)._modulate),
    ),
)
