"""The methods written out in line, one image at a time, with connectors and stop-gradients: no plan, no engine.

Each function takes the world, the method's options and indices of one column, and returns the end point of the
surrogate trajectory, whose autograd graph holds everything the method differentiates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from worlds import World


class Image:
    """One column: its sample of the rollout, and the velocity network for it."""

    def __init__(self, world: World, column: int) -> None:
        sample = column % world.rollout.batch_size
        self.sigmas = world.rollout.sigmas
        self.steps = world.rollout.num_steps
        self.x = world.rollout.latents[:, sample]
        self.cached = world.rollout.velocities[:, sample]
        self._velocity = world.velocity.select(torch.tensor([sample]))

    def v(self, x: Tensor, step: int) -> Tensor:
        return self._velocity(x[None], self.sigmas[step][None])[0]


def scaled(x: Tensor, factor: float) -> Tensor:
    """The value of ``x`` with ``factor`` times its gradient."""
    return factor * x + ((1 - factor) * x).detach()


def pinned(x: Tensor, value: Tensor) -> Tensor:
    """A connector: the value of ``value``, the gradient of ``x``."""
    return x + (value - x).detach()


def refl(image: Image, options: dict[str, Any], i: Tensor) -> Tensor:
    step = int(i)
    return image.x[step] - image.sigmas[step] * image.v(image.x[step], step)


def draft_k(image: Image, options: dict[str, Any], first: Tensor) -> Tensor:
    x = image.x[int(first)]
    for step in range(int(first), image.steps):
        x = x + (image.sigmas[step + 1] - image.sigmas[step]) * image.v(x, step)
    return x


def draft_lv(image: Image, options: dict[str, Any], noise_seed: Tensor | None) -> Tensor:
    """``noise_seed``: None for the rollout's own last step."""
    sigma, x = image.sigmas[-2], image.x[-2]
    if noise_seed is not None:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(noise_seed))).to(x)
        x = (1 - sigma) * image.x[-1] + sigma * noise
    return x - sigma * image.v(x, image.steps - 1)


def drtune(image: Image, options: dict[str, Any], stop: Tensor, active: Tensor) -> Tensor:
    x = image.x[0]
    for step in range(int(stop) + 1):
        velocity = image.v(x.detach(), step) if step in active.tolist() else image.cached[step]
        if step == int(stop):
            return x - image.sigmas[step] * velocity
        x = x + (image.sigmas[step + 1] - image.sigmas[step]) * velocity
    raise AssertionError("no stop")


def leapalign(image: Image, options: dict[str, Any], **starts: Tensor) -> Tensor:
    steps = [int(start) for start in starts.values()]
    alphas = [options.get("alpha", 0.3)] * len(steps)
    if options.get("max_ratio") is not None:
        alphas = shrunk(image, steps, options)
    x = image.x[steps[0]]
    for number, step in enumerate(steps):
        end = steps[number + 1] if number + 1 < len(steps) else image.steps
        velocity = image.v(scaled(x, alphas[number]) if number else x, step)
        predicted = x - (image.sigmas[step] - image.sigmas[end]) * velocity
        if end == image.steps and options.get("reward_on") == "posterior_mean":
            return predicted
        x = pinned(predicted, image.x[end])
    return x


def shrunk(image: Image, steps: list[int], options: dict[str, Any]) -> list[float]:
    """Discounts by magnitude: the nested term at a row against what comes from behind it, from the image back."""
    lam, alphas = options["gradient"], [1.0] * len(steps)
    for number in range(len(steps) - 1, 0, -1):
        step = steps[number]
        end = steps[number + 1] if number + 1 < len(steps) else image.steps
        x = image.x[step].detach().requires_grad_()
        leap = -(image.sigmas[step] - image.sigmas[end]) * image.v(x, step)
        (nested,) = torch.autograd.grad((leap * lam).sum(), x)
        size = min(1.0, options["max_ratio"] * float(lam.norm() / nested.norm()))
        alphas[number] = options.get("alpha", 0.3) * size
        lam = lam + alphas[number] * nested
    return alphas


def allowed(image: Image, options: dict[str, Any]) -> range:
    """The steps that may carry gradient."""
    if "tail_ratio" in options:
        return range(image.steps - math.ceil(options["tail_ratio"] * image.steps), image.steps)
    first, last = options.get("index_range", (0, image.steps - 1))
    return range(first, last + 1)


