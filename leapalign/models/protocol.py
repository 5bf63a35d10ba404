"""What a backbone family has to offer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from leapalign.config import ModelConfig, SigmaSpacing
from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.folder import Parts
from leapalign.models.text_encoders import Residence, TextEncoder
from leapalign.models.text_length import TextLength


class Family(Protocol):
    """A class of models; one file in this folder."""

    def assemble(self, parts: Parts, config: ModelConfig) -> FlowModel:
        """The model of ``parts``. Raises UserError where one cannot be read, or the size of images does not fit."""
        ...

    text_length: TextLength
    """How much of a prompt it reads."""

    def text_encoders(self, folder: str, residence: Residence, tokens: int) -> Iterator[TextEncoder]:
        """One encoder after the other, each gone when the next is loaded, which read ``tokens`` of a prompt.

        Raises UserError where there are none.
        """
        ...


class FlowModel(Protocol):
    """One flow-matching model at one resolution."""

    device: torch.device
    """Where it computes: noise is drawn for it, and latents stay there."""

    @property
    def transformer(self) -> torch.nn.Module:
        """The network that is trained."""
        ...

    @property
    def decoder(self) -> torch.nn.Module | None:
        """The network that makes images of latents; None where latents are images."""
        ...

    def blank_embeddings(self, count: int, tokens: int) -> PromptEmbeddings:
        """Embeddings of nothing for ``count`` prompts, as long as those of a tokenizer that allows ``tokens``."""
        ...

    def draw_noise(self, seeds: Sequence[int]) -> Tensor:
        """Latents ``(len(seeds), ...)`` at ``sigma = 1``, one seed an image."""
        ...

    def sigmas(self, num_steps: int, spacing: SigmaSpacing = "pipeline") -> Tensor:
        """Noise levels ``(num_steps + 1,)`` for the model's resolution, descending to 0: its pipeline's, or linear."""
        ...

    def velocity(self, latents: Tensor, sigma: Tensor, embeddings: PromptEmbeddings) -> Tensor:
        """Velocity, guidance included, of ``latents (B, ...)`` at per-sample ``sigma (B,)``."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)``, about [0, 1], differentiable."""
        ...


@runtime_checkable
class GuidingModel(FlowModel, Protocol):
    """A model whose classifier-free guidance is no weighted sum of two velocities."""

    def guide(self, prompt: Tensor, negative: Tensor, scale: float) -> Tensor:
        """The guided velocity for those of the prompt and of the negative prompt, all ``(B, ...)``."""
        ...
