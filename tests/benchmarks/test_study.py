"""The study: what it counts, chooses and compares, and Flow-GRPO, which it brings along."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.study import __main__ as command
from benchmarks.study import flow_grpo
from benchmarks.study.plan import Study, Training, chosen_rate, comparisons, is_done, validations
from benchmarks.study.tables import tables
from benchmarks.study.training import measured, trainer_of
from benchmarks.study.units import Units
from leapalign.config import load_config
from leapalign.trainer import Trainer

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SMALL = ["train.batch_size=8", "rollout.batch_size=8", "rollout.num_steps=4"]
STUDY = Study(
    paper="a",
    iterations=2,
    images=12,
    rates=[1e-4, 1e-3],
    validation_seeds=[7],
    seeds=[0, 1],
    settings=SMALL,
    arms={"a": [], "b": ["method={name: refl}"]},
)


def line(training: Training, held_out_reward: float, done: bool = True) -> dict[str, Any]:
    figures = ("reward", "exact", "lenient", "clean", "tidy", "diversity", "cpu_seconds", "units")
    return {
        **training.to_json(),
        "at": ["rollouts", "units"],
        "iteration": 2,
        "held_out_reward": held_out_reward,
        "done": done,
        **dict.fromkeys(figures, 0.5),
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], 4 + 2 * 4),
        (["method={name: refl}"], 4 + 4),
        (["method={name: draft_k, steps: null}"], 4 + 4 * 4),
        (["train.leaps_per_rollout=3"], 4 + 3 * 2 * 4),
    ],
)
def test_units_are_those_counted_by_hand(settings: list[str], expected: int) -> None:
    """Of each image: four steps of the rollout, and four units for each velocity with gradient."""
    trainer = Trainer.from_config(load_config(TINY, [*SMALL, *settings]))
    units = Units(trainer.model.transformer)
    trainer.train_one()
    assert units.total == pytest.approx(8 * expected)


def test_blocks_that_are_left_out_count_for_nothing() -> None:
    asked = ["rollout.cache={name: first_block, threshold: 1e9}"]
    trainer = Trainer.from_config(load_config(TINY, [*SMALL, *asked]))
    units = Units(trainer.model.transformer)
    trainer.train_one()
    share = 1 / (
        len(trainer.model.transformer.transformer_blocks) + len(trainer.model.transformer.single_transformer_blocks)
    )
    exact = 2  # the velocities that the consistency weight asks for
    assert units.total == pytest.approx(8 * (1 + 3 * share + exact + 2 * 4))


def test_an_arm_is_compared_at_the_rate_that_was_best_on_other_seeds() -> None:
    low, high = validations(STUDY, "b")
    assert (low.seed, high.seed) == (7, 7)
    assert chosen_rate(STUDY, "b", [line(low, 0.9)]) is None
    assert comparisons(STUDY, "b", [line(low, 0.9)]) == []
    records = [line(low, 0.4), line(high, 0.6), line(validations(STUDY, "a")[0], 0.9)]
    assert chosen_rate(STUDY, "b", records) == high.rate
    assert [(one.seed, one.rate) for one in comparisons(STUDY, "b", records)] == [(0, high.rate), (1, high.rate)]
    other = dataclasses.replace(STUDY, settings=["seed=1"])
    assert chosen_rate(other, "b", records) is None, "what was declared otherwise is of another study"


def test_what_was_cut_off_begins_again_and_what_is_done_does_not() -> None:
    low, high = validations(STUDY, "b")
    assert not is_done([line(low, 0.4, done=False)], low)
    records = [line(low, 0.4), line(high, 0.6), *(line(one, 0.5) for one in validations(STUDY, "a"))]
    left = command.wanted(STUDY, records)
    assert [(one.arm, one.seed) for one in left] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)], "seed by seed"
    assert command.wanted(STUDY, [*records, line(left[0], 0.5)]) == left[1:]


def test_a_training_is_measured_at_both_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the results are a table."""
    study = dataclasses.replace(STUDY, paper="b", rates=[1e-4], seeds=[0], arms={"b": STUDY.arms["b"]})
    (training,) = validations(study, "b")
    found = list(measured(study, training, budget=3 * 8 * (4 + 4)))
    assert [(one["at"], one["iteration"], one["units"]) for one in found] == [
        (["start"], 0, 0),
        (["half"], 1, pytest.approx(64)),
        (["rollouts", "half units"], 2, pytest.approx(128)),
        (["units"], 3, pytest.approx(192)),
    ]
    assert [one["done"] for one in found] == [False, False, False, True]
    assert found[0]["cpu_seconds"] == 0 < found[1]["cpu_seconds"] < found[3]["cpu_seconds"]
    assert found[0]["reward"] != found[3]["reward"]
    results = tmp_path / "study.jsonl"
    lines = [*found, *({**one, **comparisons(study, "b", found)[0].to_json()} for one in found)]
    results.write_text("".join(json.dumps(one) + "\n" for one in lines))
    text = tables(study, command.read(results))
    assert text.count("\n| b |") == 3
    assert "At equal forward units" in text


