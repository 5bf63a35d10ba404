"""``regularization.base_velocity`` in a run: logged, resumed, simulated, the same in every place, and refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from measured_iterations import measured
from places import BYTES, HOST
from small_runs import config_of, train, weights, without_time

from leapalign.inputs.validation import UserError
from leapalign.planning.simulate import simulate
from leapalign.runs.run_folder import read_metrics
from leapalign.trainer import Trainer

NEAR = "regularization.base_velocity=20"
LORA = "model.lora_rank=4"
STREAMED = ("memory.weights=streamed", "memory.checkpointing=blocks")


def distances(run: Path) -> list[float]:
    return [record["base_velocity"] for record in read_metrics(run)]


@pytest.mark.parametrize(
    "kind", [(), pytest.param((LORA,), marks=pytest.mark.slow), (BYTES, HOST)], ids=["full", "adapters", "host"]
)
def test_it_is_logged_keeps_near_and_resumes_to_the_bit(parts: Path, tmp_path: Path, kind: tuple[str, ...]) -> None:
    """A resumed run's base is the model of ``model.path``, not what the checkpoint holds."""
    asked = (*kind, "optimizer.learning_rate=3e-3")
    whole = train(config_of(parts, tmp_path / "whole", *asked, NEAR))
    train(config_of(parts, tmp_path / "cut", *asked, NEAR, "train.iterations=2"))
    resumed = train(config_of(parts, tmp_path / "cut", *asked, NEAR), resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    first, second = (without_time(read_metrics(tmp_path / name)) for name in ("whole", "cut"))
    assert first == second
    found = distances(tmp_path / "whole")
    assert found[0] < 1e-10 < found[1], "before the first step the model is its base"
    train(config_of(parts, tmp_path / "free", *asked, "regularization.base_velocity=1e-9"))
    assert found[-1] < distances(tmp_path / "free")[-1]
    assert first[0]["grad_norm"] == pytest.approx(read_metrics(tmp_path / "free")[0]["grad_norm"], rel=1e-4)


def test_without_a_weight_nothing_is_measured(parts: Path, tmp_path: Path) -> None:
    trainer = train(config_of(parts, tmp_path, "train.iterations=1"))
    assert trainer.penalty is None
    assert "base_velocity" not in read_metrics(tmp_path)[0]


@pytest.mark.parametrize(
    "place",
    [("rollout.batch_size=2",), ("train.microbatch=1",), ("memory.checkpointing=attention",), (BYTES, HOST)],
    ids=lambda settings: settings[-1],
)
def test_the_gradient_is_the_same_in_every_place(parts: Path, tmp_path: Path, place: tuple[str, ...]) -> None:
    """Of a model that left its base; a rollout of half the images, each with its own share, adds up to the same."""
    found = []
    for settings in ((), place):
        trainer = Trainer.from_config(config_of(parts, tmp_path, NEAR, *settings))
        torch.manual_seed(1)
        with torch.no_grad(), trainer.optimizer.changing_weights():
            for parameter in trainer.model.transformer.parameters():
                parameter += 0.05 * parameter.std().nan_to_num() * torch.randn_like(parameter)
        metrics = trainer.accumulate_gradients()
        assert metrics["base_velocity"] > 1e-4
        gradients = [trainer.optimizer._gradient_of(p) for p in trainer.model.transformer.parameters()]
        found.append(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4 * float(found[0].abs().max()))


@pytest.mark.slow
def test_the_copy_and_its_way_are_simulated(parts: Path, tmp_path: Path) -> None:
    """The base's weights in host memory, and a parameter of them at a time beside the device's."""
    plain, near = (simulate(config_of(parts, tmp_path, "train.batch_size=8", *asked)) for asked in ((), (NEAR,)))
    config = config_of(parts, tmp_path, "train.batch_size=8", NEAR)
    real = measured(config)
    size = sum(p.nbytes for p in Trainer.from_config(config).model.transformer.parameters())
    assert near.host_peak - plain.host_peak == pytest.approx(size, rel=0.001)
    assert near.traffic["surrogate", "to_device"] == near.traffic["surrogate", "to_host"] == 2 * 2 * size
    for name, peak in near.device.items():
        assert peak.total == pytest.approx(real.device.peaks[name].total, rel=0.005)
    assert near.flops["surrogate"] > plain.flops["surrogate"]
    adapters = [simulate(config_of(parts, tmp_path, LORA, *asked)).host_peak for asked in ((), (NEAR,))]
    assert adapters[0] == adapters[1], "without its adapters the model is the base, at no cost"


def test_adapters_may_stay_near_while_weights_stream(parts: Path, tmp_path: Path) -> None:
    asked = (LORA, NEAR, "train.iterations=2", "optimizer.learning_rate=3e-3", "memory.checkpointing=blocks")
    resident, streamed = (
        train(config_of(parts, tmp_path / name, *asked, *more))
        for name, more in (("resident", ()), ("streamed", STREAMED))
    )
    assert torch.equal(weights(resident), weights(streamed))
    assert distances(tmp_path / "streamed")[1] > 1e-12


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ((BYTES, HOST, *STREAMED), r"base_velocity cannot change weights that stream.*set memory\.weights to resident"),
        (("diagnostics.true_gradient_every=1",), r"compares gradients of the reward alone; set it to 0"),
        (("regularization.base_velocity=-1",), r"regularization\.base_velocity"),
    ],
)
def test_what_cannot_be_is_refused(parts: Path, tmp_path: Path, assignments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(parts, tmp_path, NEAR, *assignments)