def grown(image: Image, active: list[int], options: dict[str, Any]) -> float:
    """FlowBP's factor on the gradient of the active steps, for those left out of the allowed ones."""
    lengths = {step: float(image.sigmas[step] - image.sigmas[step + 1]) for step in allowed(image, options)}
    return 1 + options.get("rescale", 1.0) * (sum(lengths.values()) / sum(lengths[step] for step in active) - 1)


def flowbp_sparse(image: Image, options: dict[str, Any], active: Tensor) -> Tensor:
    chosen, x = active.tolist(), image.x[0]
    factor = grown(image, chosen, options)
    for step in range(image.steps):
        velocity = scaled(image.v(x.detach(), step), factor) if step in chosen else image.cached[step]
        x = x + (image.sigmas[step + 1] - image.sigmas[step]) * velocity
    return pinned(x, image.x[-1])


def flowbp_bridge(image: Image, options: dict[str, Any], j: Tensor, before: Tensor, after: Tensor) -> Tensor:
    chosen = [step for step in [*before.tolist(), int(j), *after.tolist()] if step >= 0]
    factor = grown(image, chosen, options)
    x = image.x[0]
    for step in range(image.steps):
        if step == int(j):
            x = pinned(x, image.x[step])
            velocity = scaled(image.v(scaled(x, options.get("alpha", 0.1)), step), factor)
        elif step in chosen:
            velocity = scaled(image.v(image.x[step], step), factor)
        else:
            velocity = image.cached[step]
        x = x + (image.sigmas[step + 1] - image.sigmas[step]) * velocity
    return pinned(x, image.x[-1])


def flowbp_lagrange(image: Image, options: dict[str, Any], k: Tensor, j: Tensor) -> Tensor:
    count, active = options.get("supports", 3), options.get("active_supports", 2)
    x = image.x[int(k)]
    for start, end in ((int(k), int(j)), (int(j), image.steps)):
        supports = list(range(start, end))
        if len(supports) > count:
            places = torch.linspace(0, len(supports) - 1, count).round().long()
            supports = [supports[int(place)] for place in places]
        weights = quadrature(image.sigmas, supports, start, end)
        carrying = [number for number, step in enumerate(supports[:active]) if step in allowed(image, options)]
        factor = 1 + options.get("rescale", 0.5) * float(weights.abs().sum() / weights[carrying].abs().sum() - 1)
        inputs = scaled(x, options.get("alpha", 0.1)) if start == int(j) else x
        total = x
        for number, (step, weight) in enumerate(zip(supports, weights, strict=True)):
            if number not in carrying:
                velocity = image.cached[step]
            elif number == 0:
                velocity = scaled(image.v(inputs, step), factor)
            else:
                velocity = scaled(image.v(image.x[step], step), factor * options.get("support_scale", 0.25))
            total = total + weight * velocity
        x = pinned(total, image.x[end])
    return x


def quadrature(sigmas: Tensor, supports: list[int], start: int, end: int) -> Tensor:
    """Weights that integrate every power of sigma below the number of supports exactly."""
    nodes, a, b = sigmas[supports].double(), sigmas[start].double(), sigmas[end].double()
    powers = torch.arange(len(supports), dtype=torch.float64)
    return torch.linalg.solve(nodes[None] ** powers[:, None], (b ** (powers + 1) - a ** (powers + 1)) / (powers + 1))


METHODS: dict[str, Callable[..., Tensor]] = {
    "refl": refl,
    "draft_k": draft_k,
    "draft_lv": draft_lv,
    "drtune": drtune,
    "leapalign": leapalign,
    "flowbp_sparse": flowbp_sparse,
    "flowbp_bridge": flowbp_bridge,
    "flowbp_lagrange": flowbp_lagrange,
}


def columns(name: str, indices: dict[str, Tensor]) -> list[dict[str, Tensor | None]]:
    """The indices of each column of the method's plan."""
    count = next(iter(indices.values())).shape[-1]
    if name != "draft_lv":
        return [{key: value[..., column] for key, value in indices.items()} for column in range(count)]
    own: list[dict[str, Tensor | None]] = [{"noise_seed": None}] * count
    return own + [{"noise_seed": seed} for row in indices["noise_seed"] for seed in row]
