"""What text encoders make of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class PromptEmbeddings:
    """Named tensors with a row for each prompt; which, a model's family decides.

    on_host: of parts on a device, masks and counts as the host has them. What decides what runs is read there, see
    `known`: reading it on the device would have the host wait, at each step.
    """

    parts: Mapping[str, Tensor]
    on_host: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.parts.values())))

    def __getitem__(self, samples: Tensor | slice) -> PromptEmbeddings:
        """Of the prompts ``samples``, positions ``(N,)`` int64 in host memory, repeats allowed."""
        if isinstance(samples, slice):
            return self._each(lambda part: part[samples])
        # Row by row: positions as a tensor would be copied to where the parts are.
        rows = samples.tolist()
        return self._each(lambda part: torch.stack([part[row] for row in rows]))

    def repeated(self, count: int) -> PromptEmbeddings:
        """Those of the first prompt, ``count`` times."""
        return self._each(lambda part: part[:1].repeat(count, *[1] * (part.dim() - 1)))

    def known(self, name: str) -> Tensor:
        """The mask or the counts called ``name``, in host memory."""
        return self.on_host.get(name, self.parts[name])

    def tensors(self) -> list[Tensor]:
        """All parts."""
        return list(self.parts.values())

    def followed_by(self, other: PromptEmbeddings) -> PromptEmbeddings:
        """These, then those of ``other``."""
        return joined([self, other])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> PromptEmbeddings:
        """On ``device``, and what is no count or mask in ``dtype`` (None: as it is)."""
        decisive = [name for name, part in self.parts.items() if not part.is_floating_point()]
        return PromptEmbeddings(
            {name: part.to(device, dtype if part.is_floating_point() else None) for name, part in self.parts.items()},
            {} if device.type == "cpu" else {name: self.known(name).cpu() for name in decisive},
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> PromptEmbeddings:
        return PromptEmbeddings(
            {name: change(part) for name, part in self.parts.items()},
            {name: change(part) for name, part in self.on_host.items()},
        )


def joined(embeddings: Sequence[PromptEmbeddings]) -> PromptEmbeddings:
    """All prompts of ``embeddings``, one after the other; shorter ones are padded with zeros, as their mask is."""
    return PromptEmbeddings(_joined([one.parts for one in embeddings]), _joined([one.on_host for one in embeddings]))


def _joined(named: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat(_of_one_length([parts[name] for parts in named])) for name in named[0]}


def _of_one_length(parts: list[Tensor]) -> list[Tensor]:
    """``parts (B, L, ...)``, padded to the longest ``L``; others, of a number each, are as they are."""
    if parts[0].dim() == 1:
        return parts
    longest = max(part.shape[1] for part in parts)
    return [pad(part, (*(0, 0) * (part.dim() - 2), 0, longest - part.shape[1])) for part in parts]
