"""What `bench` runs: for each op its inputs, the plain PyTorch a trainer would write, and the op itself.

The plain functions compute in float32, or in float64 where their inputs are float64, so that they also give the
values that errors are measured against. They share no code with the ops.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import leap_kernels

from .bench_blocks import BLOCK_CASES
from .bench_case import DTYPE, SEED, Case, Inputs, Outputs

SIZES = {
    "flux-720x720-batch-8": (8, 2025, 64),
    "video-batch-1": (1, 32760, 64),
    # 64 MiB a tensor: what a copy costs when caches do not help.
    "beyond-cache": (8, 65536, 64),
}
"""Of the latents of a sampler."""
ALPHA, MAX_RATIO, THRESHOLD, TAU, DECAY = 0.3, 0.5, 0.55, 0.1, 0.995


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rows(value: Tensor, like: Tensor) -> Tensor:
    return value.view(-1, *[1] * (like.ndim - 1))


def _sample_mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)


def _plain_leap(i: Inputs) -> Outputs:
    xhat = _wide(i["x"]) - _rows(i["sigma"], i["x"]) * _wide(i["velocity"])
    rest = (_wide(i["target"]) - xhat).detach()
    return (xhat + rest).to(i["x"].dtype), _sample_mean(rest.abs())


def _op_leap(i: Inputs) -> Outputs:
    latents, distance = leap_kernels.leap_update(i["x"], i["velocity"], i["sigma"], 0.0, i["target"])
    assert distance is not None
    return latents, distance


def _plain_distances(i: Inputs) -> Outputs:
    leap = _rows(i["sigma_k"] - i["sigma_j"], i["x_k"]) * _wide(i["v_k"])
    first = _wide(i["x_j"]) - (_wide(i["x_k"]) - leap)
    second = _wide(i["x_end"]) - (_wide(i["x_j"]) - _rows(i["sigma_j"], i["x_j"]) * _wide(i["v_j"]))
    return _sample_mean(first.abs()), _sample_mean(second.abs())


def _op_distances(i: Inputs) -> Outputs:
    names = ("x_k", "v_k", "x_j", "v_j", "x_end", "sigma_k", "sigma_j")
    return leap_kernels.leap_distances(*(i[name] for name in names))


def _plain_loss(i: Inputs) -> Outputs:
    weight = 1 / (i["d_j"].clamp(min=TAU) + i["d_end"].clamp(min=TAU))
    return (weight * (THRESHOLD - i["reward"]).relu()).mean(), weight


def _op_loss(i: Inputs) -> Outputs:
    return leap_kernels.consistency_weighted_loss(i["reward"], (i["d_j"], i["d_end"]), THRESHOLD, TAU)


def _plain_scale(i: Inputs) -> Outputs:
    return (ALPHA * i["x"] + (1 - ALPHA) * i["x"].detach(),)


def _op_scale(i: Inputs) -> Outputs:
    return (leap_kernels.scale_gradient(i["x"], ALPHA),)


def _plain_combine(i: Inputs, max_ratio: float | None) -> Outputs:
    direct, nested = _wide(i["direct"]), _wide(i["nested"])
    norms = direct.flatten(1).norm(dim=1), nested.flatten(1).norm(dim=1)
    scale = torch.ones_like(norms[0]) if max_ratio is None else (max_ratio * norms[0] / norms[1]).clamp(max=1)
    combined = _rows(i["coefficient"], direct) * (direct + _rows(ALPHA * scale, nested) * nested)
    return combined.to(i["direct"].dtype), *norms


def _op_combine(i: Inputs, max_ratio: float | None) -> Outputs:
    return leap_kernels.combine_gradient_terms(i["direct"], i["nested"], i["coefficient"], ALPHA, max_ratio)


def _plain_euler(i: Inputs) -> Outputs:
    velocity = _wide(i["velocity"])
    if "uncond" in i:
        uncond = _wide(i["uncond"])
        velocity = uncond + _rows(i["scale"], uncond) * (velocity - uncond)
    return ((_wide(i["x"]) + _rows(i["sigma_next"] - i["sigma"], i["x"]) * velocity).to(i["x"].dtype),)


def _op_euler(i: Inputs) -> Outputs:
    guidance = (i.get("uncond"), i.get("scale"))
    return (leap_kernels.euler_step(i["x"], i["velocity"], i["sigma"], i["sigma_next"], *guidance),)


def _plain_round(i: Inputs) -> Outputs:
    bits = i["src"].view(torch.int32)
    rounded = (bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)
    return (i["dst"].copy_(rounded.view(torch.float32)),)


def _op_round(i: Inputs) -> Outputs:
    return (leap_kernels.stochastic_round_(i["dst"], i["src"], SEED, 0),)


def _plain_sum(i: Inputs) -> Outputs:
    return (i["total"].add_(i["value"]),)


def _op_sum(i: Inputs) -> Outputs:
    return (leap_kernels.accumulate_(i["total"], i["value"]),)


def _plain_ema(i: Inputs) -> Outputs:
    return (i["average"].lerp_(i["weights"].to(i["average"].dtype), 1 - DECAY),)


def _op_ema(i: Inputs) -> Outputs:
    return (leap_kernels.ema_update_(i["average"], i["weights"], DECAY),)


def _latents(*names: str) -> dict[str, torch.dtype]:
    return dict.fromkeys(names, DTYPE)


CASES = (
    Case(
        "leap_update",
        latents=_latents("x", "velocity", "target"),
        per_sample=("sigma",),
        plain=_plain_leap,
        fused=_op_leap,
        forward_bytes=8,
        backward_bytes=4,
        differentiable=("x", "velocity"),
    ),
    Case(
        "leap_distances",
        latents=_latents("x_k", "v_k", "x_j", "v_j", "x_end"),
        per_sample=("sigma_k", "sigma_j"),
        plain=_plain_distances,
        fused=_op_distances,
        forward_bytes=10,
    ),
    Case(
        "consistency_weighted_loss",
        latents={},
        per_sample=("reward", "d_j", "d_end"),
        plain=_plain_loss,
        fused=_op_loss,
        forward_bytes=16,
        backward_bytes=12,
        differentiable=("reward",),
    ),
    Case(
        "scale_gradient",
        latents=_latents("x"),
        plain=_plain_scale,
        fused=_op_scale,
        forward_bytes=4,
        backward_bytes=4,
        differentiable=("x",),
    ),
    *(
        Case(
            "combine_gradient_terms",
            variant=variant,
            latents=_latents("direct", "nested"),
            per_sample=("coefficient",),
            plain=partial(_plain_combine, max_ratio=max_ratio),
            fused=partial(_op_combine, max_ratio=max_ratio),
            forward_bytes=6,
        )
        for variant, max_ratio in (("", None), ("max_ratio", MAX_RATIO))
    ),
    Case(
        "euler_step",
        latents=_latents("x", "velocity"),
        per_sample=("sigma", "sigma_next"),
        plain=_plain_euler,
        fused=_op_euler,
        forward_bytes=6,
        backward_bytes=4,
        differentiable=("x", "velocity"),
    ),
    Case(
        "euler_step",
        variant="guidance",
        latents=_latents("x", "velocity", "uncond"),
        per_sample=("sigma", "sigma_next", "scale"),
        plain=_plain_euler,
        fused=_op_euler,
        forward_bytes=8,
        backward_bytes=6,
        differentiable=("x", "velocity", "uncond"),
    ),
    Case(
        "stochastic_round_",
        latents={"dst": torch.bfloat16, "src": torch.float32},
        plain=_plain_round,
        fused=_op_round,
        forward_bytes=6,
        exact=lambda i: (i["src"],),
    ),
    Case(
        "accumulate_",
        latents={"total": torch.float32, "value": DTYPE},
        plain=_plain_sum,
        fused=_op_sum,
        forward_bytes=2 * torch.float32.itemsize + DTYPE.itemsize,
    ),
    *(
        Case(
            "ema_update_",
            variant=variant,
            latents={"average": average, "weights": DTYPE},
            plain=_plain_ema,
            fused=_op_ema,
            forward_bytes=2 * average.itemsize + DTYPE.itemsize,
        )
        for variant, average in (("", torch.float32), ("bfloat16", DTYPE))
    ),
    *BLOCK_CASES,
)
