"""What text encoders make of prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class PromptEmbeddings:
    """Named tensors with a row for each prompt; which, a model's family decides."""

    parts: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, samples: Tensor | slice) -> PromptEmbeddings:
        return PromptEmbeddings({name: part[samples] for name, part in self.parts.items()})

    def tensors(self) -> list[Tensor]:
        """All parts."""
        return list(self.parts.values())

    def followed_by(self, other: PromptEmbeddings) -> PromptEmbeddings:
        """These, then those of ``other``."""
        return joined([self, other])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> PromptEmbeddings:
        """On ``device``, and what is no count or mask in ``dtype`` (None: as it is)."""
        return PromptEmbeddings(
            {name: part.to(device, dtype if part.is_floating_point() else None) for name, part in self.parts.items()}
        )


def joined(embeddings: Sequence[PromptEmbeddings]) -> PromptEmbeddings:
    """All prompts of ``embeddings``, one after the other; shorter ones are padded with zeros, as their mask is."""
    return PromptEmbeddings(
        {name: torch.cat(_of_one_length([one.parts[name] for one in embeddings])) for name in embeddings[0].parts}
    )


def _of_one_length(parts: list[Tensor]) -> list[Tensor]:
    """``parts (B, L, ...)``, padded to the longest ``L``; others, of a number each, are as they are."""
    if parts[0].dim() == 1:
        return parts
    longest = max(part.shape[1] for part in parts)
    return [pad(part, (*(0, 0) * (part.dim() - 2), 0, longest - part.shape[1])) for part in parts]
