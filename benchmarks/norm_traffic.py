"""What the norm and the rotation of queries and keys move and save: diffusers' code for FLUX.1, and `qk_norm_rope`.

    python benchmarks/norm_traffic.py

Bytes an element of queries and keys in bfloat16: read and written by the operations of a forward pass, and saved for
the backward pass beside the arguments. Counted, not timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from leap_kernels import QK, qk_norm_rope
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HEADS, WIDTH = 24, 128
IMAGE, TEXT = 512, 128
"""Tokens."""


class Traffic(TorchDispatchMode):
    """Within the block, ``bytes`` adds up arguments and results of operations that compute."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given, made = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), result))
        old = {tensor.untyped_storage().data_ptr() for tensor in given}
        # A view moves nothing.
        if any(tensor.untyped_storage().data_ptr() not in old for tensor in made):
            self.bytes += sum(tensor.nbytes for tensor in (*given, *made))
        return result


def cases() -> tuple[list[Tensor], dict[str, Callable[[], Any]]]:
    """The arguments, and what takes them."""
    q, k = (torch.randn(1, IMAGE, HEADS, WIDTH, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    q_text, k_text = (torch.randn(1, TEXT, HEADS, WIDTH, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    norms = [nn.RMSNorm(WIDTH, eps=1e-6, dtype=torch.bfloat16) for _ in range(4)]
    cos, sin = FluxPosEmbed(10000, [16, 56, 56])(torch.arange(IMAGE + TEXT)[:, None].repeat(1, 3))
    halves = [table[:, ::2].contiguous() for table in (cos, sin)]
    weights = [norm.weight for norm in norms]

    def joined(text: Tensor, image: Tensor) -> Tensor:
        return apply_rotary_emb(torch.cat([text, image], dim=1), (cos, sin), sequence_dim=1)

    def diffusers() -> Any:
        return joined(norms[2](q_text), norms[0](q)), joined(norms[3](k_text), norms[1](k))

    def without_norms() -> Any:
        return joined(q_text, q), joined(k_text, k)

    def ours() -> Any:
        return qk_norm_rope(q, k, *weights[:2], *halves, 1e-6, before=QK(q_text, k_text, *weights[2:]))

    runs = {"diffusers": diffusers, "diffusers, without its norms": without_norms, "qk_norm_rope": ours}
    return [q, k, q_text, k_text, cos, sin, *halves, *weights], runs


def measured() -> list[dict[str, Any]]:
    arguments, runs = cases()
    known = {tensor.untyped_storage().data_ptr() for tensor in arguments}
    elements = 2 * (IMAGE + TEXT) * HEADS * WIDTH
    found = []
    for name, run in runs.items():
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # Until the count is done, so that no address is another tensor's.
            result = run()
        with torch.no_grad(), Traffic() as traffic:
            run()
        del result
        bytes_saved = sum(saved.values())
        found.append({"code": name, "moved": traffic.bytes / elements, "saved": bytes_saved / elements})
    return found


if __name__ == "__main__":
    for line in measured():
        print(json.dumps(line))
