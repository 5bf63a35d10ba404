"""Selective activation checkpointing of diffusers' models, block by block, without changing them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from leapalign.config import MemoryConfig
from leapalign.inputs.validation import UserError

_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
"""What PyTorch's attention runs as. Other libraries' kernels are recomputed with their block."""


def prepare_model(transformer: nn.Module, decoder: nn.Module | None, config: MemoryConfig) -> None:
    """Has ``transformer``, and ``decoder``, recompute what ``config`` says. Raises UserError where one cannot."""
    if config.checkpointing != "none":
        checkpoint_blocks(transformer, config.checkpointing == "attention", config.checkpoint_every)
    prepare_decoder(decoder, config)


def prepare_decoder(decoder: nn.Module | None, config: MemoryConfig) -> None:
    """Has ``decoder`` recompute where ``config`` says so. Raises UserError where it cannot."""
    if config.checkpoint_decoder and decoder is not None:
        checkpoint_resnets(decoder)


def checkpoint_blocks(model: Any, keep_attention: bool = False, every: int = 1) -> None:
    """Has ``model`` recompute blocks in its backward pass: the same gradients from less memory.

    Of the blocks in the order they run, every ``every``-th is recomputed from its inputs, or with ``keep_attention``
    from those and its attention's output. Raises UserError where the model's class does not support it.
    """
    if not getattr(model, "_supports_gradient_checkpointing", False):
        raise UserError(f"{type(model).__name__} cannot recompute blocks; set memory.checkpointing to none")
    model.enable_gradient_checkpointing(_Recompute(keep_attention, every))


def checkpoint_resnets(decoder: nn.Module) -> None:
    """Has each residual block of ``decoder`` and each upsampling be recomputed in its backward pass.

    Diffusers' VAEs would recompute their up blocks, three residual blocks at the image's full size at once. Raises
    UserError where there are none.
    """
    lists = [module for name, module in decoder.named_modules() if name.endswith((".resnets", ".upsamplers"))]
    if not lists:
        raise UserError(f"{type(decoder).__name__} has no residual blocks; set memory.checkpoint_decoder to false")
    for block in (block for members in lists for block in members.children()):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


class _Recompute:
    """Called by the model in place of each block."""

    def __init__(self, keep_attention: bool, every: int) -> None:
        self._every = every
        self._numbers: dict[Callable[..., Any], int] = {}
        self._options: dict[str, Any] = {}
        if keep_attention:
            self._options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_attention)

    def __call__(self, block: Callable[..., Any], *arguments: Any) -> Any:
        number = self._numbers.setdefault(block, len(self._numbers))
        if number % self._every:
            return block(*arguments)
        # Nothing in a block is random, so there is no state to restore.
        return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False, **self._options)


def _keep_attention(context: Any, op: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
