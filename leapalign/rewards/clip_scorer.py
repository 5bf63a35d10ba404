"""Scores by a CLIP model of transformers: the cosine of image and prompt embeddings, on one scale or another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, PreTrainedTokenizerBase

from leapalign.inputs.hub import unreadable
from leapalign.inputs.networks import read_network
from leapalign.inputs.prompt_limits import PromptLimit
from leapalign.inputs.tokenizers import read_tokenizer
from leapalign.rewards.preprocessing import cover, normalised, unit_vectors
from leapalign.storage.embedded import resolve

Scale = Literal["cosine", "x100", "logit", "probability"]
"""``cosine``; ``x100``, 100 times that; ``logit``, ``cosine * exp(logit_scale)``; ``probability``,
``sigmoid(logit + logit_bias)``."""


class ClipScorer(torch.nn.Module):
    """``(images (B, 3, H, W) in [0, 1], prompts) -> (B,)``, differentiable in the images."""

    def __init__(
        self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase, image_processor: CLIPImageProcessor, scale: Scale
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.side = int(model.config.vision_config.image_size)
        self.scale = scale

    @property
    def highest(self) -> float:
        """No score lies above it."""
        return {
            "cosine": 1.0,
            "x100": 100.0,
            "logit": float(self.model.logit_scale.exp()),
            "probability": 1.0,
        }[self.scale]

    @property
    def prompt_limit(self) -> PromptLimit:
        """Of a prompt the model reads as many tokens as it has positions."""
        return PromptLimit.of(self.tokenizer, self.model.config.text_config.max_position_embeddings, self.text)

    def text(self, prompt: str) -> str:
        """What the tokenizer is given of ``prompt``."""
        return prompt

    def fit(self, images: Tensor) -> Tensor:
        """``(B, 3, S, S)`` at the model's size: short side to it (bicubic, antialiased), centre crop."""
        return cover(images, self.side)

    def preprocess(self, images: Tensor) -> Tensor:
        """``(B, 3, S, S)`` as the model's own image processor makes them, fitted and normalised; from any device."""
        return normalised(
            self.fit(images.to(self.model.device)), self.image_processor.image_mean, self.image_processor.image_std
        )

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors ``(B, D)``."""
        pixels = self.preprocess(images).to(self.model.dtype)
        return unit_vectors(self.model.get_image_features(pixel_values=pixels).pooler_output)

    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors ``(B, D)``; prompts are cut to the model's length."""
        tokens = self.tokenizer(
            [self.text(prompt) for prompt in prompts],
            padding="max_length",
            truncation=True,
            max_length=self.prompt_limit.tokens,
            return_tensors="pt",
        ).to(self.model.device)
        features = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return unit_vectors(features.pooler_output)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = (self.embed_images(images) * self.embed_prompts(prompts)).sum(dim=-1)
        if self.scale == "cosine":
            return cosine
        if self.scale == "x100":
            return 100 * cosine
        logit = cosine * self.model.logit_scale.exp()
        return logit if self.scale == "logit" else (logit + self.model.config.logit_bias).sigmoid()


def read_clip(path: str, processor: str | None, dtype: str) -> tuple[CLIPModel, Any, CLIPImageProcessor]:
    """Model at ``path``, tokenizer and image processor at ``processor`` (default ``path``): folders or hub ids.

    Raises UserError where they cannot be read.
    """
    setting = "reward.processor" if processor else "reward.path"
    path, processor = resolve(path), resolve(processor or path)
    tokenizer = read_tokenizer(processor, "the tokenizer", setting)
    try:
        image_processor = CLIPImageProcessor.from_pretrained(processor)
    except Exception as error:  # what damaged files make the library raise has no common type
        raise unreadable(error, processor, setting, f"cannot load the image processor of '{processor}'") from None
    return read_network(CLIPModel, path, getattr(torch, dtype), "the reward", "reward.path"), tokenizer, image_processor
