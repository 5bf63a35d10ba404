"""A rollout whose velocities were approximated on the way, and are exact where somebody asks for one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from leapalign.memory.residency import made_for, stage
from leapalign.rollout import Rollout, evaluated, picked
from leapalign.velocity_backward import ConditionedVelocity


@dataclass(frozen=True)
class CachedRollout(Rollout):
    """Its latents are where the trajectory went, by the steps that ``velocities`` took.

    What a method asks of velocities, for distances, weights or a leap, it gets anew from ``velocity`` at those latents,
    as the leaps themselves do. The weights must not have changed since.
    """

    velocity: ConditionedVelocity
    """Of the rollout's B samples."""
    _exact: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """By step and sample, what was asked for so far."""

    @classmethod
    def of(cls, rollout: Rollout, velocity: ConditionedVelocity) -> CachedRollout:
        return cls(rollout.latents, rollout.velocities, rollout.sigmas, velocity)

    @torch.no_grad()
    def velocities_of(self, steps: Tensor, samples: Tensor) -> Tensor:
        entries = list(zip(steps.tolist(), samples.tolist(), strict=True))
        missing = [entry for entry in dict.fromkeys(entries) if entry not in self._exact]
        levels = self.sigmas.to(self.latents.device) if missing else self.sigmas
        for start in range(0, len(missing), self.batch_size):
            at, of = torch.tensor(missing[start : start + self.batch_size]).unbind(dim=1)
            sigma = torch.stack([levels[step] for step in at.tolist()])
            with stage("rollout"), made_for("latents"):
                found = evaluated(self.velocity.select(of), picked(self.latents, at, of), sigma)
            self._exact.update(zip(missing[start:], found, strict=False))
        return torch.stack([self._exact[entry] for entry in entries])

    def errors(self) -> Tensor | None:
        """Of each sample, ``(B,)`` float32, how far velocities were off where they were asked for: the mean of
        ``|exact - taken| / |exact|``; nan where none was, and None where none was of any sample."""
        if not self._exact:
            return None
        found: list[list[Tensor]] = [[] for _ in range(self.batch_size)]
        for (step, sample), exact in self._exact.items():
            off = (exact - self.velocities[step, sample]).float().norm() / exact.float().norm()
            found[sample].append(off)
        nothing = self.latents.new_tensor([torch.nan], dtype=torch.float32)
        return torch.stack([torch.stack(ones).mean() if ones else nothing[0] for ones in found])
