"""CLIPScore (arXiv 2104.08718): how well an image goes with its prompt, by a CLIP model as it was published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from leapalign.inputs.paths import PathText
from leapalign.reward_gradient import RewardFn
from leapalign.rewards.clip_scorer import ClipScorer, read_clip
from leapalign.rewards.simulated import VIT_L_14, clip_config, simulated_clip


@dataclass(frozen=True)
class CLIPScore:
    """Cosine of image and prompt embeddings, not cut off at zero."""

    path: PathText = "openai/clip-vit-large-patch14"
    """Folder or hub id of the CLIP model."""
    processor: PathText | None = None
    """Folder or hub id of its tokenizer and image processor; null: ``path``."""
    scale: Literal["cosine", "x100"] = "x100"
    """``x100``: 100 times the cosine (20 to 40, as printed)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model's weights and arithmetic."""

    def load(self) -> RewardFn:
        """The reward with frozen weights. Raises UserError where the files cannot be read."""
        return ClipScorer(*read_clip(self.path, self.processor, self.dtype), self.scale)

    def simulated(self) -> nn.Module:
        """As large as the model in the folder ``path``, else as CLIP ViT-L/14."""
        return simulated_clip(clip_config(self.path, VIT_L_14), self.dtype)
