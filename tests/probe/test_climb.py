"""Climbing a reward on latents alone: steps by hand, what is looked at, what is said of it, and the command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from command_line import TINY
from torch import Tensor

from leapalign.cli import main
from leapalign.config import load_config
from leapalign.method_gradient import Objective
from leapalign.planning.simulate import simulate, simulate_probe
from leapalign.probe.climb import STEP, Climb, ascent, changes, climb, probe, verdict
from leapalign.probe.page import write_probe
from leapalign.reward_gradient import RewardFn, RewardTerm
from leapalign.tiny.demo import WITNESS
from leapalign.tiny.judge import detect, untidiness
from leapalign.tiny.world import all_prompts, balanced_prompts


def decode(latents: Tensor) -> Tensor:
    return latents.view(len(latents), 3, 4, 4)


def mean(images: Tensor, prompts: object) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def first_channel(images: Tensor, prompts: object) -> Tensor:
    return images[:, 0].mean(dim=(1, 2))


def objective(*terms: tuple[RewardFn, float], chunk: int | None = None) -> Objective:
    named = [RewardTerm(f"r{n}", reward, math.inf, weight) for n, (reward, weight) in enumerate(terms)]
    return Objective(decode, named, chunk)


def grey(count: int) -> Tensor:
    return torch.full((count, 48), 0.5, dtype=torch.float64)


def test_a_step_is_one_length_up_the_weighted_sum_of_the_gradients() -> None:
    lengths = torch.tensor([1.0, 2.0], dtype=torch.float64)
    moved = ascent(objective((mean, 2.0), (first_channel, 3.0)), grey(2), ["a", "b"], lengths) - grey(2)
    direction = torch.full((48,), 2 / 48, dtype=torch.float64)
    direction[:16] += 3 / 16
    direction /= direction.norm()
    torch.testing.assert_close(moved, STEP * lengths[:, None] * direction)


@pytest.mark.parametrize("slope", [1.0, 1e-30, 0.0])
def test_a_step_is_of_that_length_however_flat_the_reward(slope: float) -> None:
    start = torch.rand(2, 48, generator=torch.Generator().manual_seed(0))
    moved = ascent(
        objective((lambda images, prompts: slope * mean(images, prompts), 1.0)), start, ["a", "b"], start.norm(dim=1)
    )
    expected = STEP * start.norm(dim=1) * (slope > 0)
    torch.testing.assert_close((moved - start).norm(dim=1), expected, rtol=1e-4, atol=0)


def test_a_climb_is_its_steps_whatever_the_batch_and_looks_where_asked() -> None:
    start = torch.rand(5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prompts = list("abcde")
    climbs = list(climb(objective((mean, 1.0)), {"other": first_channel}, start, prompts, [0, 2, 3], 5))
    assert [one.steps for one in climbs] == [0, 2, 3]
    assert set(climbs[0].values) == {
        *("reward_r0", "held_out_other", "saturation", "sharpness", "edge_density", "drift", "norm")
    }
    expected = start
    for _ in range(3):
        expected = ascent(objective((mean, 1.0)), expected, prompts, start.norm(dim=1))
    torch.testing.assert_close(climbs[-1].images, decode(expected).clamp(0, 1).float())
    torch.testing.assert_close(climbs[-1].values["held_out_other"], first_channel(climbs[-1].images, prompts))
    torch.testing.assert_close(climbs[-1].values["norm"], (expected.norm(dim=1) / start.norm(dim=1)).float())
    in_parts = list(climb(objective((mean, 1.0), chunk=1), {}, start, prompts, [3], 2))
    torch.testing.assert_close(in_parts[0].images, climbs[-1].images)
    assert climbs[0].values["drift"].tolist() == [0.0] * 5


CRITIC = '{name: custom, function: "leapalign.tiny.critic:critic"}'
PLAIN = [f"reward={CRITIC}", "watch.rewards=[{name: pickscore, path: embedded:reward, scale: probability}]"]


def looks(**ends: list[float]) -> list[Climb]:
    """A climb from zeros to ``ends``."""
    count = len(next(iter(ends.values())))
    images = torch.rand(count, 3, 8, 8)
    start = Climb(0, images, {name: torch.zeros(count) for name in ends})
    return [start, Climb(10, images, {name: torch.tensor(values) for name, values in ends.items()})]


RISES, FALLS, UNCLEAR = [0.1, 0.2, 0.15, 0.12], [-0.1, -0.2, -0.15, -0.12], [0.1, -0.2, 0.15, -0.12]


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ({"reward_a": RISES, "held_out_b": RISES}, "leads to better pictures: b rose"),
        ({"reward_a": RISES, "held_out_b": FALLS, "held_out_c": RISES}, "leads away from good pictures: b fell"),
        ({"reward_a": RISES, "held_out_b": UNCLEAR}, "Unclear: b"),
        ({"reward_a": RISES}, "No other reward was asked"),
        ({"reward_a": UNCLEAR, "held_out_b": RISES}, "does not rise along its own gradient"),
        ({"reward_a": [0.0, 0.0], "held_out_b": [1.0, 1.1]}, "does not rise along its own gradient"),
        ({"reward_a": [-0.1, 0.3, 0.2, -0.1]}, "Unclear: the climbed reward"),
        ({"reward_a": [math.nan, 0.3]}, "No judgement: reward_a became"),
        ({"reward_a": RISES, "held_out_b": [*RISES[:3], math.nan]}, "No judgement: held_out_b became"),
    ],
)
def test_the_verdict(ends: dict[str, list[float]], said: str) -> None:
    assert said in verdict(looks(**ends))


def test_changes_are_image_by_image() -> None:
    (none, change) = changes(looks(reward_a=[1.0, 2.0, 3.0]))["reward_a"]
    assert (none.mean, none.low, change.mean) == (0, 0, 2)
    assert change.high - change.mean == pytest.approx(2.4841, abs=1e-3)


def test_the_page_shows_every_look_and_escapes_prompts(tmp_path: Path) -> None:
    page = write_probe(tmp_path / "page", looks(reward_a=RISES, held_out_b=RISES), ["<b>", "c", "d", "e"])
    text = page.read_text()
    assert "<b>" not in text
    assert text.count('src="images/') == 8 == len(list((tmp_path / "page" / "images").iterdir()))
    assert "leads to better pictures" in text


def test_the_command_tells_climbs_and_leaves_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["probe", "--config", TINY, "--images", "4", "--steps", "4", "rollout.num_steps=3", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["images"], found["steps"], found["page"]) == (4, [0, 1, 2, 3, 4], "runs/probe/index.html")
    assert all(len(values) == 5 for values in found["means"].values())
    assert found["means"]["drift"][0] == 0 < found["means"]["drift"][1] <= STEP * 1.001
    assert found["verdict"] in Path(found["page"]).read_text()
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["page"] == "runs/probe-2/index.html"


@pytest.mark.parametrize(
    ("asked", "told"),
    [(["--images", "1"], "--images must be at least 2"), (["--steps", "-1"], "--steps must be at least 1")],
)
def test_bad_requests_are_refused(asked: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--config", TINY, *asked]) == 2
    assert told in capsys.readouterr().err


def test_a_page_that_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--config", TINY, "--page", str(tmp_path)]) == 2
    assert "already exists" in capsys.readouterr().err


def test_a_simulated_probe_needs_what_the_reward_stage_does_without_the_model() -> None:
    config = load_config(Path(TINY))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, reward_chunk=4))
    probed, trained = simulate_probe(config), simulate(config).device["reward"]
    assert probed.by_role["reward"] == trained.by_role["reward"]
    assert "weights" not in probed.by_role
    assert 0 < probed.total < trained.total


def untidy(made: Climb) -> float:
    """Mean untidiness of its images: what is smudged, speckled or between two shapes."""
    images = [image.numpy() for image in made.images]
    return sum(untidiness(image, detect(image)) for image in images) / len(images)


@pytest.mark.slow
def test_a_probe_tells_a_reward_whose_gradient_is_taught_from_plain_ones() -> None:
    """The critic ranks pictures nearly without fault, which is all it was trained for. A bad reward asks for grey."""
    prompts = [prompt.text for prompt in balanced_prompts(all_prompts(), 24)]
    taught = probe(load_config(Path(TINY), [WITNESS]), prompts, 20, 0)
    assert "leads to better pictures: custom rose" in verdict(taught)
    ranks = probe(load_config(Path(TINY), PLAIN), prompts, 20, 0)
    assert changes(ranks)["reward_custom"][-1].low > 0
    assert "leads to better pictures" not in verdict(ranks)
    assert untidy(taught[0]) < 0.004
    assert untidy(ranks[-1]) > 2 * untidy(taught[-1])
    Path("grey.py").write_text("def grey(images, prompts): return -(images - 0.5).square().mean((1, 2, 3))")
    bad = probe(load_config(Path(TINY), [WITNESS, "reward={name: custom, function: 'grey.py:grey'}"]), prompts, 20, 0)
    assert "leads away from good pictures: custom fell" in verdict(bad)
