"""A model's velocity for a batch of prompts, with or without classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from leapalign.config import CfgGradient
from leapalign.inputs.validation import UserError
from leapalign.models.block_cache import cache_of
from leapalign.models.protocol import FlowModel, GuidingModel
from leapalign.rollout import VelocityFn
from leapalign.surrogate import ConditionedVelocity


@dataclass(frozen=True)
class GuidedEmbeddings:
    """Embeddings of prompts, and the one of the negative prompt that guidance steers away from.

    ``velocity = negative + scale (prompt - negative)``, unless the model is a `GuidingModel`; ``batched``: both in one
    forward, else one after the other; ``gradient``: through both, or the prompt's alone.
    """

    prompts: Any
    negative: Any
    scale: float
    batched: bool
    gradient: CfgGradient = "full"

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, samples: Tensor | slice) -> GuidedEmbeddings:
        return replace(self, prompts=self.prompts[samples])

    def to(self, device: torch.device, dtype: torch.dtype) -> GuidedEmbeddings:
        """As `PromptEmbeddings.to`."""
        return replace(self, prompts=self.prompts.to(device, dtype), negative=self.negative.to(device, dtype))


def require_fit(model: FlowModel, embeddings: Any) -> None:
    """Raises UserError where ``embeddings``, which may be those of a cache, are not as wide as ``model`` takes them."""
    one = slice(0, 1)
    found = embeddings[one].prompts if isinstance(embeddings, GuidedEmbeddings) else embeddings[one]
    for name, part in model.blank_embeddings(1, 1).parts.items():
        given = found.parts.get(name, part)
        if given.is_floating_point() and given.shape[-1] != part.shape[-1]:
            raise UserError(
                f"embeddings of prompts are {given.shape[-1]} wide ({name}), and the model takes {part.shape[-1]}; set "
                "prompts.cache to those of this model"
            )


def prompted_velocity(model: FlowModel, embeddings: Any) -> ConditionedVelocity:
    """The velocity of ``model`` for the prompts of a batch, guided where their embeddings are.

    They go to where the model computes, once.
    """
    embeddings = embeddings.to(model.device, next(model.transformer.parameters()).dtype)
    if isinstance(embeddings, GuidedEmbeddings):
        return GUIDED[embeddings.gradient](model, embeddings)
    return PromptedVelocity(model, embeddings)


def undetached(velocity: ConditionedVelocity) -> ConditionedVelocity:
    """``velocity`` with all of its gradient, whatever part of it is trained on."""
    return GuidedVelocity(velocity.model, velocity.embeddings) if isinstance(velocity, DetachedVelocity) else velocity


@dataclass(frozen=True)
class PromptedVelocity:
    """One velocity a sample: models distilled to take the guidance scale as an input need no other."""

    model: FlowModel
    embeddings: Any

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        return _velocity(self.model, latents, sigma, self.embeddings)

    def select(self, samples: Tensor) -> PromptedVelocity:
        return PromptedVelocity(self.model, self.embeddings[samples])


@dataclass(frozen=True)
class GuidedVelocity:
    """Two velocities a sample, combined: a `leapalign.surrogate.BranchedVelocity`."""

    model: FlowModel
    embeddings: GuidedEmbeddings

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        return self._combined(*self._both(latents, sigma))

    def select(self, samples: Tensor) -> GuidedVelocity:
        return replace(self, embeddings=self.embeddings[samples])

    def branches(self, latents: Tensor, sigma: Tensor, cotangent: Tensor) -> list[tuple[VelocityFn, Tensor]]:
        """The two velocities and what each gets of ``cotangent``, or the combined one where one forward holds both.

        Where the model combines them otherwise than linearly, what they get depends on their values: two more forwards.
        """
        if self.embeddings.batched:
            return [(self, cotangent)]
        if not isinstance(self.model, GuidingModel):
            scale = self.embeddings.scale
            return [(self._prompt, scale * cotangent), (self._negative, (1 - scale) * cotangent)]
        with torch.no_grad():
            values = self._both(latents, sigma)
        with torch.enable_grad():
            prompt, negative = (value.detach().requires_grad_() for value in values)
            combined = self._combined(prompt, negative)
        shares = torch.autograd.grad(combined, (prompt, negative), cotangent.to(combined.dtype))
        return list(zip((self._prompt, self._negative), shares, strict=True))

    def _combined(self, prompt: Tensor, negative: Tensor) -> Tensor:
        scale = self.embeddings.scale
        if isinstance(self.model, GuidingModel):
            return self.model.guide(prompt, negative, scale)
        return negative + scale * (prompt - negative)

    def _both(self, latents: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if not self.embeddings.batched:
            return self._prompt(latents, sigma), self._negative(latents, sigma)
        embeddings = self.embeddings.prompts.followed_by(self._negatives(len(latents)))
        velocity = _velocity(self.model, torch.cat([latents, latents]), torch.cat([sigma, sigma]), embeddings)
        prompt, negative = velocity.chunk(2)
        return prompt, negative

    def _prompt(self, latents: Tensor, sigma: Tensor) -> Tensor:
        return _velocity(self.model, latents, sigma, self.embeddings.prompts)

    def _negative(self, latents: Tensor, sigma: Tensor) -> Tensor:
        return _velocity(self.model, latents, sigma, self._negatives(len(latents)), "negative")

    def _negatives(self, count: int) -> Any:
        return self.embeddings.negative.repeated(count)


@dataclass(frozen=True)
class DetachedVelocity(GuidedVelocity):
    """A `GuidedVelocity` whose gradient goes through the prompt's velocity alone: ``scale`` times that one's."""

    def __call__(self, latents: Tensor, sigma: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().__call__(latents, sigma)
        with torch.no_grad():
            negative = self._negative(latents, sigma)
        return self._combined(self._prompt(latents, sigma), negative)

    def branches(self, latents: Tensor, sigma: Tensor, cotangent: Tensor) -> list[tuple[VelocityFn, Tensor]]:
        """The prompt's velocity; of a weighted sum it does not depend on the negative one, which is left out."""
        if isinstance(self.model, GuidingModel):
            return [(self, cotangent)]
        return [(self._prompt, self.embeddings.scale * cotangent)]


def _velocity(model: FlowModel, latents: Tensor, sigma: Tensor, embeddings: Any, of: str = "prompt") -> Tensor:
    with cache_of(model.transformer, of):
        return model.velocity(latents, sigma, embeddings)


GUIDED: Mapping[CfgGradient, type[GuidedVelocity]] = {"full": GuidedVelocity, "detached": DetachedVelocity}
"""By which velocities carry gradient."""
