"""What is not finite moves nothing, is written down, and does not go on for ever."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import PROMPTS, config_of, weights
from torch import Tensor

from leapalign.inputs.validation import UserError
from leapalign.rewards.own_reward import OwnReward
from leapalign.runs.checkpoint import latest_checkpoint, load_checkpoint
from leapalign.runs.opening import opened_run
from leapalign.runs.run import Run
from leapalign.runs.run_folder import MetricsLog, read_metrics
from leapalign.storage.json_lines import read_records
from leapalign.trainer import SKIPPED_AT_MOST, Trainer


def failing(trainer: Trainer, calls: set[int], sample: int | slice = slice(None), back: bool = False) -> None:
    """Has the reward of some samples be nan in these of its calls; ``back``: its gradient alone."""
    (term,) = trainer.rewards
    count = 0

    def reward(images: Tensor, prompts: Any) -> Tensor:
        nonlocal count
        count += 1
        scores = term.reward(images, prompts)
        if count in calls:
            bad = torch.zeros_like(scores)
            bad[sample] = math.nan
            # The square root of 0 has no finite slope.
            scores = scores + (scores[sample].mul(0).sqrt().sum() if back else bad)
        return scores

    trainer.rewards = [type(term)(term.name, reward, term.threshold)]


@pytest.mark.parametrize("places", [(), ("optimizer.name=adamw_8bit", "memory.optimizer=host")])
def test_an_iteration_without_a_finite_gradient_is_skipped(
    parts: Path, tmp_path: Path, places: tuple[str, ...]
) -> None:
    trainer = Trainer.from_config(config_of(parts, tmp_path, "train.iterations=3", *places))
    failing(trainer, {2})
    moved = []
    before = weights(trainer)
    average = [tensor.clone() for tensor in trainer.optimizer.average.tensors]
    for record in trainer.run():
        after = weights(trainer)
        moved.append(not torch.equal(after, before))
        if record["skipped"]:
            assert all(torch.equal(a, b) for a, b in zip(average, trainer.optimizer.average.tensors, strict=True))
        before, average = after, [tensor.clone() for tensor in trainer.optimizer.average.tensors]
    assert moved == [True, False, True]
    assert bool(before.isfinite().all())


def satisfied(trainer: Trainer, sample: int) -> None:
    """Has the reward of one sample lie above the threshold, so that it carries no gradient."""
    (term,) = trainer.rewards

    def reward(images: Tensor, prompts: Any) -> Tensor:
        scores = term.reward(images, prompts)
        return scores + 2 * term.threshold * torch.nn.functional.one_hot(torch.tensor(sample), len(scores))

    trainer.rewards = [type(term)(term.name, reward, term.threshold)]


def gradient_of(trainer: Trainer) -> list[Tensor]:
    gradients = []
    for parameter in trainer.model.transformer.parameters():
        gradients.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
        parameter.grad = None
    return gradients


@pytest.mark.parametrize("what", ["reward", "gradient", "latents"])
def test_a_sample_that_is_not_finite_takes_no_part(parts: Path, tmp_path: Path, what: str) -> None:
    asked = ("rollout.batch_size=4", "train.batch_size=4", "train.microbatch=1")
    trainer = Trainer.from_config(config_of(parts, tmp_path, *asked))
    left_out = Trainer.from_config(config_of(parts, tmp_path, *asked))
    embedded = trainer.order[2]
    assert [trainer.order[position] for position in range(4)].count(embedded) == 1
    if what == "latents":
        for tensor in trainer.embeddings.tensors():
            tensor[embedded] = math.nan
    else:
        failing(trainer, {1}, 2, back=what == "gradient")
    satisfied(left_out, 2)
    metrics = trainer.accumulate_gradients()
    left_out.accumulate_gradients()
    assert all(torch.equal(a, b) for a, b in zip(gradient_of(trainer), gradient_of(left_out), strict=True))
    assert metrics["skipped_samples"] == 1
    assert math.isfinite(metrics["reward"])
    assert math.isfinite(metrics["loss"])
    (incident,) = trainer.incidents
    named = {"reward": "reward pickscore", "gradient": "gradient of reward pickscore", "latents": "latents"}
    assert incident["first_not_finite"] == named[what]
    assert incident["prompts"] == [trainer.prompts[embedded]]
    assert set(incident["indices"]) == {"k", "j"}


def test_incidents_say_what_and_where_and_a_resumed_run_does_not_repeat_them(parts: Path, tmp_path: Path) -> None:
    trainer = Trainer.from_config(config_of(parts, tmp_path, "train.iterations=3", "checkpoint.every=1"))
    failing(trainer, {2})
    Run(trainer).train()
    path = tmp_path / "incidents.jsonl"
    incidents = read_records(path)
    assert [incident["iteration"] for incident in incidents] == [2] * 4
    assert {incident["first_not_finite"] for incident in incidents} == {"reward pickscore"}
    assert {prompt for incident in incidents for prompt in incident["prompts"]} <= set(PROMPTS)
    assert [record["skipped"] for record in read_metrics(tmp_path)] == [0, 1, 0]
    path.write_text(path.read_text() + '{"iteration": 3, "first')
    with MetricsLog(tmp_path, 2):
        assert read_records(path) == incidents
    with MetricsLog(tmp_path, 1):
        assert path.read_text() == ""


def test_too_many_in_a_row_end_the_run_with_good_weights(parts: Path, tmp_path: Path) -> None:
    trainer = Trainer.from_config(config_of(parts, tmp_path, "train.iterations=50"))
    failing(trainer, set(range(4, 100)))
    with pytest.raises(UserError, match=r"10 iterations in a row.*incidents\.jsonl"):
        Run(trainer).train()
    assert trainer.iteration == 3 + SKIPPED_AT_MOST
    assert latest_checkpoint(tmp_path) is not None
    assert bool(weights(trainer).isfinite().all())
    resumed = Trainer.from_config(config_of(parts, tmp_path, "train.iterations=14"))
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    load_checkpoint(checkpoint, resumed.model.transformer, resumed.optimizer)
    assert bool(weights(resumed).isfinite().all())


@pytest.mark.parametrize("places", [(), ("optimizer.name=adamw_8bit", "memory.optimizer=host")])
def test_weights_that_are_not_finite_are_never_saved(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: tuple[str, ...]
) -> None:
    asked = ("train.iterations=4", "checkpoint.every=1", "optimizer.schedule=constant_with_warmup", *places)
    run = Run.from_config(config_of(parts, tmp_path, *asked))
    rates = iter([1e-3, 1e-3, math.inf])
    train_one = run.trainer.train_one

    def at_a_rate() -> dict[str, float]:
        rate = next(rates)
        for group in run.trainer.optimizer.rule.param_groups:
            group["lr"] = rate
        return train_one()

    monkeypatch.setattr(run.trainer, "train_one", at_a_rate)
    with pytest.raises(UserError, match=r"after iteration 3 \S+ is not finite; lower optimizer.learning_rate"):
        run.train()
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.name == "step-2"


def test_a_reward_that_raises_leaves_a_run_that_goes_on(parts: Path, tmp_path: Path) -> None:
    config = config_of(parts, tmp_path, "train.iterations=4", "checkpoint.every=1", "samples.count=1")
    trainer = Trainer.from_config(config)
    (term,) = trainer.rewards
    calls = itertools.count(1)

    def reward(images: Tensor, prompts: Any) -> Tensor:
        return term.reward(images, prompts) / (next(calls) != 3 or [][0])

    trainer.rewards = [type(term)(term.name, OwnReward(reward, "reward.function 'own:reward'"), term.threshold)]
    with pytest.raises(UserError, match=r"own:reward' raised IndexError: list index out of range .*test_guards\.py"):
        Run(trainer).train()
    with opened_run(config, resume=True) as resumed:
        assert resumed.trainer.iteration == 2
        resumed.train()
    assert [record["iteration"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
