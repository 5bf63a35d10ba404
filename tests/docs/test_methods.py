"""docs/methods.md keeps its word: its method trains, its table has every method, its figures are the results'."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from worlds import conditioned_world, relative_difference

from benchmarks.tables import filled
from leapalign.config import load_config
from leapalign.config.profiles import profiles
from leapalign.methods import METHODS, get_method
from leapalign.surrogate import surrogate_backward
from leapalign.trainer import Trainer

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "methods.md"
TEXT = PAGE.read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)


@pytest.fixture
def any_step() -> Iterator[None]:
    """Runs the page's examples, which register a method; it is gone after the test."""
    registered = dict(METHODS)
    code = compile("\n".join(EXAMPLES), str(PAGE), "exec", dont_inherit=True)
    exec(code, {"__name__": "example"})
    yield
    METHODS.clear()
    METHODS.update(registered)


def test_the_method_of_the_page_is_short_and_trains(any_step: None, tmp_path: Path) -> None:
    body = EXAMPLES[0].split("@dataclass", 1)[1]
    assert len(EXAMPLES[0].strip().splitlines()) <= 25
    assert "assert_close" in EXAMPLES[1]
    assert "def plan" in body
    asked = ("method={name: any_step, scale: 0.5}", "rollout.batch_size=4", "train.batch_size=4", "train.iterations=1")
    config = load_config(ROOT / "configs" / "tiny.yaml", [f"output={tmp_path / 'run'}", "rollout.num_steps=4", *asked])
    (record,) = Trainer.from_config(config).run()
    assert record["grad_norm"] > 0


def test_the_method_of_the_page_is_its_inline_graph(any_step: None) -> None:
    world = conditioned_world((6,), batch=3, steps=7)
    step = torch.tensor([0, 6, 3])
    sigma = world.rollout.sigmas[step]
    predicted = -0.5 * sigma[:, None] * world.velocity(world.rollout.latents[step, torch.arange(3)], sigma)
    (predicted * world.x0_gradient).sum().backward()
    expected = world.gradients()
    plan = get_method("any_step", scale=0.5).plan(world.rollout.sigmas, step=step)
    surrogate_backward(plan, world.rollout, world.velocity, world.x0_gradient)
    assert relative_difference(world.gradients(), expected) <= 1e-10


def test_every_method_has_a_line_with_its_defaults() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", TEXT, flags=re.M)[: len(METHODS)])
    assert set(rows) == set(METHODS)
    for name, option, said in (
        ("refl", "last_steps", "last {} steps"),
        ("draft_lv", "copies", "{} re-noised"),
        ("drtune", "active_steps", "{} equally spaced"),
        ("leapalign", "alpha", "alpha {}"),
        ("leapalign", "tau", "tau {}"),
        ("flowbp_sparse", "active_steps", "{} steps"),
        ("flowbp_bridge", "active_steps", "{} steps"),
        ("flowbp_bridge", "alpha", "alpha {}"),
        ("flowbp_lagrange", "active_supports", "first {} of 3"),
        ("flowbp_lagrange", "tau", "tau {}"),
        ("flowbp_lagrange", "support_scale", "{} after the start"),
    ):
        assert said.format(getattr(get_method(name), option)) in rows[name]


def test_every_difference_to_what_is_published_has_its_test() -> None:
    (table,) = re.findall(r"^\| option \| paper .*\n\| --- .*\n((?:\|.*\n)+)", TEXT, flags=re.M)
    named = re.findall(r"`(test_\w+)` \|$", table, flags=re.M)
    assert len(named) == len(table.splitlines())
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name in named if f"def {name}(" not in tests] == []


def test_every_recipe_is_listed() -> None:
    assert set(re.findall(r"^\| `(recipes/\S+)`", TEXT, flags=re.M)) == {
        n for n in profiles() if n.startswith("recipes/")
    }


def test_metrics_of_the_page_are_those_of_a_run(tmp_path: Path) -> None:
    asked = (
        "rollout.batch_size=4",
        "train.batch_size=4",
        "train.iterations=1",
        "rollout.num_steps=4",
        "rollout.cache={name: first_block}",
    )
    compared = "diagnostics.true_gradient_every=1"
    config = load_config(ROOT / "configs" / "tiny.yaml", [f"output={tmp_path / 'run'}", compared, *asked])
    (record,) = Trainer.from_config(config).run()
    named = re.findall(r"`(\w+)`", TEXT.split("## What metrics say")[1].split("##")[0])
    metrics = {name.replace("_R", "_1") for name in named} - {"max_ratio", "d_m", "base_velocity"}
    assert metrics <= set(record)


def test_table_comes_from_the_results() -> None:
    assert filled(TEXT) == TEXT
