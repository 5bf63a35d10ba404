"""The held-out reward of the tiny world: a convolutional scorer that no training run optimises.

Independent of the trained reward in data (its own generated images), architecture (convolutions and a GRU, no
shared embedding space) and resolution (it sees every pixel).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from leapalign.rewards.preprocessing import cover
from leapalign.storage.embedded import FOLDER
from leapalign.storage.modes import save_file
from leapalign.tiny.model import MAX_TOKENS, SPECIAL, WORDS, build_tokenizer
from leapalign.tiny.world import IMAGE_SIZE

WEIGHTS = "model.safetensors"


class Critic(nn.Module):
    """``(images (B, 3, 64, 64) in [0, 1], prompts) -> (B,)``, probability that the image satisfies the prompt."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.image_encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 4, stride=2, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 4, stride=2, padding=1),
            nn.GroupNorm(4, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, width, 1),
            nn.Flatten(),
            nn.Linear(16 * width, width),
        )
        self.words = nn.Embedding(len(SPECIAL) + len(WORDS), width)
        self.text_encoder = nn.GRU(width, width, batch_first=True)
        self.head = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 1))

    def encode_images(self, images: Tensor) -> Tensor:
        return self.image_encoder(2 * images - 1)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        tokens = self.tokenizer(list(prompts), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
        return self.text_encoder(self.words(tokens.input_ids))[1][0]

    def compare(self, image: Tensor, text: Tensor) -> Tensor:
        """Logits of encoded pairs, ``(..., width)`` each, broadcast against one another."""
        image, text = torch.broadcast_tensors(image, text)
        return self.head(torch.cat([image, text, image * text], dim=-1)).squeeze(-1)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.compare(self.encode_images(images), self.encode_text(prompts)).sigmoid()

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> Critic:
        critic = cls()
        critic.load_state_dict(load_file(folder / WEIGHTS))
        return critic.eval().requires_grad_(False)


@functools.cache
def embedded_critic() -> Critic:
    return Critic.load(FOLDER / "critic")


def critic(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The embedded critic as a reward of a config, ``{name: custom, function: "leapalign.tiny.critic:critic"}``; images
    of another size are brought to its own."""
    return embedded_critic()(cover(images, IMAGE_SIZE), prompts)
