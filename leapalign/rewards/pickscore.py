"""PickScore (arXiv 2305.01569): a CLIP model trained on human preferences; the tiny world's reward is one too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from leapalign.embedded import resolve
from leapalign.reward_gradient import RewardFn, to_unit_range
from leapalign.validation import UserError, brief

Scale = Literal["cosine", "logit", "probability"]


@dataclass(frozen=True)
class PickScore:
    """Cosine of image and prompt embeddings.

    path: folder or hub id of the CLIP model. processor: of its tokenizer and image processor, default ``path``.
    scale: ``cosine`` (about 0.2 for PickScore; what the papers' thresholds refer to); ``logit`` (cosine times the
    model's ``exp(logit_scale)``, about 100: the 20-24 that papers print); or ``probability``,
    ``sigmoid(logit + logit_bias)``, for models whose config holds a ``logit_bias``.
    """

    path: str = "yuvalkirstain/PickScore_v1"
    processor: str | None = None
    scale: Scale = "cosine"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def load(self) -> RewardFn:
        """The reward with frozen weights. Raises UserError where the files cannot be read."""
        path, processor = resolve(self.path), resolve(self.processor or self.path)
        try:
            model = CLIPModel.from_pretrained(path, dtype=getattr(torch, self.dtype))
            tokenizer = AutoTokenizer.from_pretrained(processor)
            image_processor = CLIPImageProcessor.from_pretrained(processor)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot load the reward from '{path}' ({brief(error)}); check reward.path") from None
        if self.scale == "probability" and not hasattr(model.config, "logit_bias"):
            raise UserError(f"'{path}' has no logit_bias in its config; choose reward.scale cosine or logit")
        return ClipScorer(model, tokenizer, image_processor, self.scale)


class ClipScorer(torch.nn.Module):
    """``(images (B, 3, H, W) in [0, 1], prompts) -> (B,)``, differentiable in the images."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: CLIPModel, tokenizer: AutoTokenizer, image_processor: CLIPImageProcessor, scale: str
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.side = int(model.config.vision_config.image_size)
        self.scale = scale
        self.register_buffer("mean", torch.tensor(image_processor.image_mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(image_processor.image_std).view(3, 1, 1))

    def preprocess(self, images: Tensor) -> Tensor:
        """As the model's own image processor: short side to its size (bicubic, antialiased), centre crop, normalised.

        Overshoot of the resize is clipped, as 8-bit pictures clip it, but keeps its gradient. From any device.
        """
        images = images.to(self.mean.device)
        height, width = images.shape[-2:]
        size = (int(height * self.side / min(height, width)), int(width * self.side / min(height, width)))
        images = to_unit_range(F.interpolate(images, size, mode="bicubic", antialias=True))
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        images = images[..., top : top + self.side, left : left + self.side]
        return (images - self.mean) / self.std

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors ``(B, D)``."""
        features = self.model.get_image_features(
            pixel_values=self.preprocess(images).to(self.model.dtype)
        ).pooler_output
        return _unit(features)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors ``(B, D)``."""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        tokens = tokens.to(self.mean.device)
        features = self.model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output
        return _unit(features)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = (self.embed_images(images) * self.embed_prompts(prompts)).sum(dim=-1)
        if self.scale == "cosine":
            return cosine
        logit = cosine * self.model.logit_scale.exp()
        return logit if self.scale == "logit" else (logit + self.model.config.logit_bias).sigmoid()


def _unit(features: Tensor) -> Tensor:
    """Unit vectors, in float32 or wider."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
