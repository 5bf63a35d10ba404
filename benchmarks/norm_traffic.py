"""What the norm and the rotation of queries and keys move and save: diffusers' code for FLUX.1, and `qk_norm_rope`.

    python -m benchmarks.norm_traffic

Bytes an element of queries and keys in bfloat16, on a GPU: read and written by the operations of a forward pass, and
saved for the backward pass beside the arguments. Counted as in benchmarks/block_traffic.py, not timed.
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
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.block_traffic import Counting
from leapalign.planning.gpu_norms import norms_as_on_a_gpu
from leapalign.planning.ledger import StorageLedger

HEADS, WIDTH = 24, 128
IMAGE, TEXT = 512, 128
"""Tokens."""


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
    elements = 2 * (IMAGE + TEXT) * HEADS * WIDTH
    found = []
    with FakeTensorMode(), norms_as_on_a_gpu():
        arguments, runs = cases()
        for name, run in runs.items():
            with torch.no_grad(), Counting() as counting:
                run()
            with StorageLedger() as ledger:
                ledger.exclude(*arguments)
                graph = [result.grad_fn for result in run()]
                saved = ledger.live
            del graph
            moved = counting.traffic.rest.total()
            found.append({"code": name, "moved": moved / elements, "saved": saved / elements})
    return found


if __name__ == "__main__":
    for line in measured():
        print(json.dumps(line))
