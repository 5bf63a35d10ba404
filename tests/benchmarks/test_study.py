"""The study: what it counts, chooses and compares, and Flow-GRPO, which it brings along."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.study import __main__ as command
from benchmarks.study import flow_grpo, pictures, tables
from benchmarks.study.figure import draw
from benchmarks.study.plan import Study, Training, chosen_rate, comparisons, is_done, validations
from benchmarks.study.training import due_at, measured, trainer_of
from benchmarks.study.units import Units
from leapalign.config import load_config
from leapalign.trainer import Trainer

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"
SMALL = ["train.batch_size=8", "rollout.batch_size=8", "rollout.num_steps=4"]
STUDY = Study(
    paper="a",
    iterations=2,
    images=12,
    rates=[1e-5, 1e-4, 1e-3, 1e-2],
    validation_seeds=[7],
    seeds=[0, 1, 2],
    settings=SMALL,
    arms={"a": [], "b": ["method={name: refl}"]},
    ablation_seeds=[1],
    ablations={"c": ["method.alpha=1"]},
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


def chosen(arm: str) -> list[dict[str, Any]]:
    """By which the rate of ``arm`` is 1e-3."""
    low, high = validations(STUDY, arm, [])
    begun = [line(low, 0.4), line(high, 0.6)]
    return [*begun, line(validations(STUDY, arm, begun)[-1], 0.5)]


def test_rates_are_tried_outwards_while_the_best_is_at_an_end() -> None:
    low, high = validations(STUDY, "b", [])
    assert [(one.rate, one.seed) for one in (low, high)] == [(1e-4, 7), (1e-3, 7)]
    assert validations(STUDY, "b", [line(high, 0.6)]) == [low, high], "both are needed first"
    up = validations(STUDY, "b", [line(low, 0.4), line(high, 0.6)])
    assert [one.rate for one in up] == [1e-4, 1e-3, 1e-2]
    assert chosen_rate(STUDY, "b", [line(low, 0.4), line(high, 0.6)]) is None
    down = validations(STUDY, "b", [line(low, 0.6), line(high, 0.4)])
    assert [one.rate for one in down] == [1e-5, 1e-4, 1e-3]
    assert chosen_rate(STUDY, "b", [line(low, 0.6), line(high, 0.4), line(down[0], 0.5)]) == 1e-4
    assert chosen_rate(STUDY, "b", [line(low, 0.6), line(high, 0.4), line(down[0], 0.7)]) == 1e-5, "there is no lower"


def test_an_arm_is_compared_at_the_rate_that_was_best_on_other_seeds() -> None:
    records = chosen("b")
    assert comparisons(STUDY, "b", records[:2]) == []
    assert [(one.seed, one.rate) for one in comparisons(STUDY, "b", records)] == [(0, 1e-3), (1, 1e-3), (2, 1e-3)]
    assert comparisons(STUDY, "c", records) == [], "an ablation takes the rate of the paper's recipe"
    (ablation,) = comparisons(STUDY, "c", chosen("a"))
    assert (ablation.seed, ablation.rate) == (1, 1e-3)
    assert ablation.settings == (*SMALL, "method.alpha=1", "optimizer.learning_rate=0.001", "seed=1")
    other = dataclasses.replace(STUDY, settings=["seed=1"])
    assert chosen_rate(other, "b", records) is None, "what was declared otherwise is of another study"


def test_what_was_cut_off_begins_again_and_what_is_done_does_not() -> None:
    low, _ = validations(STUDY, "b", [])
    assert not is_done([line(low, 0.4, done=False)], low)
    records = [*chosen("a"), *chosen("b")]
    left = command.wanted(STUDY, records)
    assert [(one.arm, one.seed) for one in left] == [
        *(("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)),
        ("c", 1),
    ], "seed by seed"
    assert command.wanted(STUDY, [*records, line(left[0], 0.5)]) == left[1:]


def test_a_training_is_measured_at_both_budgets() -> None:
    study = dataclasses.replace(STUDY, paper="b", rates=[1e-4], seeds=[7])
    (training,) = validations(study, "b", [])
    found = [one for one, _ in measured(study, training, budget=3 * 8 * (4 + 4))]
    assert [(one["at"], one["iteration"], one["units"]) for one in found] == [
        (["start"], 0, 0),
        (["rollouts", "half units"], 2, pytest.approx(128)),
        (["units"], 3, pytest.approx(192)),
    ]
    assert [one["done"] for one in found] == [False, False, True]
    assert found[0]["cpu_seconds"] == 0 < found[1]["cpu_seconds"] < found[2]["cpu_seconds"]
    assert [len(one.get("train_reward", [])) for one in found] == [0, 2, 1]
    assert found[0]["reward"] != found[2]["reward"]


def test_a_training_that_chooses_a_rate_is_measured_at_the_paper_s_rollouts_alone() -> None:
    validation, ablation = validations(STUDY, "a", [])[0], comparisons(STUDY, "c", chosen("a"))[0]
    assert due_at(STUDY, validation, 300, 100) == due_at(STUDY, ablation, 300, 100) == {"rollouts": 2}
    compared = comparisons(STUDY, "a", chosen("a"))[0]
    assert due_at(STUDY, compared, 300, 100) == {"rollouts": 2, "half units": 2, "units": 3}


def course(training: Training, *points: tuple[str, float, float]) -> list[dict[str, Any]]:
    """Measurements of ``training``: at what, units, and reward, which all figures share."""
    shared = ("reward", "exact", "held_out_reward", "lenient", "clean", "tidy", "diversity")
    return [
        {
            **line(training, value, done=at == points[-1][0]),
            **dict.fromkeys(shared, value),
            "at": [at],
            "units": units,
            "train_reward": [value],
            "exact_by_family": {"two": value},
        }
        for at, units, value in points
    ]


def compared() -> list[dict[str, Any]]:
    """Three seeds of each arm: "a", the paper's, goes from 0 to 1 in 100 units, "b" in 50 or more than 100."""
    records = [*chosen("a"), *chosen("b")]
    first, *others = comparisons(STUDY, "b", records)
    for training in comparisons(STUDY, "a", records):
        records += course(training, ("start", 0, 0.0), ("half units", 50, 0.5), ("rollouts", 100, 1.0))
    records += course(first, ("half units", 40, 0.8), ("rollouts", 60, 1.2), ("units", 100, 1.5))
    for training in others:
        records += course(training, ("half units", 40, 0.1), ("rollouts", 60, 0.2), ("units", 100, 0.6))
    return records


