"""For each kernel of the catalog, the launcher of the op that launches it, and tensors to launch it on."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .._adamw_8bit import Factors
from .._moments import Adam8bitState, layout
from ..accumulate import triton_add
from ..adamw_8bit_step import triton_step
from ..adamw_8bit_step_many import Job
from ..adamw_8bit_step_many import triton_step as triton_steps
from ..combine_gradient_terms import triton_forward as combine
from ..consistency_weighted_loss import triton_forward as weighted_loss
from ..ema_update import triton_update
from ..euler_step import triton_forward as euler
from ..leap_distances import triton_forward as distances
from ..leap_update import triton_forward as connect
from ..scale_gradient import triton_scaled
from ..stochastic_round import triton_round
from ..total_norm import triton_norm
from .launches import Inputs, Launcher

_FACTORS = Factors(0.9, 0.1, 0.99, 0.01, 1.0, 1e-3, 0.1, 1e-8, 1e-5)
_SEED = 5


def _call(launcher: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: launcher(*arguments)


def _scale(factors: int) -> Launcher:
    return lambda i: _call(triton_scaled, *i.latents(1), i.numbers(factors), i.dtype)


def _euler(i: Inputs) -> Callable[[], object]:
    return _call(euler, *i.latents(2), *i.numbers(1), None, None)


def _guided(i: Inputs) -> Callable[[], object]:
    x, velocity, uncond = i.latents(3)
    delta, scale = i.numbers(2)
    return _call(euler, x, velocity, delta, uncond, scale)


def _connect(i: Inputs) -> Callable[[], object]:
    x, velocity, target = i.latents(3)
    return _call(connect, x, velocity, *i.numbers(1), target)


def _loss(i: Inputs) -> Callable[[], object]:
    """Its elements are samples."""
    rewards, leaps = i.flat(torch.float32), i.tensor((2, i.count), torch.float32)
    return _call(weighted_loss, rewards, leaps, 0.5, 0.1)


def _combine(max_ratio: float | None) -> Launcher:
    return lambda i: _call(combine, *i.latents(2), *i.numbers(1), 0.5, max_ratio)


def _adamw(weights: torch.dtype, offset: int) -> Launcher:
    def launcher(i: Inputs) -> Callable[[], object]:
        parameter = i.flat(weights)
        state = Adam8bitState(*(i.tensor(shape, dtype) for dtype, shape in layout(parameter)))
        return _call(triton_step, parameter, i.flat(), state, _FACTORS, _SEED, offset)

    return launcher


def _adamw_many(weights: torch.dtype, offset: int) -> Launcher:
    def launcher(i: Inputs) -> Callable[[], object]:
        parameter = i.flat(weights)
        state = Adam8bitState(*(i.tensor(shape, dtype) for dtype, shape in layout(parameter)))
        return _call(triton_steps, [Job(parameter, i.flat(), state, _FACTORS, _SEED, offset)])

    return launcher


LAUNCHERS: dict[str, Launcher] = {
    "leap_update": _connect,
    "leap_update/no_target": _euler,
    "leap_update/backward": _scale(1),
    "leap_distances": lambda i: _call(distances, *i.latents(5), *i.numbers(2)),
    "consistency_weighted_loss": _loss,
    "scale_gradient/backward": _scale(1),
    "combine_gradient_terms": _combine(None),
    "combine_gradient_terms/norms": _combine(2.0),
    "combine_gradient_terms/limited": _combine(2.0),
    "euler_step": _euler,
    "euler_step/guidance": _guided,
    "euler_step/backward": _scale(1),
    "euler_step/guidance_backward": _scale(2),
    "stochastic_round_": lambda i: _call(triton_round, i.flat(torch.bfloat16), i.flat(torch.float32), _SEED, 8),
    "accumulate_": lambda i: _call(triton_add, i.flat(torch.float32), i.flat()),
    "ema_update_": lambda i: _call(triton_update, i.flat(torch.float32), i.flat(), 0.005),
    "adamw_8bit_step_": _adamw(torch.bfloat16, 0),
    "adamw_8bit_step_/any_offset": _adamw(torch.bfloat16, 3),
    "adamw_8bit_step_/float32": _adamw(torch.float32, 0),
    "adamw_8bit_step_many_": _adamw_many(torch.bfloat16, 0),
    "adamw_8bit_step_many_/any_offset": _adamw_many(torch.bfloat16, 3),
    "adamw_8bit_step_many_/float32": _adamw_many(torch.float32, 0),
    "total_norm": lambda i: _call(triton_norm, [i.flat()]),
}
"""By the name of the kernel in the catalog."""
