"""What has the host wait for the device, counted: nothing at any step of a rollout, in every family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from chat_folders import save_flux2_dev, save_flux2_klein, save_z_image
from device_copies import AWAY, DeviceCopies
from family_checks import SEEDS, write_config
from small_models import small_flux, small_vae
from tiers import some_slow
from tiny_folders import PROMPTS, save_flux, save_qwen_image, save_stable_diffusion_3

from leapalign.config import ModelConfig, load_config
from leapalign.models import encode_prompts, load_model
from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.flux import FluxModel
from leapalign.models.velocity import GuidedEmbeddings, prompted_velocity
from leapalign.rollout import sample_rollout
from leapalign.tiny.model import build_scheduler
from leapalign.trainer import Trainer

FAMILIES: dict[str, tuple[Any, dict[str, int]]] = {
    "tiny world": (None, {"height": 64, "width": 64}),
    "flux": (save_flux, {"height": 64, "width": 64}),
    "flux2_klein": (save_flux2_klein, {"height": 32, "width": 48}),
    "stable_diffusion_3": (save_stable_diffusion_3, {"height": 64, "width": 96}),
    "qwen_image": (save_qwen_image, {"height": 64, "width": 96}),
    "z_image": (save_z_image, {"height": 32, "width": 48}),
}
"""What saves a folder of the family, where none is embedded, and the size of its images."""
GUIDANCE: dict[str, dict[str, Any]] = {
    "unguided": {},
    "batched": {"true_cfg_scale": 3.0},
    "one after the other": {"true_cfg_scale": 3.0, "true_cfg_batched": False},
}
ONCE = {"transformer_qwenimage.py:_get_device_freqs": 2, "transformer_z_image.py:<listcomp>": 3}
"""Tables of positions that diffusers' networks send to a device the first time they run there."""
EACH_FORWARD = "transformer_qwenimage.py:compute_text_seq_len_from_mask"
"""Of a prompt's length diffusers makes a tensor that it does not use, where prompts are padded."""
PER_ROLLOUT = 3
PER_ITERATION = {
    "tiny world": 32,
    "flux": 32,
    "flux2_klein": 31,
    "stable_diffusion_3": 33,
    "qwen_image": 32,
    "z_image": 32,
}
"""Of which the rollout, the surrogate and the families have 7 to 9; metrics, method and reward have the others."""


@dataclass(frozen=True)
class Family:
    name: str
    model: dict[str, Any]
    """As a config has it."""
    embeddings: PromptEmbeddings


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    save, size = FAMILIES[request.param]
    path = "embedded:base"
    if save:
        folder = tmp_path_factory.mktemp("models") / request.param
        save(folder)
        path = str(folder)
    model = {"path": path, **size}
    return Family(request.param, model, encode_prompts(ModelConfig(**model), PROMPTS))


def of_rollouts(model: Any, embeddings: Any, *steps: int) -> list[DeviceCopies]:
    """What rollouts of so many steps copy, and wait for, one after the other."""
    model.transformer.to(AWAY)
    model.device = AWAY
    found = []
    for number in steps:
        velocity, noise = prompted_velocity(model, embeddings), model.draw_noise(SEEDS)
        with DeviceCopies() as counted:
            rollout = sample_rollout(velocity, noise, model.sigmas(number))
        assert rollout.latents.device == AWAY
        found.append(counted)
    return found


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_no_step_of_a_rollout_copies_or_waits(family: Family, guidance: str) -> None:
    config = ModelConfig(**family.model, **GUIDANCE[guidance])
    embeddings: Any = family.embeddings
    if config.true_cfg_scale > 1:
        negative = family.embeddings[:1]
        embeddings = GuidedEmbeddings(embeddings, negative, config.true_cfg_scale, config.true_cfg_batched)
    first, *later = of_rollouts(load_model(config), embeddings, 2, 2, 4)
    forwards = 2 if guidance == "one after the other" else 1
    for steps, found in zip((2, 4), later, strict=True):
        assert found.copies.pop(EACH_FORWARD, 0) == (steps * forwards if family.name == "qwen_image" else 0)
        assert not found.waits
    assert later[0].copies == later[1].copies
    assert later[0].copies.total() <= PER_ROLLOUT
    new = first.copies - later[0].copies
    new.pop(EACH_FORWARD, None)
    assert new == {who: count for who, count in ONCE.items() if who in new}


def takes_guidance(folder: Path) -> Any:
    return FluxModel(small_flux(guidance_embeds=True), build_scheduler(), 64, 64, small_vae())


def takes_guidance_2(folder: Path) -> Any:
    save_flux2_dev(folder)
    return load_model(ModelConfig(path=str(folder), height=32, width=48))


def without_t5(folder: Path) -> Any:
    save_stable_diffusion_3(folder)
    model: Any = load_model(ModelConfig(path=str(folder), height=64, width=96))
    model.t5 = False
    return model


@pytest.mark.parametrize("made", [takes_guidance, takes_guidance_2, without_t5])
def test_guidance_as_an_input_and_missing_encoders_are_no_copies(tmp_path: Path, made: Any) -> None:
    model = made(tmp_path / "model")
    # Of prompts only the shape matters here.
    _, *later = of_rollouts(model, model.blank_embeddings(len(SEEDS), 8), 2, 2, 4)
    for found in later:
        assert found.copies == {"rollout.py:sample_rollout": 1}
        assert not found.waits


@pytest.mark.parametrize("family", some_slow(FAMILIES, ("flux", "qwen_image")), indirect=True)
def test_an_iteration_copies_so_much_and_no_more(family: Family, tmp_path: Path) -> None:
    """Rollout, reward and surrogate of a whole iteration, its metrics included: what grows with nothing in it."""
    config = load_config(write_config(tmp_path, family.model, rollout={"num_steps": 3, "batch_size": 2}))
    trainer = Trainer.from_config(config)
    for module in (trainer.model.transformer, trainer.model.decoder, trainer.rewards[0].reward):
        module.to(AWAY)
    trainer.model.device = AWAY
    counts = []
    for steps in (3, 3, 6):
        trainer.config = replace(config, rollout=replace(config.rollout, num_steps=steps))
        with DeviceCopies() as counted:
            trainer.accumulate_gradients()
        # Two velocities have a backward pass.
        assert counted.copies.pop(EACH_FORWARD, 0) == (steps + 2 if family.name == "qwen_image" else 0)
        assert counted.waits["surrogate.py:surrogate_backward"] <= 2
        assert counted.copies["surrogate.py:surrogate_backward"] <= 2
        counts.append(counted.all.total())
    # The first one sends the tables, too.
    assert counts[1:] == [PER_ITERATION[family.name]] * 2
