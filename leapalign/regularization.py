"""Keeping near the base: the squared distance of the velocities that carry gradient to the base model's.

For a plan of N columns, with ``A_n`` the rows that are active in column n (those with a coefficient), D elements in a
latent, and both velocities at the rollout's latents and noise levels, guidance included:

    R = 1/N sum_n 1/|A_n| sum_{r in A_n} 1/D |v_rn - v^base_rn|^2
    dR/dv_rn = 2 / (N |A_n| D) (v_rn - v^base_rn)

The loss has ``weight R`` more. Latents are constants of it (a stop-gradient): it reaches the parameters through each
``v_rn`` itself, and nothing of it flows through a row's input to the rows before it, which would change where the model
goes to be near, not what it does there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from leapalign.config import Config
from leapalign.memory.base_weights import BaseWeights
from leapalign.memory.residency import made_for
from leapalign.models.lora import has_adapter, without_adapter
from leapalign.models.protocol import FlowModel
from leapalign.rollout import Rollout, evaluated, per_sample
from leapalign.surrogate import ConditionedVelocity, SurrogatePlan


@dataclass(frozen=True)
class BaseVelocityPenalty:
    """``weight R``; ``base()``: within this block the model is its base."""

    weight: float
    base: Callable[[], AbstractContextManager[None]]

    @torch.no_grad()
    def measured(self, plan: SurrogatePlan, rollout: Rollout, velocity: ConditionedVelocity) -> tuple[Tensor, Tensor]:
        """Each column's share of R, ``(N,)`` float32 or wider, and ``weight dR/dv``, ``(K, N, ...)``, 0 where a row is
        not active.

        One forward of the base for each active velocity, B at a time; the rollout knows those of the model, whose
        weights must not have changed since. A column without active rows has distance 0.
        """
        batch, active = rollout.batch_size, plan.coefficient != 0
        wide = torch.promote_types(rollout.velocities.dtype, torch.float32)
        with made_for("latents"):
            apart = rollout.velocities.new_zeros((*plan.index.shape, *rollout.velocities.shape[2:]), dtype=wide)
        entries = active.nonzero()
        parts = [part.unbind(dim=1) for part in entries.split(batch)] if len(entries) else []
        for rows, columns in parts:
            apart[rows, columns] = rollout.velocities_of(plan.index[rows, columns], columns % batch).to(wide)
        with self.base():
            for rows, columns in parts:
                steps, samples = plan.index[rows, columns], columns % batch
                latents, sigma = rollout.latents[steps, samples], rollout.sigmas[steps].to(rollout.latents.device)
                apart[rows, columns] -= evaluated(velocity.select(samples), latents, sigma).to(wide)
        rows_of = active.sum(dim=0).clamp(min=1).to(apart)
        distance = apart.flatten(2).square().mean(dim=2).sum(dim=0) / rows_of
        factor = 2 * self.weight / (len(rows_of) * rows_of * apart[0, 0].numel())
        return distance, apart.mul_(per_sample(factor, apart[0]))


def base_velocity_penalty(config: Config, model: FlowModel, device: torch.device) -> BaseVelocityPenalty | None:
    """That of ``config``, for a model in its place whose weights are the base's still; None where its weight is 0.

    The base of adapters is the model without them, which costs no memory. That of all weights is a copy of them in
    host memory.
    """
    weight = config.regularization.base_velocity
    if not weight:
        return None
    if has_adapter(model.transformer):
        return BaseVelocityPenalty(weight, partial(without_adapter, model.transformer))
    return BaseVelocityPenalty(weight, BaseWeights(list(model.transformer.parameters()), device).lent)