def test_the_paper_s_sampler_has_the_marginals_of_the_flow() -> None:
    """Data of N(0, 4): at sigma the flow has variance (1 - sigma)^2 4 + sigma^2, and its velocity is known."""
    generator = torch.Generator().manual_seed(0)

    def variance(sigma: float) -> float:
        return 4 * (1 - sigma) ** 2 + sigma**2

    def velocity(x: Tensor, sigma: float) -> Tensor:
        # E[noise - data | x], both jointly normal with x.
        return x * (sigma - 4 * (1 - sigma)) / variance(sigma)

    sigmas = torch.linspace(1, 0, 401)
    x = torch.randn(40_000, generator=generator)
    for step in flow_grpo.steps_of(sigmas):
        x = step.mean(x, velocity(x, step.start)) + step.deviation * torch.randn(x.shape, generator=generator)
        if step.start < 0.95:
            assert float(x.var()) == pytest.approx(variance(step.end), rel=0.06), step
    assert float(x.var()) == pytest.approx(4, rel=0.06)


def test_advantages_are_normal_within_a_group() -> None:
    rewards = torch.cat([torch.arange(8.0), 100 + 10 * torch.arange(8.0)])
    found = flow_grpo.advantages(rewards).view(2, 8)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.mean(1), torch.zeros(2), rtol=0, atol=1e-5)


def test_the_gradient_is_the_advantage_times_that_of_the_density() -> None:
    """The ratio is one, so that the clip leaves it alone; the other part pulls towards the base."""
    step = flow_grpo.Step(0.8, 0.7, 0.5)
    mean, base, landed = (torch.randn(2, 3, 4, dtype=torch.float64) for _ in range(3))
    mean.requires_grad_()
    advantage = torch.tensor([2.0, -1.0], dtype=torch.float64)
    drawn = flow_grpo.log_density(step, mean, landed).detach()
    flow_grpo.step_loss(step, mean, base, landed, drawn, advantage).sum().backward()
    scale = 12 * step.deviation**2
    expected = (-advantage.view(2, 1, 1) * (landed - mean) + flow_grpo.BETA * (mean - base)).detach() / scale
    torch.testing.assert_close(mean.grad, expected)


def test_flow_grpo_trains_groups_of_one_prompt() -> None:
    study = dataclasses.replace(
        STUDY, arms={"flow_grpo": ["train.batch_size=16"]}, trainers={"flow_grpo": "flow_grpo:FlowGRPO"}
    )
    trainer = trainer_of(study, validations(study, "flow_grpo")[0])
    seen: list[Any] = []
    score = trainer.rewards[0].reward
    trainer.rewards[0] = dataclasses.replace(
        trainer.rewards[0], reward=lambda images, prompts: seen.append(prompts) or score(images, prompts)
    )
    units = Units(trainer.model.transformer)
    before = [parameter.detach().clone() for parameter in trainer.model.transformer.parameters()]
    metrics = trainer.train_one()
    assert metrics["grad_norm"] > 0
    assert [len(set(seen[0][start : start + 8])) for start in (0, 8)] == [1, 1]
    assert len(set(seen[0])) == 2
    assert units.total == pytest.approx(16 * (4 + 3 * 4)), "the base is another network"
    after = trainer.model.transformer.parameters()
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert all(torch.equal(old, kept) for old, kept in zip(before, trainer.base.parameters(), strict=True))
