"""Models that a configuration may name without their files being here."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

from leapalign.planning.model_skeleton import KNOWN_MODELS

AUTOENCODER = 83_819_683
"""Parameters that Stability AI's files hold besides: those of the VAE."""
PUBLISHED_BYTES = {
    "black-forest-labs/FLUX.1-dev": 23_802_932_552,
    "black-forest-labs/FLUX.1-schnell": 23_782_506_688,
    "black-forest-labs/FLUX.2-klein-4B": 7_751_105_712,
    "black-forest-labs/FLUX.2-klein-base-4B": 7_751_105_712,
    "black-forest-labs/FLUX.2-klein-9B": 18_157_185_168,
    "black-forest-labs/FLUX.2-klein-base-9B": 18_157_185_168,
    "stabilityai/stable-diffusion-3.5-large": 16_460_379_262,
    "stabilityai/stable-diffusion-3.5-medium": 5_107_104_286,
    "Tongyi-MAI/Z-Image-Turbo": 12_309_866_400,
}
"""Of the one file of 16-bit weights that each is published as, too."""
PUBLISHED_BILLIONS = {"black-forest-labs/FLUX.2-dev": 32, "Qwen/Qwen-Image": 20, "Tongyi-MAI/Z-Image": 6}
"""As their makers say; of these no such file's size was found."""


def saved_numbers(model: str) -> int:
    """How many numbers the transformer of a known model saves."""
    folder = KNOWN_MODELS[model]
    kind = getattr(diffusers, json.loads((folder / "transformer" / "config.json").read_text())["_class_name"])
    with torch.device("meta"):
        transformer = kind.from_config(kind.load_config(folder, subfolder="transformer"))
    return sum(value.numel() for value in transformer.state_dict().values())


@pytest.mark.parametrize("model", PUBLISHED_BYTES)
def test_a_transformer_has_the_size_of_the_published_file(model: str) -> None:
    """But for the file's header: names and shapes, a hundred bytes a tensor."""
    numbers = saved_numbers(model) + (AUTOENCODER if model.startswith("stabilityai/") else 0)
    assert 0 < PUBLISHED_BYTES[model] - 2 * numbers < 500_000


@pytest.mark.parametrize("model", PUBLISHED_BILLIONS)
def test_a_transformer_has_about_as_many_weights_as_its_makers_say(model: str) -> None:
    assert saved_numbers(model) / 1e9 == pytest.approx(PUBLISHED_BILLIONS[model], rel=0.03)


def test_every_known_model_is_held_to_its_published_size() -> None:
    assert KNOWN_MODELS.keys() == PUBLISHED_BYTES.keys() | PUBLISHED_BILLIONS.keys()
