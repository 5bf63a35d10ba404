"""Time as the transformer receives it: in bfloat16 bit for bit what the family's own pipeline gives it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from chat_folders import pixtral_processor, save_flux2_dev, save_flux2_klein, save_z_image
from diffusers import DiffusionPipeline
from tiny_folders import PROMPTS, save_flux, save_qwen_image, save_stable_diffusion_3
from torch import Tensor

from leapalign.config import ModelConfig
from leapalign.models import load_model
from leapalign.models.velocity import prompted_velocity
from leapalign.rollout import sample_rollout


class Case(NamedTuple):
    """What ``save`` writes; ``sizes`` of images, in ``token`` pixels a side; ``given`` to the pipeline."""

    save: Callable[[Path], None]
    token: int
    sizes: tuple[tuple[int, int], ...]
    given: dict[str, Any]
    dtype: torch.dtype


# 720, 1024 and 512 x 768 pixels of the published models, whose tokens are of 16.
REAL = ((45, 45), (64, 64), (32, 48))
CASES = {
    "flux": Case(save_flux, 16, REAL, {"max_sequence_length": 8}, torch.bfloat16),
    "flux2_klein": Case(save_flux2_klein, 8, REAL, {"guidance_scale": 1.0}, torch.bfloat16),
    "flux2_dev": Case(save_flux2_dev, 8, REAL, {}, torch.bfloat16),
    "qwen_image": Case(save_qwen_image, 16, REAL, {"true_cfg_scale": 1.0}, torch.bfloat16),
    # Time stays in float32: the model embeds it so.
    "stable_diffusion_3": Case(
        save_stable_diffusion_3,
        16,
        ((12, 12), (4, 6)),
        {"guidance_scale": 1.0, "max_sequence_length": 12},
        torch.float32,
    ),
    "z_image": Case(save_z_image, 8, REAL, {"guidance_scale": 0.0}, torch.float32),
}


@contextmanager
def times_of(transformer: Any) -> Iterator[list[Tensor]]:
    """The times that ``transformer`` is given, which answers with velocities of 0."""
    seen: list[Tensor] = []

    def forward(hidden_states: Any = None, timestep: Any = None, *arguments: Any, **_: Any) -> tuple[Any]:
        seen.append(timestep)
        images = isinstance(hidden_states, list)
        return ([torch.zeros_like(one) for one in hidden_states] if images else torch.zeros_like(hidden_states),)

    with patch.object(transformer, "forward", forward):
        yield seen


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_time_is_the_pipelines(case: Case, tmp_path: Path) -> None:
    case.save(tmp_path)
    processor = {"tokenizer": None} if case.save is save_flux2_dev else {}
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16, **processor)
    if processor:
        pipeline.tokenizer = pixtral_processor(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    for rows, columns in case.sizes:
        size = {"height": rows * case.token, "width": columns * case.token}
        model = load_model(ModelConfig(path=str(tmp_path), dtype="bfloat16", **size))
        velocity = prompted_velocity(model, model.blank_embeddings(1, 4))
        for steps in (25, 28):
            with times_of(pipeline.transformer) as expected:
                pipeline(prompt=PROMPTS[0], num_inference_steps=steps, output_type="latent", **size, **case.given)
            with times_of(model.transformer) as found:
                sample_rollout(velocity, model.draw_noise([1]), model.sigmas(steps))
            assert len(found) == len(expected) == steps
            assert {time.dtype for time in (*found, *expected)} == {case.dtype}
            assert torch.equal(torch.cat(found), torch.cat(expected)), f"{steps} steps of {rows} x {columns} tokens"


@pytest.mark.parametrize(("side", "differing"), [(45, 6), (64, 10)])
def test_a_timestep_is_rounded_before_it_is_divided(side: int, differing: int, tmp_path: Path) -> None:
    """FLUX.1 at 720 and 1024 pixels, by the formulas: ``mu`` linear in the tokens from 0.5 at 256 to 1.15 at 4096,
    ``sigma = e^mu / (e^mu + 1 / s - 1)`` for ``s`` = 1, 24/25, ... 1/25, and the rounded ``1000 sigma``, over 1000."""
    mu = 0.5 + (side**2 - 256) / (4096 - 256) * (1.15 - 0.5)
    shares = [1 - step / 25 for step in range(25)]
    sigmas = torch.tensor([math.exp(mu) / (math.exp(mu) + 1 / share - 1) for share in shares])
    expected = (1000 * sigmas).bfloat16() / 1000
    save_flux(tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path), dtype="bfloat16", height=16 * side, width=16 * side))
    with times_of(model.transformer) as found:
        sample_rollout(prompted_velocity(model, model.blank_embeddings(1, 4)), model.draw_noise([1]), model.sigmas(25))
    assert torch.equal(torch.cat(found), expected)
    assert int((expected != sigmas.bfloat16()).sum()) == differing
