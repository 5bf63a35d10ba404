"""From a rollout to parameter gradients, by one method: draw, reward, loss, plan, surrogate backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from leapalign.config import Config
from leapalign.diagnostics.guards import drop_rollouts, first_fault
from leapalign.memory.residency import made_for, stage
from leapalign.methods import Method
from leapalign.regularization import BaseVelocityPenalty
from leapalign.reward_gradient import CLAMPS, RewardGradient, RewardTerm, reward_gradient, to_unit_range
from leapalign.rollout import Rollout, per_sample
from leapalign.surrogate import ConditionedVelocity, GradientSink, surrogate_backward


@dataclass(frozen=True)
class Objective:
    """What images are worth: the rewards in ``terms`` of what ``decode`` makes of latents.

    chunk: most images decoded and rewarded at once with gradient; None: all. equal_gradients: scales the gradient of
    every reward, image by image, to the norm of the first one's, so that weights say what each contributes. clamp: of
    decoded images, one of `leapalign.reward_gradient.CLAMPS`.
    """

    decode: Callable[[Tensor], Tensor]
    terms: Sequence[RewardTerm]
    chunk: int | None = None
    equal_gradients: bool = False
    clamp: Callable[[Tensor], Tensor] = to_unit_range

    @classmethod
    def of(cls, config: Config, decode: Callable[[Tensor], Tensor], terms: Sequence[RewardTerm]) -> Objective:
        """That of a run with ``config``."""
        if config.memory.rewards == "host":
            # The decoder's graph is made when the reward's weights have left.
            decode = partial(checkpoint, decode, use_reentrant=False, preserve_rng_state=False)
        return cls(
            decode, terms, config.train.reward_chunk, config.equal_reward_gradients, CLAMPS[config.train.image_clamp]
        )

    def score(self, latents: Tensor, prompts: Sequence[str]) -> list[RewardGradient]:
        """Each term's rewards of ``latents (N, ...)`` and their gradients; latent n was made for ``prompts[n % B]``."""
        repeated = [prompts[n % len(prompts)] for n in range(len(latents))]
        with stage("reward"), made_for("reward"):
            scored = [
                reward_gradient(self.decode, term.reward, latents, repeated, self.chunk, self.clamp, term.lend)
                for term in self.terms
            ]
            return [replace(one, gradient=self._scaled(one, scored[0])) for one in scored]

    def true_gradient(self, rollout: Rollout, prompts: Sequence[str]) -> Tensor:
        """Gradient ``(B, ...)`` of the unweighted mean hinge losses at the generated latents."""
        total = torch.zeros_like(rollout.latents[-1])
        for term, scored in zip(self.terms, self.score(rollout.latents[-1], prompts), strict=True):
            factor = -term.weight * (scored.rewards < term.threshold).to(scored.gradient) / len(prompts)
            total += per_sample(factor, scored.gradient) * scored.gradient
        return total

    def _scaled(self, scored: RewardGradient, first: RewardGradient) -> Tensor:
        if not self.equal_gradients or scored is first:
            return scored.gradient
        ratio = _norms(first.gradient) / _norms(scored.gradient).clamp(min=torch.finfo(torch.float32).tiny)
        return per_sample(ratio, scored.gradient) * scored.gradient


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
    among: int = 1,
    microbatch: int | None = None,
    gradient_sink: GradientSink | None = None,
    penalty: BaseVelocityPenalty | None = None,
) -> dict[str, Tensor]:
    """Accumulates the gradient of ``share`` times the method's loss into ``.grad``, or hands it to ``gradient_sink``.

    among: so many processes have an equal part of the images each, and the loss is the mean over those of all.
    indices: of one draw, or of several `joined`; the gradient is the mean over all columns. penalty: is added to the
    loss whose gradient it is, and not to the metric ``loss``; ``base_velocity`` is its distance without its weight.

    Returns metrics as tensors, an entry a column: ``reward``, ``loss``, ``hinge_closed`` and ``clamped`` (the share of
    the decoded image's values outside [0, 1]), the method's diagnostics,
    ``gradient_term_R`` (the norm of row R's cotangent) and ``discount_R`` (what its input's gradient was multiplied
    by). Of several rewards the first two are weighted sums and the third is a mean; each has its own, too, as
    ``reward_NAME``, and ``reward_gradient_NAME``, the norm of its part of the gradient at the rewarded latents.

    A sample whose latents, reward or reward gradient are not finite adds nothing to the gradient, counts as a loss of
    0 in the mean, and has nan for its other metrics. ``fault`` says which these are, see `first_fault`.
    """
    broken = drop_rollouts(rollout)
    trajectory = method.trajectory(rollout, velocity, **indices)
    if trajectory is not rollout:
        velocity = velocity.select(torch.arange(trajectory.batch_size) % len(prompts))
    plan = method.plan(trajectory.sigmas, **indices)
    all_scored = objective.score(method.reward_latents(trajectory, **indices), prompts)
    # Columns that reward the same latents share one gradient.
    rewarded = torch.arange(plan.index.shape[1]) % len(all_scored[0].rewards)
    # Looked at once: what follows of it needs no device.
    fault = first_fault(broken, all_scored).cpu()[rewarded]
    skipped = fault > 0
    if float((~skipped).float().mean()) < 1:
        # Without a coefficient a column is left out of the backward pass: what is nan there would not become 0.
        plan = replace(plan, coefficient=plan.coefficient.masked_fill(skipped, 0))
    parts, found = [], []
    for term, scored in zip(objective.terms, all_scored, strict=True):
        # At its threshold a reward has no loss; one column's nan would be everybody's.
        reward = scored.rewards[rewarded]
        reward = reward.masked_fill(skipped.to(reward.device), term.threshold).requires_grad_()
        gradient = scored.gradient[rewarded]
        loss, diagnostics = method.loss(reward, term.threshold, trajectory, **indices)
        (loss_gradient,) = torch.autograd.grad(share / among * term.weight * loss, reward)
        parts.append(per_sample(loss_gradient, gradient) * gradient)
        found.append(
            {
                "reward": reward.detach(),
                "loss": loss.detach().view(1),
                "hinge_closed": (reward.detach() >= term.threshold).float(),
                "reward_gradient": _norms(parts[-1]) / share,
            }
        )
    discount = torch.zeros(plan.index.shape)
    with stage("surrogate"):
        distance, apart = penalty.measured(plan, trajectory, velocity) if penalty else (None, None)
        terms = surrogate_backward(
            plan,
            trajectory,
            velocity,
            reduce(torch.add, parts),
            microbatch=microbatch,
            gradient_sink=gradient_sink,
            applied_discount=discount,
            velocity_gradient=share / among * apart if apart is not None else None,
        )
    metrics = {
        **_of_all(objective.terms, found),
        "clamped": all_scored[0].clamped[rewarded],
        **diagnostics,
        **{f"gradient_term_{row}": norms for row, norms in enumerate(terms)},
        **{f"discount_{row}": discount[row] for row in range(1, len(terms)) if plan.discount[row] != 0},
        **({"base_velocity": distance} if distance is not None else {}),
    }
    by_column = {name: value for name, value in metrics.items() if value.shape == skipped.shape and name != "loss"}
    seen = {name: value.masked_fill(skipped.to(value.device), math.nan) for name, value in by_column.items()}
    return {**metrics, **seen, "fault": fault}


def _of_all(terms: Sequence[RewardTerm], found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Metrics of the objective from those of its terms, and these by name where there are several."""
    weights = [term.weight for term in terms]
    total = {
        name: reduce(torch.add, [weight * one[name] for weight, one in zip(weights, found, strict=True)])
        for name in ("reward", "loss")
    }
    total["hinge_closed"] = reduce(torch.add, [one["hinge_closed"] for one in found]) / len(found)
    single = {f"{key}_{term.name}": value for term, one in zip(terms, found, strict=True) for key, value in one.items()}
    return total | (single if len(terms) > 1 else {})


def _norms(gradient: Tensor) -> Tensor:
    """Of each sample, ``(B,)`` float32."""
    return gradient.flatten(1).float().norm(dim=1)
