"""LAION's aesthetic score: layers without activations on OpenAI's CLIP ViT-L/14, trained on people's ratings."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from leapalign.inputs.networks import read_network
from leapalign.inputs.paths import PathText
from leapalign.reward_gradient import RewardFn
from leapalign.rewards.checkpoint_files import find_file, load_tensors, read_tensors
from leapalign.rewards.preprocessing import cover, normalised, unit_vectors
from leapalign.rewards.simulated import VIT_L_14, clip_config
from leapalign.storage.embedded import resolve

PUBLISHED = "sac+logos+ava1-l14-linearMSE.pth"
HEAD = {"0": 1024, "2": 128, "4": 64, "6": 16, "7": 1}
"""The head's layers and how wide they are; the numbers between were dropout."""


@dataclass(frozen=True)
class Aesthetic:
    """How much people like the look of an image, about 1 to 10, whatever the prompt."""

    path: PathText
    """The head, ``sac+logos+ava1-l14-linearMSE.pth`` of the repository improved-aesthetic-predictor, its folder, or a
    hub id."""
    tower: PathText = "openai/clip-vit-large-patch14"
    """Folder or hub id of the CLIP model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the tower; the head is in float32."""

    def load(self) -> RewardFn:
        """The reward with frozen weights. Raises UserError where the files cannot be read or do not fit together."""
        file = find_file(resolve(self.path), (PUBLISHED,))
        tensors = read_tensors(file)
        folder = resolve(self.tower)
        kind, dtype = CLIPVisionModelWithProjection, getattr(torch, self.dtype)
        scorer = AestheticScorer(read_network(kind, folder, dtype, "a CLIP model", "reward.tower"))
        load_tensors(scorer.head, tensors, file)
        return scorer

    def simulated(self) -> nn.Module:
        """As large as the model in the folder ``tower``, else as CLIP ViT-L/14."""
        config = clip_config(self.tower, VIT_L_14).vision_config
        return AestheticScorer(CLIPVisionModelWithProjection._from_config(config, dtype=getattr(torch, self.dtype)))


class AestheticScorer(nn.Module):
    """``(images (B, 3, H, W) in [0, 1], prompts) -> (B,)``, differentiable in the images."""

    def __init__(self, tower: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.tower = tower
        self.head = nn.ModuleDict({"layers": _layers(tower.config.projection_dim)})
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        # The head was trained behind OpenAI's own transform, which is torchvision's.
        pixels = normalised(cover(images, self.tower.config.image_size, centre=round))
        embeddings = unit_vectors(self.tower(pixel_values=pixels.to(self.tower.dtype)).image_embeds)
        score: Tensor = self.head["layers"](embeddings).squeeze(-1)
        return score


def _layers(width: int) -> nn.Sequential:
    widths = pairwise((width, *HEAD.values()))
    layers: Any = OrderedDict((name, nn.Linear(*pair)) for name, pair in zip(HEAD, widths, strict=True))
    return nn.Sequential(layers)
