"""The cases of `bench` for the ops of transformer blocks and decoders, beside what models compute in plain PyTorch.

Unlike the plain functions of latents these round where models do: after every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

import leap_kernels

from .bench_case import DTYPE, Case, Inputs, Outputs

GROUPS = 32
ROWS = {"flux-512x512-batch-2": (2, 1536, 3072)}
"""Of the stream of a block: 512 tokens of text and 1024 of an image."""
HEADS = {"flux-512x512-batch-2": (2, 1536, 24, 128)}
IMAGES = {"decoder-256x256": (1, 128, 256, 256)}


def _plain_modulate(i: Inputs) -> Outputs:
    normal = functional.layer_norm(i["x"], i["x"].shape[-1:], eps=1e-6)
    return (normal * (1 + i["scale"].unsqueeze(1)) + i["shift"].unsqueeze(1),)


def _plain_gated(i: Inputs) -> Outputs:
    return (i["x"] + i["gate"].unsqueeze(1) * i["y"],)


def _plain_swiglu(i: Inputs) -> Outputs:
    return (functional.silu(i["gate"]) * i["up"],)


def _plain_norm_rope(i: Inputs) -> Outputs:
    return _turned(i["q"], i["q_weight"], i), _turned(i["k"], i["k_weight"], i)


def _turned(x: Tensor, weight: Tensor, i: Inputs) -> Tensor:
    """Norm and turn as diffusers' `RMSNorm` and `apply_rotary_emb` do."""
    arithmetic = torch.promote_types(x.dtype, torch.float32)
    normed = x * torch.rsqrt(x.to(arithmetic).square().mean(-1, keepdim=True) + 1e-6)
    normed = normed.to(weight.dtype) * weight
    cos, sin = (i[name].repeat_interleave(2, dim=-1)[None, :, None] for name in ("cos", "sin"))
    a, b = normed.unflatten(-1, (-1, 2)).unbind(-1)
    across = torch.stack([-b, a], dim=-1).flatten(-2)
    return (normed.to(arithmetic) * cos + across.to(arithmetic) * sin).to(x.dtype)


def _op_norm_rope(i: Inputs) -> Outputs:
    return leap_kernels.qk_norm_rope(i["q"], i["k"], i["q_weight"], i["k_weight"], i["cos"], i["sin"])


def _plain_norm_silu(i: Inputs) -> Outputs:
    return (functional.silu(functional.group_norm(i["x"], GROUPS, i["weight"], i["bias"], 1e-6)),)


def _latents(*names: str) -> dict[str, torch.dtype]:
    return dict.fromkeys(names, DTYPE)


def _vector(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], shape[-1]


def _of_head(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[-1:]


def _table(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1], shape[-1] // 2


def _of_channel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:2]


BLOCK_CASES = (
    Case(
        "adaln_modulate",
        latents=_latents("x"),
        beside=dict.fromkeys(("shift", "scale"), (_vector, DTYPE)),
        plain=_plain_modulate,
        fused=lambda i: (leap_kernels.adaln_modulate(i["x"], i["shift"], i["scale"]),),
        forward_bytes=4,
        backward_bytes=6,
        differentiable=("x", "shift", "scale"),
        sizes=ROWS,
    ),
    Case(
        "gated_residual",
        latents=_latents("x", "y"),
        beside={"gate": (_vector, DTYPE)},
        plain=_plain_gated,
        fused=lambda i: (leap_kernels.gated_residual(i["x"], i["gate"], i["y"]),),
        forward_bytes=6,
        # The gradient at x is the one that came in.
        backward_bytes=6,
        differentiable=("x", "gate", "y"),
        sizes=ROWS,
    ),
    Case(
        "gelu_tanh",
        latents=_latents("x"),
        plain=lambda i: (functional.gelu(i["x"], approximate="tanh"),),
        fused=lambda i: (leap_kernels.gelu_tanh(i["x"]),),
        forward_bytes=4,
        backward_bytes=6,
        differentiable=("x",),
        sizes=ROWS,
    ),
    Case(
        "swiglu",
        latents=_latents("gate", "up"),
        plain=_plain_swiglu,
        fused=lambda i: (leap_kernels.swiglu(i["gate"], i["up"]),),
        forward_bytes=6,
        backward_bytes=10,
        differentiable=("gate", "up"),
        sizes=ROWS,
    ),
    Case(
        "qk_norm_rope",
        latents=_latents("q", "k"),
        beside={
            **dict.fromkeys(("q_weight", "k_weight"), (_of_head, DTYPE)),
            **dict.fromkeys(("cos", "sin"), (_table, torch.float32)),
        },
        plain=_plain_norm_rope,
        fused=_op_norm_rope,
        forward_bytes=8,
        backward_bytes=12,
        differentiable=("q", "k", "q_weight", "k_weight"),
        sources=2,
        sizes=HEADS,
        quick=(2, 5, 3, 16),
    ),
    Case(
        "group_norm_silu",
        latents=_latents("x"),
        beside=dict.fromkeys(("weight", "bias"), (_of_channel, DTYPE)),
        plain=_plain_norm_silu,
        fused=lambda i: (leap_kernels.group_norm_silu(i["x"], GROUPS, i["weight"], i["bias"]),),
        forward_bytes=4,
        backward_bytes=6,
        differentiable=("x", "weight", "bias"),
        sizes=IMAGES,
        quick=(2, 32, 2, 3),
    ),
)
