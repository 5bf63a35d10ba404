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

    def to(self, device: torch.device, dtype: torch.dtype) -> PromptEmbeddings:
        """On ``device``, and what is no count or mask in ``dtype``."""
        return PromptEmbeddings(
            {name: part.to(device, dtype if part.is_floating_point() else None) for name, part in self.parts.items()}
        )


def joined(embeddings: Sequence[PromptEmbeddings]) -> PromptEmbeddings:
    """All prompts of ``embeddings``, one after the other.

    Those of fewer tokens than others (dimension 1) get zeros behind, which in a mask say that there is nothing.
    """
    return PromptEmbeddings({name: _stacked([one.parts[name] for one in embeddings]) for name in embeddings[0].parts})


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    if parts[0].dim() < 2:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    return torch.cat([pad(part, (0, 0) * (part.dim() - 2) + (0, longest - part.shape[1])) for part in parts])
