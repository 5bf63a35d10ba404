"""Which attention kernel a model runs: the one asked for, or the fastest that works here, with its backward pass."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)

from leapalign.inputs.validation import UserError, brief

PREFERRED = ("_flash_3", "flash", "xformers", "native")
"""Fastest first, as their authors measured on GPUs; not measured here."""

NEEDS = {
    "flash": "the package flash-attn and an NVIDIA GPU",
    "_flash_3": "FlashAttention 3, built from source, and a Hopper GPU",
    "xformers": "the package xformers and a GPU",
}
"""What a backend takes beyond PyTorch."""

_log = logging.getLogger("leapalign")


def set_attention(model: Any, wanted: str, device: torch.device, dtype: torch.dtype) -> str:
    """Has ``model`` use the attention backend ``wanted``, or with ``auto`` the first of `PREFERRED` that works.

    Returns its name. Raises UserError where the one asked for does not work.
    """
    # Models that take a mask of the prompts' tokens hand it on to their attention.
    # Prompts of several lengths are masked, Z-Image's (``cap_feats``) by the transformer itself.
    masked = bool({"encoder_hidden_states_mask", "cap_feats"} & inspect.signature(model.forward).parameters.keys())
    for name in PREFERRED if wanted == "auto" else (wanted,):
        problem = _problem(name, device, dtype, masked)
        if problem is None:
            model.set_attention_backend(name)
            _log.info("attention runs on '%s'", name)
            return name
        if wanted != "auto":
            needs = NEEDS.get(wanted, "another version of PyTorch")
            raise UserError(f"memory.attention '{wanted}' needs {needs} ({problem}); provide that, or set it to auto")
        _log.info("attention cannot run on '%s': %s", name, problem)
    raise UserError("no attention backend works here; reinstall torch")


@torch.enable_grad()
def _problem(name: str, device: torch.device, dtype: torch.dtype, masked: bool) -> str | None:
    """Why a backend cannot run attention, with a mask if ``masked``, and its backward pass; None if it can."""
    if name not in {backend.value for backend in AttentionBackendName}:
        return "diffusers knows no such backend"
    query, key, value = (torch.randn(1, 16, 2, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 1, 16, device=device, dtype=torch.bool) if masked else None
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
        dispatch_attention_fn(query, key, value, attn_mask=mask, backend=AttentionBackendName(name)).sum().backward()
    except Exception as error:  # whatever third-party kernels raise
        return brief(error)
    return None
