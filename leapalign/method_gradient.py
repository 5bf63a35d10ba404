"""From a rollout to parameter gradients, by one method: draw, reward, loss, plan, surrogate backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from leapalign.memory.residency import made_for, stage
from leapalign.methods import Method
from leapalign.reward_gradient import RewardFn, RewardGradient, reward_gradient
from leapalign.rollout import Rollout, per_sample
from leapalign.surrogate import ConditionedVelocity, GradientSink, surrogate_backward


@dataclass(frozen=True)
class Objective:
    """What images are worth: ``reward`` of what ``decode`` makes of latents, up to ``threshold``.

    chunk: most images decoded and rewarded at once with gradient; None: all.
    """

    decode: Callable[[Tensor], Tensor]
    reward: RewardFn
    threshold: float
    chunk: int | None = None

    def score(self, latents: Tensor, prompts: Sequence[str]) -> RewardGradient:
        """Rewards of ``latents (N, ...)`` and their gradients; latent n was made for ``prompts[n % B]``."""
        repeated = [prompts[n % len(prompts)] for n in range(len(latents))]
        with stage("reward"), made_for("reward"):
            return reward_gradient(self.decode, self.reward, latents, repeated, self.chunk)

    def true_gradient(self, rollout: Rollout, prompts: Sequence[str]) -> Tensor:
        """Gradient ``(B, ...)`` of the unweighted mean hinge loss at the generated latents."""
        scored = self.score(rollout.latents[-1], prompts)
        factor = -(scored.rewards < self.threshold).to(scored.gradient) / len(prompts)
        return per_sample(factor, scored.gradient) * scored.gradient


def draw_several(
    method: Method, draws: int, num_steps: int, batch_size: int, generator: torch.Generator
) -> list[dict[str, Tensor]]:
    """Index tensors of ``draws`` draws for ``batch_size`` samples."""
    return [method.draw(num_steps, batch_size, generator) for _ in range(draws)]


def joined(draws: Sequence[dict[str, Tensor]], samples: slice = slice(None)) -> dict[str, Tensor]:
    """``draws`` as one, of some ``samples``: the columns of the first draw, then those of the next."""
    return {name: torch.cat([one[name][..., samples] for one in draws], dim=-1) for name in draws[0]}


def method_backward(
    method: Method,
    indices: dict[str, Tensor],
    rollout: Rollout,
    velocity: ConditionedVelocity,
    objective: Objective,
    prompts: Sequence[str],
    *,
    share: float = 1.0,
    microbatch: int | None = None,
    gradient_sink: GradientSink | None = None,
) -> dict[str, Tensor]:
    """Accumulates the gradient of ``share`` times the method's loss into ``.grad``, or hands it to ``gradient_sink``.

    indices: of one draw, or of several `joined`; the gradient is the mean over all columns.

    Returns metrics as tensors, an entry a column: ``reward``, ``loss``, ``hinge_closed``, the method's diagnostics,
    ``gradient_term_R`` (the norm of row R's cotangent) and ``discount_R`` (what its input's gradient was multiplied
    by).
    """
    trajectory = method.trajectory(rollout, velocity, **indices)
    if trajectory is not rollout:
        velocity = velocity.select(torch.arange(trajectory.batch_size) % len(prompts))
    plan = method.plan(trajectory.sigmas, **indices)
    scored = objective.score(method.reward_latents(trajectory, **indices), prompts)
    # Columns that reward the same latents share one gradient.
    rewarded = torch.arange(plan.index.shape[1]) % len(scored.rewards)
    reward, gradient = scored.rewards[rewarded].requires_grad_(), scored.gradient[rewarded]
    loss, diagnostics = method.loss(reward, objective.threshold, trajectory, **indices)
    (loss_gradient,) = torch.autograd.grad(share * loss, reward)
    discount = torch.zeros(plan.index.shape)
    with stage("surrogate"):
        terms = surrogate_backward(
            plan,
            trajectory,
            velocity,
            per_sample(loss_gradient, gradient) * gradient,
            microbatch=microbatch,
            gradient_sink=gradient_sink,
            applied_discount=discount,
        )
    return {
        "reward": reward.detach(),
        "loss": loss.detach().view(1),
        "hinge_closed": (reward.detach() >= objective.threshold).float(),
        **diagnostics,
        **{f"gradient_term_{row}": norms for row, norms in enumerate(terms)},
        **{f"discount_{row}": discount[row] for row in range(1, len(terms)) if plan.discount[row] != 0},
    }