def test_units_to_an_end_lie_between_measurements() -> None:
    assert tables.units_to(STUDY, compared(), "a", ["reward"]) == {0: 1.0, 1: 1.0, 2: 1.0}
    found = tables.units_to(STUDY, compared(), "b", ["reward", "exact"])
    assert found == {0: pytest.approx(0.5), 1: float("inf"), 2: float("inf")}


def test_tables_say_what_the_results_do(tmp_path: Path) -> None:
    study = dataclasses.replace(STUDY, claims=[("a", "before training"), ("b", "a"), ("a", "c")])
    text = tables.tables(study, compared())
    assert "| a > before training | holds: +1.000 [+1.000, +1.000] |" in text
    assert "| b > a | open: -0.467" in text
    assert "a > c" not in text, "nothing is known of it"
    assert "| b | 1 of 3 | 1 of 3 | 1 of 3 |" in text
    assert tables.filled("before <!-- study -->\n<!-- end of study --> after", study, compared()).startswith("before ")
    results = tmp_path / "study.jsonl"
    results.write_text("".join(json.dumps(one) + "\n" for one in compared()))
    assert command.read(results) == compared()


def test_the_figure_is_drawn_of_what_there_is(tmp_path: Path) -> None:
    draw(STUDY, compared(), tmp_path / "study.png")
    with Image.open(tmp_path / "study.png") as picture:
        colors = picture.convert("RGB").getcolors(1 << 20)
    assert colors is not None
    assert len(colors) > 100


def test_rows_of_pictures_stand_beside_their_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "STRIPS", tmp_path)
    images = torch.zeros(20, 3, 64, 64)
    images[0, 0] = 1
    pictures.save_strip(images, "a, alpha 1")
    sheet = pictures.rows(["unknown", "a, alpha 1"])
    assert sheet.height == pictures.HEAD + pictures.SIDE + pictures.GAP
    assert sheet.getpixel((pictures.LABEL + 5, pictures.HEAD + 5)) == (255, 0, 0)


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
    trainer = trainer_of(study, validations(study, "flow_grpo", [])[0])
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
