"""The text encoders of the tiny FLUX, and how they learn to read before the base learns to draw, as real ones have.

Trained with the base they stay bags of words: "a circle left of a square" and "a square left of a circle" end up with
the same embeddings, and the base binds no colour and no place.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from leapalign.models.embeddings import PromptEmbeddings
from leapalign.tiny.descent import descend
from leapalign.tiny.model import (
    MAX_TOKENS,
    TEXT_WIDTH,
    build_pooled_encoder,
    build_token_encoder,
    build_tokenizer,
)
from leapalign.tiny.scenes import KINDS, satisfying_scenes
from leapalign.tiny.world import CELLS, Prompt, all_prompts, draw_prompts

STEPS, BATCH = 2000, 64
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class TextEncoders:
    """FLUX.1's two, at tiny size."""

    pooled: CLIPTextModel = field(default_factory=build_pooled_encoder)
    tokens: T5EncoderModel = field(default_factory=build_token_encoder)
    tokenizer: PreTrainedTokenizerFast = field(default_factory=build_tokenizer)

    def encode(self, captions: Sequence[str]) -> PromptEmbeddings:
        """Embeddings as ``FluxPipeline.encode_prompt`` computes them: padded, without an attention mask."""
        ids = self.tokenizer(list(captions), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
        return PromptEmbeddings(
            {"pooled": self.pooled(ids).pooler_output, "tokens": self.tokens(ids).last_hidden_state}
        )


def contents(prompt: Prompt) -> Tensor:
    """``(cells, kinds)``: how likely each kind is in each cell of a scene that satisfies ``prompt``."""
    return F.one_hot(satisfying_scenes(prompt), len(KINDS)).float().mean(dim=0)


class Reader(nn.Module):
    """Says what a caption puts where, from the embedding of the whole, and from those of its words one by one: what
    depends on two words has to be in one of them."""

    def __init__(self) -> None:
        super().__init__()
        cells = len(CELLS) * len(KINDS)
        self.of_pooled = nn.Linear(TEXT_WIDTH, cells)
        self.of_tokens = nn.Sequential(nn.Linear(TEXT_WIDTH, 128), nn.ReLU(), nn.Linear(128, cells))

    def forward(self, embeddings: PromptEmbeddings) -> tuple[Tensor, Tensor]:
        """Logits ``(B, cells, kinds)`` of either."""
        pooled = self.of_pooled(embeddings.parts["pooled"])
        tokens = self.of_tokens(embeddings.parts["tokens"]).sum(dim=1)
        return pooled.unflatten(1, (len(CELLS), len(KINDS))), tokens.unflatten(1, (len(CELLS), len(KINDS)))


def train_text_encoders(seed: int, log: Callable[[str], None]) -> TextEncoders:
    """Encoders that can read, frozen."""
    torch.manual_seed(seed)
    rng, encoders, reader = random.Random(seed), TextEncoders(), Reader()
    wanted = {prompt: contents(prompt) for prompt in all_prompts()}
    weights = [*encoders.pooled.parameters(), *encoders.tokens.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for step in range(1, STEPS + 1):
        prompts = draw_prompts(all_prompts(), BATCH, rng)
        target = torch.stack([wanted[prompt] for prompt in prompts])
        found = reader(encoders.encode([prompt.text for prompt in prompts]))
        losses = [divergence(logits, target) for logits in found]
        descend(sum(losses, torch.zeros(())), weights, optimizer, schedule)
        if step == 1 or step % 500 == 0 or step == STEPS:
            log(f"step {step} divergence of pooled {losses[0].item():.4f}, of tokens {losses[1].item():.4f}")
    for encoder in (encoders.pooled, encoders.tokens):
        encoder.eval().requires_grad_(False)
    return encoders


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """``mean_cells KL(target | softmax(logits))``, ``(B, cells, kinds)`` each: 0 where all is read."""
    return F.kl_div(logits.log_softmax(dim=-1), target, reduction="none").sum(dim=-1).mean()
