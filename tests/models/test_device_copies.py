"""What has the host wait for the device, counted: nothing at any step of a rollout, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_folders import save_flux2_dev, save_flux2_klein, save_z_image
from device_copies import AWAY, DeviceCopies
from family_checks import SEEDS, write_config
from tiny_folders import PROMPTS, save_flux, save_qwen_image, save_stable_diffusion_3

from leapalign.config import ModelConfig, load_config
from leapalign.models import encode_prompts, load_model
from leapalign.models.velocity import prompted_velocity
from leapalign.rollout import sample_rollout
from leapalign.trainer import Trainer

FAMILIES: dict[str, tuple[Any, dict[str, int]]] = {
    "flux": (save_flux, {"height": 64, "width": 64}),
    "flux2_klein": (save_flux2_klein, {"height": 32, "width": 48}),
    "stable_diffusion_3": (save_stable_diffusion_3, {"height": 64, "width": 96}),
    "qwen_image": (save_qwen_image, {"height": 64, "width": 96}),
    "z_image": (save_z_image, {"height": 32, "width": 48}),
}
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
PER_ITERATION = {"flux": 32, "flux2_klein": 31, "stable_diffusion_3": 33, "qwen_image": 32, "z_image": 32}
"""Of which the rollout, the surrogate and the families have 7 to 9; metrics, method and reward have the others."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    save, size = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("models") / request.param
    save(folder)
    return request.param, {"path": str(folder), **size}


def of_rollout(config: ModelConfig, steps: int, embeddings: Any) -> list[DeviceCopies]:
    """What the first and a later rollout of ``steps`` steps copy, and wait for."""
    model = load_model(config)
    model.transformer.to(AWAY)
    model.device = AWAY
    found = []
    for _ in range(2):
        velocity, noise = prompted_velocity(model, embeddings), model.draw_noise(SEEDS)
        with DeviceCopies() as counted:
            rollout = sample_rollout(velocity, noise, model.sigmas(steps))
        assert rollout.latents.device == AWAY
        found.append(counted)
    return found


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_no_step_of_a_rollout_copies_or_waits(family: tuple[str, dict[str, Any]], guidance: str) -> None:
    name, model = family
    config = ModelConfig(**model, **GUIDANCE[guidance])
    embeddings = encode_prompts(config, PROMPTS)
    totals = []
    for steps in (2, 5):
        first, later = of_rollout(config, steps, embeddings)
        forwards = steps * (2 if guidance == "one after the other" else 1)
        assert later.copies.pop(EACH_FORWARD, 0) == (forwards if name == "qwen_image" else 0)
        assert not later.waits
        totals.append(later.copies.total())
        new = first.copies - later.copies
        new.pop(EACH_FORWARD, None)
        assert new == {who: count for who, count in ONCE.items() if who in new}
    assert totals[0] == totals[1] <= PER_ROLLOUT


def test_guidance_as_an_input_is_no_copy(tmp_path: Path) -> None:
    save_flux2_dev(tmp_path / "dev")
    config = ModelConfig(path=str(tmp_path / "dev"), height=32, width=48)
    # FLUX.2 dev's own encoder needs torchvision; of prompts only the shape matters here.
    embeddings = load_model(config).blank_embeddings(len(SEEDS), 8)
    _, later = of_rollout(config, 4, embeddings)
    assert later.copies == {"rollout.py:sample_rollout": 1}
    assert not later.waits


def test_an_iteration_copies_so_much_and_no_more(family: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """Rollout, reward and surrogate of a whole iteration, its metrics included: what grows with nothing in it."""
    name, model = family
    found = []
    for steps in (3, 6):
        folder = tmp_path / str(steps)
        folder.mkdir()
        rollout = {"num_steps": steps, "batch_size": 2}
        trainer = Trainer.from_config(load_config(write_config(folder, model, rollout=rollout)))
        for module in (trainer.model.transformer, trainer.model.decoder, trainer.rewards[0].reward):
            module.to(AWAY)
        trainer.model.device = AWAY
        # The first one sends the tables, too.
        for _ in range(2):
            with DeviceCopies() as counted:
                trainer.accumulate_gradients()
        # Two velocities have a backward pass.
        assert counted.copies.pop(EACH_FORWARD, 0) == (steps + 2 if name == "qwen_image" else 0)
        assert counted.waits["surrogate.py:surrogate_backward"] <= 2
        assert counted.copies["surrogate.py:surrogate_backward"] <= 2
        found.append(counted.copies.total() + counted.waits.total())
    assert found[0] == found[1] == PER_ITERATION[name]
