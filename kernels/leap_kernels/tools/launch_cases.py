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
from .block_launches import BLOCK_LAUNCHERS
from .launches import Inputs, Launcher

_FACTORS = Factors(0.9, 0.1, 0.99, 0.01, 1.0, 1e-3, 0.1, 1e-8, 1e-5)
_SEED = 5


def _call(launcher: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: launcher(*arguments)


def _scale(factors: int, grad: torch.dtype | None = None) -> Launcher:
    return lambda i: _call(triton_scaled, *i.latents(1, grad), i.numbers(factors), i.dtype)


def _euler(x: torch.dtype | None = None) -> Launcher:
    return lambda i: _call(euler, *i.latents(1, x), *i.latents(1), *i.numbers(1), None, None)


def _guided(x: torch.dtype | None = None) -> Launcher:
    def launcher(i: Inputs) -> Callable[[], object]:
        velocity, uncond = i.latents(2)
        delta, scale = i.numbers(2)
        return _call(euler, *i.latents(1, x), velocity, delta, uncond, scale)

    return launcher


def _connect(x: torch.dtype | None = None) -> Launcher:
    def launcher(i: Inputs) -> Callable[[], object]:
        start, target = i.latents(2, x)
        return _call(connect, start, *i.latents(1), *i.numbers(1), target)

    return launcher


def _distances(x: torch.dtype | None = None) -> Launcher:
    def launcher(i: Inputs) -> Callable[[], object]:
        x_k, x_j, x_end = i.latents(3, x)
        v_k, v_j = i.latents(2)
        return _call(distances, x_k, v_k, x_j, v_j, x_end, *i.numbers(2))

    return launcher


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
    "leap_update": _connect(),
    "leap_update/float32_x": _connect(torch.float32),
    "leap_update/no_target": _euler(),
    "leap_update/backward": _scale(1),
    "leap_distances": _distances(),
    "leap_distances/float32_x": _distances(torch.float32),
    "consistency_weighted_loss": _loss,
    "scale_gradient/backward": _scale(1),
    "combine_gradient_terms": _combine(None),
    "combine_gradient_terms/norms": _combine(2.0),
    "combine_gradient_terms/limited": _combine(2.0),
    "euler_step": _euler(),
    "euler_step/float32_x": _euler(torch.float32),
    "euler_step/guidance": _guided(),
    "euler_step/guidance_float32_x": _guided(torch.float32),
    "euler_step/backward": _scale(1),
    "euler_step/backward_float32_x": _scale(1, torch.float32),
    "euler_step/guidance_backward": _scale(2),
    "euler_step/guidance_backward_float32_x": _scale(2, torch.float32),
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
    **BLOCK_LAUNCHERS,
}
"""By the name of the kernel in the catalog."""
