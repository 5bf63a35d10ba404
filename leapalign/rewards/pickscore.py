"""PickScore (arXiv 2305.01569): a CLIP model trained on human preferences; the tiny world's reward is one too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from leapalign.inputs.paths import PathText
from leapalign.inputs.validation import UserError
from leapalign.reward_gradient import RewardFn
from leapalign.rewards.clip_scorer import ClipScorer, read_clip
from leapalign.rewards.simulated import VIT_H_14, clip_config, simulated_clip


@dataclass(frozen=True)
class PickScore:
    """Cosine of image and prompt embeddings."""

    path: PathText = "yuvalkirstain/PickScore_v1"
    """Folder or hub id of the CLIP model."""
    processor: PathText | None = None
    """Folder or hub id of its tokenizer and image processor; null: ``path``."""
    scale: Literal["cosine", "logit", "probability"] = "cosine"
    """``cosine``: about 0.2 for PickScore, what the papers' thresholds refer to; ``logit``: cosine times the model's
    ``exp(logit_scale)``, about 100, the 20-24 that papers print; ``probability``: ``sigmoid(logit + logit_bias)``, for
    models whose config holds a ``logit_bias``."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the model's weights and arithmetic."""

    def load(self) -> RewardFn:
        """The reward with frozen weights. Raises UserError where the files cannot be read."""
        model, tokenizer, image_processor = read_clip(self.path, self.processor, self.dtype)
        if self.scale == "probability" and not hasattr(model.config, "logit_bias"):
            raise UserError(f"'{self.path}' has no logit_bias in its config; choose reward.scale cosine or logit")
        return ClipScorer(model, tokenizer, image_processor, self.scale)

    def simulated(self) -> nn.Module:
        """As large as the model in the folder ``path``, else as PickScore's."""
        return simulated_clip(clip_config(self.path, VIT_H_14), self.dtype)
