"""Prompts, and caches of their embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from leapalign.config import ModelConfig
from leapalign.models.embeddings import PromptEmbeddings
from leapalign.prompts.filling import fill_cache
from leapalign.tiny.world import COLORS, SHAPES

CPU = torch.device("cpu")


ENCODERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def prompts_of(count: int) -> list[str]:
    """All different, also for the tiny model's tokenizer in most cases."""
    colors, shapes = list(COLORS), list(SHAPES)
    return [
        f"a {colors[n % len(colors)]} {shapes[n // 7 % len(shapes)]} and {n} {colors[n // 3 % len(colors)]}"
        for n in range(count)
    ]


def write(path: Path, prompts: list[str]) -> Path:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    return path


def filled(tmp_path: Path, model: ModelConfig, prompts: list[str]) -> dict[str, Any]:
    return fill_cache(tmp_path / "cache", model, write(tmp_path / "prompts.txt", prompts), CPU)


def assert_equal(found: PromptEmbeddings, expected: PromptEmbeddings) -> None:
    assert found.parts.keys() == expected.parts.keys()
    for name, part in expected.parts.items():
        assert found.parts[name].dtype == part.dtype
        assert torch.equal(found.parts[name], part), name
