"""`model.max_sequence_length`: what text encoders read, what pipelines take, and what memory it costs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import family_checks as checks
import pytest
import torch
from chat_folders import save_flux2_dev, save_flux2_klein, save_z_image
from diffusers import StableDiffusion3Pipeline
from prompt_caches import CPU, filled
from tiny_folders import PROMPTS, TOKENS, save_flux, save_qwen_image, save_stable_diffusion_3

from leapalign.config import Config, ModelConfig
from leapalign.inputs.validation import UserError
from leapalign.models import encode_prompts, load_model, text_encoders, text_tokens
from leapalign.planning.model_skeleton import skeleton
from leapalign.prompts.cache import MANIFEST
from leapalign.prompts.embeddings import CachedEmbeddings

SHORT = 5
SIZE = {"height": 64, "width": 96}
FAMILIES: dict[str, tuple[Callable[[Path], None], int, int]] = {
    "flux": (save_flux, 512, 512),
    "flux2_klein": (save_flux2_klein, 512, 512),
    "flux2_dev": (save_flux2_dev, 512, 512),
    "stable_diffusion_3": (save_stable_diffusion_3, 256, 512),
    "qwen_image": (save_qwen_image, 512, 1024),
    "z_image": (save_z_image, 512, 512),
}
"""With the default of the pipeline, and the most that it takes."""


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "sd3"
    save_stable_diffusion_3(path)
    return path


@pytest.mark.parametrize(("save", "default", "longest"), FAMILIES.values(), ids=FAMILIES)
def test_every_family_reads_as_much_as_is_asked_for(
    save: Callable[[Path], None], default: int, longest: int, tmp_path: Path
) -> None:
    save(tmp_path)
    assert text_tokens(ModelConfig(path=str(tmp_path))) == default
    assert text_tokens(ModelConfig(path=str(tmp_path), max_sequence_length=longest)) == longest
    # FLUX.2 dev puts a system message of more tokens than a few before the prompt.
    asked = ModelConfig(path=str(tmp_path), max_sequence_length=480 if save is save_flux2_dev else SHORT)
    encoder = list(text_encoders(asked, CPU))[-1]
    assert encoder.prompt_limit.tokens == asked.max_sequence_length
    part = "t5" if save is save_stable_diffusion_3 else "tokens"
    assert encoder(["a red circle " * 4])[part].shape[1] == asked.max_sequence_length
    simulated = skeleton(Config(model=asked), nullcontext()).embeddings.parts[part].shape[1]
    assert simulated == min(asked.max_sequence_length, 64), "which is the longest of that tokenizer"
    too_long = ModelConfig(path=str(tmp_path), max_sequence_length=longest + 1)
    for refused in (lambda: load_model(too_long), lambda: encode_prompts(too_long, PROMPTS)):
        with pytest.raises(UserError, match=rf"max_sequence_length {longest + 1} is more .* at most {longest}$"):
            refused()


@pytest.mark.parametrize("t5", [True, False])
def test_a_rollout_of_short_texts_is_the_pipelines(sd3: Path, tmp_path: Path, t5: bool) -> None:
    """Of the second prompt T5 reads four words of seven, and CLIP all; without T5 the zeros are as many."""
    config = ModelConfig(path=str(sd3), max_sequence_length=SHORT, **SIZE)
    parts = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3, **parts)
    if not t5:
        pipeline.save_pretrained(tmp_path / "without")
        config = ModelConfig(path=str(tmp_path / "without"), max_sequence_length=SHORT, **SIZE)
    _, rollout = checks.rollout_of(config)
    pipeline.set_progress_bar_config(disable=True)

    def sampled(length: int) -> torch.Tensor:
        return pipeline(
            prompt=PROMPTS,
            guidance_scale=1.0,
            num_inference_steps=checks.STEPS,
            latents=rollout.latents[0],
            max_sequence_length=length,
            output_type="latent",
            **SIZE,
        ).images

    torch.testing.assert_close(rollout.latents[-1], sampled(SHORT), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(rollout.latents[-1], sampled(TOKENS), rtol=1e-3, atol=1e-3)


def test_a_cache_is_of_one_length(sd3: Path, tmp_path: Path) -> None:
    short, default = ModelConfig(path=str(sd3), max_sequence_length=SHORT), ModelConfig(path=str(sd3))
    filled(tmp_path, short, PROMPTS)
    assert CachedEmbeddings(tmp_path / "cache", short, PROMPTS)[:].parts["t5"].shape[1] == SHORT
    sentence = rf"has {SHORT} tokens of a prompt, not 256; set model.max_sequence_length to {SHORT}, or use another"
    for refused in (
        lambda: CachedEmbeddings(tmp_path / "cache", default, PROMPTS),
        lambda: filled(tmp_path, default, PROMPTS),
    ):
        with pytest.raises(UserError, match=sentence):
            refused()


def test_a_cache_from_before_is_of_the_default_length(sd3: Path, tmp_path: Path) -> None:
    default = ModelConfig(path=str(sd3))
    filled(tmp_path, default, PROMPTS)
    manifest = tmp_path / "cache" / MANIFEST
    assert '"max_sequence_length": 256' in manifest.read_text()
    manifest.write_text(manifest.read_text().replace('  "max_sequence_length": 256,\n', ""))
    explicit = ModelConfig(path=str(sd3), max_sequence_length=256)
    for config in (default, explicit):
        assert len(CachedEmbeddings(tmp_path / "cache", config, PROMPTS)) == len(PROMPTS)
    with pytest.raises(UserError, match="has 256 tokens of a prompt, not 5"):
        CachedEmbeddings(tmp_path / "cache", ModelConfig(path=str(sd3), max_sequence_length=SHORT), PROMPTS)


def test_simulated_peaks_follow_it(sd3: Path, tmp_path: Path) -> None:
    checks.check_simulation(tmp_path, {"path": str(sd3), "max_sequence_length": SHORT, **SIZE})
