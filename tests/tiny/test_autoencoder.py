"""The autoencoder of the tiny world: what it is trained on, and what the shipped one makes of noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from leapalign.models.flux import FluxModel
from leapalign.storage.embedded import FOLDER
from leapalign.tiny import train_autoencoder as training
from leapalign.tiny.judge import detect
from leapalign.tiny.model import build_scheduler, build_transformer, encoded


@pytest.fixture(scope="module")
def shipped() -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(FOLDER / "base" / "vae")


def test_any_scenes_are_from_empty_to_full() -> None:
    found = [len(detect(image.numpy()).objects) for image in training.any_scenes(64, torch.Generator().manual_seed(0))]
    assert set(found) == {0, 1, 2, 3, 4}


def test_edges_count_beside_the_error_itself() -> None:
    flat, striped = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    striped[..., ::2] = 0.2
    even = torch.full((1, 3, 4, 4), 0.1)
    assert training.picture_loss(even, flat).item() == pytest.approx(0.1 + 2 * 0.01)
    assert training.picture_loss(striped, flat).item() == pytest.approx(0.1 + 2 * 0.02 + 0.5 * 0.2)


def test_latents_are_kept_near_unit_size() -> None:
    assert training.spread_loss(torch.full((2, 2), 0.5)).item() == pytest.approx(0.25e-3)
    assert training.spread_loss(torch.full((2, 2), 2.0)).item() == pytest.approx(4e-3 + 3e-2)


def test_training_scales_latents_to_unit_deviation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "STEPS", 2)
    training.train_autoencoder(tmp_path, 0, print)
    trained = AutoencoderKL.from_pretrained(tmp_path)
    latents = encoded(trained, training.any_scenes(256, torch.Generator().manual_seed(7)))
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    assert latents.mean().item() == pytest.approx(0, abs=0.1)


def test_the_shipped_one_draws_clean_pictures_of_noisy_latents(shipped: AutoencoderKL) -> None:
    clean, noisy = training.noise_errors(shipped)[:2]
    assert clean < 0.004
    assert noisy < 0.005


def test_encoded_and_decoded_by_the_model_is_the_picture(shipped: AutoencoderKL) -> None:
    images = training.any_scenes(8, torch.Generator().manual_seed(3))
    model = FluxModel(build_transformer(), build_scheduler(), 64, 64, shipped)
    with torch.no_grad():
        assert (model.decode(encoded(shipped, images)) - images).abs().mean() < 0.005
