"""Rotary embeddings of HPSv3's two towers, in the dtype that its own code gives them.

That code casts the whole model to bfloat16, and with it the frequencies: at a distance of 500 tokens an angle is up to
0.58 rad off, and the published weights were trained so.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Qwen2VLModel


def cast_rotary(model: Qwen2VLModel, dtype: torch.dtype) -> None:
    """Frequencies of both towers in ``dtype``, and the angles of the image tower."""
    model.language_model.rotary_emb.to(dtype)
    model.visual.rotary_pos_emb = VisionRotary(model.visual.rotary_pos_emb.inv_freq.to(dtype))


class VisionRotary(nn.Module):
    """Angles are computed in the dtype of the frequencies, as transformers 4.45 did; newer ones widen them first.

    Those of the text tower are in float32 in either.
    """

    inv_freq: Tensor

    def __init__(self, frequencies: Tensor) -> None:
        """frequencies: ``(F,)``."""
        super().__init__()
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``(N, 4 F)`` for patches at rows and columns ``position_ids (N, 2)``; ``x`` is not used."""
        angles = position_ids[..., None].to(self.inv_freq.dtype) * self.inv_freq
        angles = angles.flatten(1).repeat(1, 2)
        return angles.cos(), angles.sin()
