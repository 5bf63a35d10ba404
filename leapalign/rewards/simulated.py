"""Rewards as `leapalign memory` sees them: their classes at full size on fake tensors, with nothing read but sizes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, CLIPConfig, CLIPImageProcessor

from leapalign.inputs.validation import UserError, brief
from leapalign.rewards.clip_scorer import ClipScorer
from leapalign.storage.embedded import resolve

SKELETONS = Path(__file__).parent / "skeletons"
VIT_H_14 = SKELETONS / "vit_h_14"
"""Sizes of CLIP ViT-H/14: of HPSv2.1 and PickScore."""
VIT_L_14 = SKELETONS / "vit_l_14"
"""Sizes of OpenAI's CLIP ViT-L/14."""
QWEN2_VL_7B = SKELETONS / "qwen2_vl_7b"
"""Sizes of Qwen2-VL-7B with HPSv3's vocabulary."""


@dataclass
class Words:
    """Stands for a tokenizer: every prompt is as long as allowed."""

    length: int

    def __call__(self, prompts: Sequence[str], **_: Any) -> Tokens:
        return Tokens(torch.zeros(len(prompts), self.length, dtype=torch.int64))


@dataclass
class Tokens:
    input_ids: Tensor

    @property
    def attention_mask(self) -> Tensor:
        return torch.ones_like(self.input_ids)

    def to(self, device: torch.device) -> Tokens:
        return Tokens(self.input_ids.to(device))


def clip_config(path: str, published: Path) -> CLIPConfig:
    """Sizes of the CLIP model at ``path`` where that is a folder of one, else those in the folder ``published``.

    Raises UserError where they cannot be read.
    """
    folder = Path(resolve(path))
    try:
        return CLIPConfig.from_pretrained(folder if os.path.isfile(folder / "config.json") else published)
    except Exception as error:  # wrong values in a config make the class raise anything
        raise UserError(f"cannot read the config.json in '{folder}' ({brief(error)}); check reward.path") from None


def simulated_clip(config: CLIPConfig, dtype: str) -> ClipScorer:
    """A scorer of these sizes."""
    # Models on fake tensors cannot be cast: they are built in their dtype.
    model = AutoModel.from_config(config, dtype=getattr(torch, dtype))
    return ClipScorer(model, Words(config.text_config.max_position_embeddings), CLIPImageProcessor(), "cosine")
