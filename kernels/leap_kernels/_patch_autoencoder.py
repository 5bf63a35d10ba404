"""Diffusers' autoencoder of images: residual blocks, and the last norms of its encoder and decoder.

Written for diffusers 0.42.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._patch_parts import bare, own_forward
from ._patch_rules import Function, Rule
from .group_norm_silu import group_norm_silu


def _fits(norm: Any, activation: Any) -> bool:
    """Say whether `group_norm_silu` is what a norm and an activation compute."""
    return type(norm) is nn.GroupNorm and type(activation) is nn.SiLU and bare(norm) and bare(activation)


def _activated(norm: Any, activation: Any, x: Tensor) -> Tensor:
    if not _fits(norm, activation):
        return activation(norm(x))
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def resnet_block(
    self: Any, input_tensor: Tensor, temb: Tensor | None = None, *arguments: Any, **options: Any
) -> Tensor:
    if temb is not None or arguments or options:
        return own_forward(self, input_tensor, temb, *arguments, **options)
    hidden = self.conv1(_activated(self.norm1, self.nonlinearity, input_tensor))
    hidden = self.conv2(self.dropout(_activated(self.norm2, self.nonlinearity, hidden)))
    if self.conv_shortcut is not None:
        # As diffusers, for the strides of gradients between processes.
        input_tensor = self.conv_shortcut(input_tensor.contiguous() if self.training else input_tensor)
    out = input_tensor + hidden
    # Mostly one, and a pass over the images.
    return out if self.output_scale_factor == 1 else out / self.output_scale_factor


def _unless_resnet_fits(module: Any) -> str | None:
    if module.time_emb_proj is not None or module.time_embedding_norm == "scale_shift":
        return "it takes the time"
    if module.upsample is not None or module.downsample is not None:
        return "it resizes between norm and convolution"
    if not (_fits(module.norm1, module.nonlinearity) and _fits(module.norm2, module.nonlinearity)):
        return "it has no group norm and SiLU, or hooks are on them"
    return None


def encoder(self: Any, sample: Tensor) -> Tensor:
    sample = self.conv_in(_laid_out(sample))
    run = _runner(self)
    for block in self.down_blocks:
        sample = run(block, sample)
    sample = run(self.mid_block, sample)
    return _end(self, sample)


def decoder(self: Any, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
    if latent_embeds is not None:
        return own_forward(self, sample, latent_embeds)
    sample = self.conv_in(_laid_out(sample))
    run = _runner(self)
    sample = run(self.mid_block, sample, None)
    for block in self.up_blocks:
        sample = run(block, sample, None)
    return _end(self, sample)


def _laid_out(sample: Tensor) -> Tensor:
    """Return images with the channels of a place side by side, if they are on a CPU: convolutions keep that order, and
    take half the time in it. No GPU has been measured."""
    return sample.contiguous(memory_format=torch.channels_last) if sample.is_cpu else sample


def _end(self: Any, sample: Tensor) -> Tensor:
    out: Tensor = self.conv_out(_activated(self.conv_norm_out, self.conv_act, sample))
    return out.contiguous()


def _runner(module: Any) -> Function:
    """Return what runs a block: recomputed in the backward pass where that is switched on."""
    if torch.is_grad_enabled() and module.gradient_checkpointing:
        return module._gradient_checkpointing_func
    return lambda block, *arguments: block(*arguments)


def _unless_end_fits(module: Any) -> str | None:
    if _fits(module.conv_norm_out, module.conv_act):
        return None
    return "it does not end in a group norm and SiLU, or hooks are on them"


_OPS = ("group_norm_silu",)

RULES = (
    Rule("ResnetBlock2D", "e3f38e1722955caf", _OPS, resnet_block, _unless_resnet_fits),
    Rule("Encoder", "cf4410532c9ebdd5", _OPS, encoder, _unless_end_fits),
    Rule("Decoder", "be96bf1aec1d895a", _OPS, decoder, _unless_end_fits),
)
