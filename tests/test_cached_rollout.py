"""Rollouts that leave blocks out: what is differentiated, weighed and measured is exact for where they went."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from measured_iterations import measured
from places import BYTES, STREAMED
from small_models import small_flux, small_vae
from small_runs import config_of, gradient, make_parts, train, weights, without_time
from tiny_folders import save_qwen_image, save_stable_diffusion_3
from torch import Tensor
from worlds import flux_embeddings, relative_difference

from leapalign.cached_rollout import CachedRollout
from leapalign.cli import main
from leapalign.config import CacheConfig, ModelConfig, RolloutConfig, save_config
from leapalign.inputs.validation import UserError
from leapalign.method_gradient import Objective, method_backward
from leapalign.methods import METHODS, get_method
from leapalign.models import encode_prompts, load_model
from leapalign.models.block_cache import cached_blocks
from leapalign.models.flux import FluxModel
from leapalign.models.velocity import GuidedEmbeddings, PromptedVelocity, prompted_velocity
from leapalign.planning.simulate import simulate
from leapalign.regularization import BaseVelocityPenalty
from leapalign.reward_gradient import RewardTerm
from leapalign.rollout import Rollout, sample_rollout
from leapalign.runs.run_folder import read_metrics
from leapalign.tiny.model import build_scheduler

BATCH, STEPS = 3, 6
ALWAYS = RolloutConfig(cache=CacheConfig("first_block", 1e9))
"""All blocks but the first, from the second step on."""
SOMETIMES = RolloutConfig(cache=CacheConfig("first_block", 0.35))
SETTINGS = ("rollout.cache={name: first_block, threshold: 1e9}", "rollout.num_steps=4")


@pytest.fixture
def velocity() -> PromptedVelocity:
    network = small_flux(num_layers=2, num_single_layers=2).double()
    model = FluxModel(network, build_scheduler(), 64, 64, small_vae().double())
    return PromptedVelocity(model, flux_embeddings(BATCH, torch.float64))


def rollouts(velocity: Any, config: RolloutConfig) -> tuple[CachedRollout, Rollout]:
    """One that leaves blocks out, and its latents with the exact velocities there."""
    sigmas = velocity.model.sigmas(STEPS).double()
    with cached_blocks(velocity.model.transformer, config):
        taken = sample_rollout(velocity, torch.randn(BATCH, 16, 16, dtype=torch.float64), sigmas)
    with torch.no_grad():
        exact = [
            velocity(x, sigma.expand(BATCH)) for x, sigma in zip(taken.latents[:-1], taken.sigmas[:-1], strict=True)
        ]
    return CachedRollout.of(taken, velocity), Rollout(taken.latents, torch.stack(exact), sigmas)


def forwards(transformer: Any) -> Iterator[list[int]]:
    """How often each block ran."""
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    counts = [0] * len(blocks)

    def counted(number: int) -> Any:
        def count(*_: Any) -> None:
            counts[number] += 1

        return count

    for number, block in enumerate(blocks):
        block.attn.register_forward_pre_hook(counted(number))
    yield counts


def test_blocks_are_left_out_of_the_rollout_and_of_nothing_else(velocity: PromptedVelocity) -> None:
    transformer = velocity.model.transformer
    x, sigma = torch.randn(BATCH, 16, 16, dtype=torch.float64), torch.full((BATCH,), 0.5, dtype=torch.float64)
    before, own = velocity(x, sigma), {name: set(vars(module)) for name, module in transformer.named_modules()}
    (counts,) = forwards(transformer)
    rollout, exact = rollouts(velocity, ALWAYS)
    assert counts == [2 * STEPS, *[STEPS + 1] * 3], "each step of the exact one, and the first of the other"
    assert torch.equal(rollout.velocities[0], exact.velocities[0])
    assert not torch.equal(rollout.velocities[1], exact.velocities[1])
    left = {name: set(vars(module)) - {"_cache_config"} for name, module in transformer.named_modules()}
    assert left == own
    assert not transformer.is_cache_enabled
    assert torch.equal(velocity(x, sigma), before)
    again, _ = rollouts(velocity, ALWAYS)
    assert torch.equal(again.velocities[0], again.velocities_of(torch.zeros(3, dtype=torch.int64), torch.arange(3)))


def test_a_copy_of_a_model_that_was_cached_is_its_own(velocity: PromptedVelocity) -> None:
    rollouts(velocity, ALWAYS)
    other = copy.deepcopy(velocity)
    with torch.no_grad():
        for parameter in velocity.model.transformer.parameters():
            parameter.zero_()
    assert float(other(torch.ones(BATCH, 16, 16).double(), torch.ones(BATCH).double()).detach().abs().max()) > 0


def objective(velocity: PromptedVelocity) -> Objective:
    def reward(images: Tensor, prompts: Any) -> Tensor:
        return images.flatten(1).square().mean(1)

    return Objective(velocity.model.decode, [RewardTerm("r", reward, 10.0, 1.0)])


def found(
    velocity: PromptedVelocity, rollout: Rollout, name: str, penalty: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    method = get_method(name, **({"reward_on": "posterior_mean"} if name == "leapalign" else {}))
    indices = method.draw(STEPS, BATCH, torch.Generator().manual_seed(5))
    parameters = list(velocity.model.transformer.parameters())
    for parameter in parameters:
        parameter.grad = None
    metrics = method_backward(method, indices, rollout, velocity, objective(velocity), ["a"] * BATCH, penalty=penalty)
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]), metrics


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_exact_velocities_at_the_latents(velocity: PromptedVelocity, name: str) -> None:
    """These are the in-line ones, see test_surrogate.py and test_methods.py; distances and weights are theirs, too."""
    rollout, exact = rollouts(velocity, SOMETIMES)
    ours, metrics = found(velocity, rollout, name)
    reference, expected = found(velocity, exact, name)
    assert relative_difference(ours, reference) <= 1e-10
    for key, value in expected.items():
        torch.testing.assert_close(metrics[key], value, equal_nan=True, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["leapalign", "refl"])
def test_it_would_matter(velocity: PromptedVelocity, name: str) -> None:
    rollout, exact = rollouts(velocity, ALWAYS)
    taken = Rollout(rollout.latents, rollout.velocities, rollout.sigmas)
    assert relative_difference(found(velocity, taken, name)[0], found(velocity, exact, name)[0]) > 1e-6


def test_the_distance_to_the_base_is_that_of_exact_velocities(velocity: PromptedVelocity) -> None:
    rollout, exact = rollouts(velocity, SOMETIMES)
    parameters = list(velocity.model.transformer.parameters())

    class Base:
        def __enter__(self) -> None:
            self.kept = [parameter.detach().clone() for parameter in parameters]
            for parameter in parameters:
                parameter.data.mul_(0.9)

        def __exit__(self, *_: Any) -> None:
            for parameter, value in zip(parameters, self.kept, strict=True):
                parameter.data.copy_(value)

    penalty = BaseVelocityPenalty(1.0, Base)
    ours, metrics = found(velocity, rollout, "flowbp_sparse", penalty)
    reference, expected = found(velocity, exact, "flowbp_sparse", penalty)
    assert relative_difference(ours, reference) <= 1e-10
    torch.testing.assert_close(metrics["base_velocity"], expected["base_velocity"], rtol=1e-9, atol=0)


def test_errors_are_those_where_velocities_were_asked_for(velocity: PromptedVelocity) -> None:
    rollout, exact = rollouts(velocity, ALWAYS)
    assert rollout.errors() is None
    steps, samples = torch.tensor([2, 4, 2]), torch.tensor([0, 0, 2])
    assert relative_difference(rollout.velocities_of(steps, samples), exact.velocities_of(steps, samples)) < 1e-12
    off = [
        float((exact.velocities[t, b] - rollout.velocities[t, b]).norm() / exact.velocities[t, b].norm())
        for t, b in ((2, 0), (4, 0), (2, 2))
    ]
    expected = torch.tensor([(off[0] + off[1]) / 2, torch.nan, off[2]])
    torch.testing.assert_close(rollout.errors(), expected, equal_nan=True)


def test_velocities_of_guidance_have_caches_of_their_own(tmp_path: Path) -> None:
    """One after the other they take turns in one network."""
    save_qwen_image(tmp_path)
    model = load_model(ModelConfig(path=str(tmp_path), height=64, width=64))
    prompts = encode_prompts(ModelConfig(path=str(tmp_path)), ["a cat", "two dogs", "a"])
    embeddings = GuidedEmbeddings(prompts[:2], prompts[2:], 3.0, batched=False)
    guided = prompted_velocity(model, embeddings)
    levels = model.sigmas(4)[:3]
    noise = model.draw_noise([1, 2])
    with torch.no_grad():
        with cached_blocks(model.transformer, ALWAYS):
            together = [guided(noise * (1 + level), level.expand(2)) for level in levels]
        by_itself = []
        for one in (prompts[:2], prompts[2:].repeated(2)):
            with cached_blocks(model.transformer, ALWAYS):
                alone = prompted_velocity(model, one)
                by_itself.append([alone(noise * (1 + level), level.expand(2)) for level in levels])
    for both, prompt, negative in zip(together, *by_itself, strict=True):
        torch.testing.assert_close(both, model.guide(prompt, negative, 3.0))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    return folder


def test_a_run_resumes_to_the_bit_and_says_how_far_velocities_were_off(parts: Path, tmp_path: Path) -> None:
    whole = train(config_of(parts, tmp_path / "whole", *SETTINGS))
    train(config_of(parts, tmp_path / "cut", *SETTINGS, "train.iterations=2"))
    resumed = train(config_of(parts, tmp_path / "cut", *SETTINGS), resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    records = read_metrics(tmp_path / "whole")
    assert without_time(records) == without_time(read_metrics(tmp_path / "cut"))
    assert all(0 < record["velocity_error"] < 1 for record in records)
    plain = train(config_of(parts, tmp_path / "plain"))
    assert not torch.equal(weights(whole), weights(plain))
    assert "velocity_error" not in read_metrics(tmp_path / "plain")[0]


@pytest.mark.parametrize(
    "place",
    [STREAMED, ("memory.checkpointing=attention",), ("memory.rewards=host",), ("kernels.patch=true",)],
    ids=lambda settings: settings[0],
)
def test_it_is_the_same_run_in_every_place(parts: Path, tmp_path: Path, place: tuple[str, ...]) -> None:
    asked = (BYTES, *SETTINGS, "train.iterations=2")
    resident, there = (
        train(config_of(parts, tmp_path / name, *asked, *more)) for name, more in (("resident", ()), ("there", place))
    )
    patched = "kernels.patch=true" in place
    assert relative_difference(weights(there), weights(resident)) <= (1e-3 if patched else 0)


def test_adapters_train_beside_it(parts: Path, tmp_path: Path) -> None:
    trained = train(config_of(parts, tmp_path, *SETTINGS, "model.lora_rank=4", "train.iterations=2"))
    assert read_metrics(tmp_path)[-1]["velocity_error"] > 0
    assert trained.iteration == 2


@pytest.mark.slow
def test_compiled_blocks_are_left_out_alike(parts: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    eager, compiled = (gradient(config_of(parts, tmp_path, *SETTINGS, f"model.compile={on}")) for on in (False, True))
    torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_simulated_peaks_are_the_real_ones(parts: Path, tmp_path: Path) -> None:
    """Of a rollout that leaves nothing out, which takes the most."""
    asked = ("rollout.cache={name: first_block, threshold: 1e-9}", "train.batch_size=8")
    config = config_of(parts, tmp_path / "run", *asked)
    real, simulated = measured(config), simulate(config)
    for name in ("rollout", "reward", "surrogate", "optimizer"):
        assert simulated.device[name].total == pytest.approx(real.device.peaks[name].total, rel=0.005), name


def test_an_unknown_key_is_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key 'rollout\.cache\.treshold'; did you mean 'threshold'"):
        config_of(parts, tmp_path, "rollout.cache={name: first_block, treshold: 0.2}")


def test_a_model_that_has_no_cache_is_refused_at_once(
    tmp_path: Path, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_stable_diffusion_3(tmp_path / "model")
    config = config_of(parts, tmp_path / "run", *SETTINGS, f"model.path={tmp_path / 'model'}", "model.height=64")
    save_config(config, tmp_path / "config.yaml")
    assert main(["train", "--config", str(tmp_path / "config.yaml"), "model.width=64"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "rollout.cache first_block is for FLUX.1, FLUX.2 and Qwen-Image" in line
    assert not (tmp_path / "run").exists()
