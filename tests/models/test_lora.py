"""Adapters: what is trained, saved and loaded again is the adapter alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from measured_iterations import measured
from places import BYTES
from small_runs import PROMPTS, config_of, train, without_time

from leapalign import cli
from leapalign.config import Config, ModelConfig
from leapalign.inputs.validation import UserError
from leapalign.models import encode_prompts, load_model
from leapalign.models.velocity import PromptedVelocity
from leapalign.planning.simulate import simulate
from leapalign.rollout import sample_rollout
from leapalign.runs.checkpoint import AVERAGE, TRANSFORMER, latest_checkpoint
from leapalign.runs.run_folder import read_metrics
from leapalign.trainer import Trainer

RANK = "model.lora_rank=4"
STREAMED = ("memory.weights=streamed", "memory.stream_buffers=2", "memory.checkpointing=blocks")


def adapters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.transformer.named_parameters() if p.requires_grad}


def frozen(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.transformer.parameters() if not p.requires_grad])


def test_only_adapters_are_trained_and_the_pipeline_draws_the_same_pictures(parts: Path, tmp_path: Path) -> None:
    config = config_of(parts, tmp_path, RANK, "train.iterations=5")
    before = Trainer.from_config(config)
    trainer = train(config)
    trained, start = adapters(trainer), adapters(before)
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in trained.items())
    assert not any("norm" in name for name in trained), "modulation is left alone"
    assert sum(not torch.equal(trained[name], start[name]) for name in trained) == len(trained)
    assert torch.equal(frozen(trainer), frozen(before))

    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert [file.name for file in (checkpoint / TRANSFORMER).iterdir()] == ["pytorch_lora_weights.safetensors"]
    embeddings = encode_prompts(config.model, PROMPTS[:2])
    noise = trainer.model.draw_noise([3, 4])
    with torch.no_grad():
        ours = sample_rollout(PromptedVelocity(trainer.model, embeddings), noise, trainer.model.sigmas(4)).latents[-1]
    pipeline = FluxPipeline.from_pretrained(parts / "model")
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 4, "latents": noise, "max_sequence_length": 8, "output_type": "latent"}
    base = pipeline(prompt=PROMPTS[:2], height=64, width=64, **arguments).images
    pipeline.load_lora_weights(checkpoint / TRANSFORMER)
    theirs = pipeline(prompt=PROMPTS[:2], height=64, width=64, **arguments).images
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert float((theirs - base).abs().max()) > 1e-3


def test_an_untrained_adapter_changes_nothing(parts: Path) -> None:
    latents, sigma = torch.randn(2, 16, 16), torch.full((2,), 0.5)
    plain = ModelConfig(path=str(parts / "model"))
    embeddings = encode_prompts(plain, PROMPTS[:2])
    with torch.no_grad():
        first, second = (
            load_model(config).velocity(latents, sigma, embeddings)
            for config in (plain, ModelConfig(path=str(parts / "model"), lora_rank=4))
        )
    assert torch.equal(first, second)


@pytest.mark.parametrize("asked", [(), (BYTES,)])
def test_resumed_adapters_continue_to_the_bit(parts: Path, tmp_path: Path, asked: tuple[str, ...]) -> None:
    whole = train(config_of(parts, tmp_path / "whole", RANK, *asked))
    train(config_of(parts, tmp_path / "cut", RANK, *asked, "train.iterations=2"))
    resumed = train(config_of(parts, tmp_path / "cut", RANK, *asked), resume=True)
    first, second = adapters(whole), adapters(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_frozen_weights_stream(parts: Path, tmp_path: Path) -> None:
    """The same run, from less device memory, in bfloat16, too."""
    for dtype in ("float32", "bfloat16"):
        asked = (RANK, f"model.dtype={dtype}", "memory.checkpointing=blocks", "train.iterations=2")
        resident = config_of(parts, tmp_path / f"resident-{dtype}", *asked)
        streamed = config_of(parts, tmp_path / f"streamed-{dtype}", *asked, *STREAMED)
        one, other = adapters(train(resident)), adapters(train(streamed))
        assert all(torch.equal(one[name], other[name]) for name in one)
        first, second = (without_time(read_metrics(Path(config.output))) for config in (resident, streamed))
        assert first == second
    weights = [simulate(config).device["surrogate"].by_role["weights"] for config in (resident, streamed)]
    assert weights[1] < 0.75 * weights[0]


@pytest.mark.slow
@pytest.mark.parametrize("places", [(), STREAMED])
def test_simulated_peaks_are_the_real_ones(parts: Path, tmp_path: Path, places: tuple[str, ...]) -> None:
    config: Config = config_of(parts, tmp_path, RANK, "train.batch_size=8", *places)
    real, found = measured(config), simulate(config)
    for name, peak in found.device.items():
        assert peak.total == pytest.approx(real.device.peaks[name].total, rel=0.005)
    assert found.trainable_parameters < 200_000


def test_evaluating_and_generating_use_the_adapter(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(config_of(parts, tmp_path / "run", RANK, "ema.decay=0.0"))
    for arguments in (["generate", "--output", str(tmp_path / "images")], ["evaluate", "--json"]):
        assert cli.main([*arguments, "--run", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert '"base"' in printed
    assert len(list((tmp_path / "images").glob("0*.png"))) == len(PROMPTS)
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    assert (checkpoint / AVERAGE / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("model.lora_targets=[to_nothing]",), r"ends with to_nothing; correct model.lora_targets"),
        ((BYTES, "memory.optimizer=host"), "adapters are small enough"),
        (("model.lora_rank=-1",), "model.lora_rank"),
    ],
)
def test_mistakes_are_one_sentence(parts: Path, tmp_path: Path, assignments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Trainer.from_config(config_of(parts, tmp_path, RANK, *assignments))


def test_another_models_adapter_is_refused(parts: Path, tmp_path: Path) -> None:
    train(config_of(parts, tmp_path, RANK, "train.iterations=1"))
    other = config_of(parts, tmp_path, RANK, "model.lora_targets=[to_q]")
    with pytest.raises(UserError, match="cannot be resumed"):
        train(other, resume=True)
