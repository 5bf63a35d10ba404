"""How the tiny text encoders learn to read, and that the shipped ones bind words to one another."""

from __future__ import annotations

import math

import pytest
import torch

from leapalign.config import load_config
from leapalign.config.profiles import profiles
from leapalign.models import encode_prompts
from leapalign.tiny import train_text_encoders as training
from leapalign.tiny.scenes import KINDS
from leapalign.tiny.world import prompts_by_text

RED_CIRCLE = KINDS.index(("circle", "red"))


def test_contents_are_the_shares_of_scenes_that_satisfy() -> None:
    one = training.contents(prompts_by_text()["a red circle"])
    assert one[:, RED_CIRCLE].tolist() == [0.25] * 4
    assert one[:, 0].tolist() == [0.75] * 4
    left = training.contents(prompts_by_text()["a circle left of a square"])
    circles = [number for number, kind in enumerate(KINDS) if kind and kind[0] == "circle"]
    torch.testing.assert_close(left[:, circles].sum(dim=1), torch.tensor([0.5, 0.0, 0.5, 0.0]))
    torch.testing.assert_close(left.sum(dim=1), torch.ones(4))


def test_divergence_is_zero_where_all_is_read_and_that_of_a_guess_else() -> None:
    target = training.contents(prompts_by_text()["a red circle"])[None]
    assert training.divergence(target.clamp(min=1e-9).log(), target).item() == pytest.approx(0, abs=1e-6)
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    guess = training.divergence(torch.zeros(1, 4, len(KINDS)), target)
    assert guess.item() == pytest.approx(math.log(len(KINDS)) - entropy)


def test_training_learns_and_leaves_frozen_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STEPS", 100)
    lines: list[str] = []
    encoders = training.train_text_encoders(0, lines.append)
    first, last = (float(line.split("pooled ")[1].split(",")[0]) for line in (lines[0], lines[-1]))
    assert last < 0.8 * first
    for encoder in (encoders.pooled, encoders.tokens):
        assert not encoder.training
        assert not any(weight.requires_grad for weight in encoder.parameters())


def test_the_shipped_embeddings_of_a_word_depend_on_what_it_stands_beside() -> None:
    """Words alone bind no place and no colour."""
    pairs = [
        ("a circle left of a square", "a circle right of a square"),
        ("a red circle and a blue square", "a blue circle and a red square"),
    ]
    config = load_config(profiles()["tiny"])
    for texts in pairs:
        embeddings = encode_prompts(config.model, list(texts))
        first, second = embeddings.parts["tokens"]
        word = 1 if "left" in texts[0] else 2
        assert (first[word] - second[word]).norm() > 0.2 * first[word].norm()
        pooled = embeddings.parts["pooled"]
        assert (pooled[0] - pooled[1]).norm() > 0.2 * pooled[0].norm()
