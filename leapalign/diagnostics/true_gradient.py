"""How well a method's gradient agrees with the one it approximates: backpropagation through the whole sampler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from leapalign.methods.draft_k import DRaFTK
from leapalign.rollout import Rollout, VelocityFn
from leapalign.surrogate import surrogate_backward


def true_gradient(
    rollout: Rollout, velocity_fn: VelocityFn, x0_gradient: Tensor, microbatch: int | None = None
) -> dict[Tensor, Tensor]:
    """Parameter gradients of the sampler itself, for ``x0_gradient (B, ...)`` at the generated latents.

    All steps with discount 1, exact; ``.grad`` of the parameters must be None and stays so.
    """
    method = DRaFTK(steps=None)
    plan = method.plan(rollout.sigmas, first=torch.zeros(rollout.batch_size, dtype=torch.int64))
    gradients: dict[Tensor, Tensor] = {}

    def add(parameter: Tensor, gradient: Tensor) -> None:
        gradients[parameter] = gradients[parameter] + gradient if parameter in gradients else gradient

    surrogate_backward(plan, rollout, velocity_fn, x0_gradient, microbatch=microbatch, gradient_sink=add)
    return gradients


def agreement(
    parameters: Sequence[nn.Parameter],
    rollout: Rollout,
    velocity_fn: VelocityFn,
    x0_gradient: Tensor,
    microbatch: int | None = None,
) -> dict[str, Tensor]:
    """Cosine and norm ratio of the gradients in ``.grad`` to the true one, ``(1,)`` each; ``.grad`` stays."""
    approximate = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        true = true_gradient(rollout, velocity_fn, x0_gradient, microbatch)
    finally:
        for parameter, gradient in zip(parameters, approximate, strict=True):
            parameter.grad = gradient
    # Summed where the gradients are: a GPU is asked once, not for every parameter.
    products = torch.zeros(3, dtype=torch.float64, device=parameters[0].device)
    for parameter in parameters:
        if parameter.grad is not None and parameter in true:
            products[0] += (parameter.grad.float() * true[parameter].float()).sum()
        if parameter.grad is not None:
            products[1] += parameter.grad.float().square().sum()
        if parameter in true:
            products[2] += true[parameter].float().square().sum()
    dot, own, other = products.cpu()
    return {
        "true_gradient_cosine": (dot / (own * other).sqrt()).view(1),
        "true_gradient_norm_ratio": (own / other).sqrt().view(1),
    }
