"""Published settings as recipes: their numbers, that they load over every card's profile, and what a later config does
to those before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused

from leapalign.cli import main
from leapalign.config import load_config
from leapalign.config.profiles import profiles
from leapalign.inputs.validation import UserError, validated
from leapalign.methods import METHODS, get_method
from leapalign.rewards import REWARDS
from leapalign.runs.run_folder import read_metrics

RECIPES = sorted(name.removeprefix("recipes/") for name in profiles() if name.startswith("recipes/"))
PAIRS = [(card, recipe) for recipe in RECIPES for card in profiles() if Path(card).parts[0] == Path(recipe).parts[0]]
SD3, KLEIN = "stable_diffusion_3_5_medium", "flux2_klein_base_9b"
PUBLISHED_METHODS: dict[str, dict[str, Any]] = {
    "flux1_dev/leapalign_hpsv2": {"alpha": 0.3, "tau": 0.1},
    "flux1_dev/leapalign_pickscore": {"alpha": 0.1, "tau": 0.1},
    "flux1_dev/leapalign_hpsv3": {"alpha": 0.1, "tau": 0.1},
    f"{SD3}/flowbp_sparse": {"active_steps": 4, "late_bias": 1, "rescale": 0.5},
    f"{SD3}/flowbp_bridge": {"active_steps": 5, "late_bias": 4, "rescale": 0, "alpha": 0.5},
    f"{SD3}/flowbp_lagrange": {"longest_last_leap": 10, "tau": 0.2, "rescale": 0, "tail_ratio": None, "alpha": 0.1},
    f"{KLEIN}/flowbp_sparse": {"active_steps": 4, "late_bias": 2, "rescale": 0},
    f"{KLEIN}/flowbp_bridge": {"active_steps": 3, "late_bias": 4, "rescale": 0.5, "alpha": 1},
    f"{KLEIN}/flowbp_lagrange": {
        **{"longest_last_leap": None, "tau": 0.1, "rescale": 0, "tail_ratio": 0.7, "alpha": 0.1},
        **{"supports": 3, "active_supports": 2, "support_scale": 0.25, "concentration": (2.0, 6.0, 2.5)},
    },
}
"""By LeapAlign's paper, and by FlowBP's own configs."""
PUBLISHED_REWARDS = {
    "flux1_dev/leapalign_hpsv2": ("hpsv2", 0.55, 1e-5),
    "flux1_dev/leapalign_pickscore": ("pickscore", 0.4, 1e-5),
    "flux1_dev/leapalign_hpsv3": ("hpsv3", 13.5, 8e-6),
}
"""Reward, threshold and learning rate; FlowBP's are the first line's everywhere."""
SIZES = {"flux1_dev": (720, 64), SD3: (512, 64), KLEIN: (512, 32)}
"""Pixels, and images of an iteration."""
GUIDANCE = {"flux1_dev": (3.5, 1.0), SD3: (3.5, 3.5), KLEIN: (3.5, 4.0)}
"""The distilled scale (the default where a model takes none), and that of classifier-free guidance."""

SAMPLING = {
    "flux1_dev": ("full", None, "pipeline", 50),
    SD3: ("detached", 512, "linear", 40),
    KLEIN: ("detached", None, "pipeline", 50),
}
"""Gradient of guidance, tokens of a prompt, noise levels, and steps to evaluate by."""


def test_every_recipe_has_its_published_numbers_here() -> None:
    assert sorted(PUBLISHED_METHODS) == RECIPES


@pytest.mark.parametrize(("card", "recipe"), PAIRS)
def test_a_recipe_over_a_card_is_the_published_setting(card: str, recipe: str) -> None:
    family, method_name = recipe.split("/")
    below, config = load_config(Path(card)), load_config([Path(card), Path("recipes") / recipe])
    method = get_method(**config.method)
    name = method_name.partition("_")[0] if family == "flux1_dev" else method_name
    assert type(method) is METHODS[name]
    published = {"per_image": family == "flux1_dev", **PUBLISHED_METHODS[recipe]}
    assert {option: getattr(method, option) for option in published} == published
    reward, threshold, rate = PUBLISHED_REWARDS.get(recipe, ("hpsv2", 0.55, 1e-5))
    assert validated(REWARDS[reward], {k: v for k, v in config.rewards[0].items() if k != "name"}, "reward")
    assert (config.rewards[0]["name"], config.threshold, config.optimizer.learning_rate) == (reward, threshold, rate)
    assert (config.model.height, config.train.batch_size) == SIZES[family]
    assert config.model.width == config.model.height
    assert (config.model.guidance, config.model.true_cfg_scale) == GUIDANCE[family]
    assert (config.rollout.num_steps, config.train.iterations, config.ema.decay) == (25, 300, 0.995)
    model, sigmas = config.model, config.rollout.sigmas
    assert (model.cfg_gradient, model.max_sequence_length, sigmas, config.evaluate.num_steps) == SAMPLING[family]
    assert not config.ema.warmup
    optimizer = config.optimizer
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.max_grad_norm) == (0.9, 0.999, 1e-4, 1)
    # The card's: where things live, what is watched, and the model with its dtype.
    assert (config.memory, config.watch, config.optimizer.name) == (below.memory, below.watch, below.optimizer.name)
    assert (config.model.path, config.model.dtype) == (below.model.path, below.model.dtype)
    assert config.rollout.batch_size == below.rollout.batch_size
    assert config.output == f"runs/{family}_{method_name}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_method_of_a_recipe_plans(recipe: str) -> None:
    config = load_config([Path("tiny"), Path("recipes") / recipe])
    method = get_method(**config.method)
    sigmas = torch.linspace(1, 0, config.rollout.num_steps + 1)
    plan = method.plan(sigmas, **method.draw(config.rollout.num_steps, 64, torch.Generator().manual_seed(0)))
    assert bool((plan.coefficient.sum(dim=0) < 0).all())


@pytest.mark.parametrize(
    ("recipe", "share"),
    [
        (f"{SD3}/flowbp_sparse", 0.5 + 0.5 * 4 / 25),
        (f"{SD3}/flowbp_bridge", 5 / 25),
        (f"{KLEIN}/flowbp_sparse", 4 / 25),
        (f"{KLEIN}/flowbp_bridge", 0.5 + 0.5 * 3 / 25),
    ],
)
def test_how_much_of_the_trajectory_a_recipe_counts(recipe: str, share: float) -> None:
    """Coefficients of K of 25 equal steps, times 1 + rho (25 / K - 1), add up to rho + (1 - rho) K / 25; by default,
    rho 1, to 1."""
    options = load_config([Path("tiny"), Path("recipes") / recipe]).method
    for method, expected in ((get_method(**options), share), (get_method(options["name"]), 1.0)):
        drawn = method.draw(25, 100, torch.Generator().manual_seed(0))
        total = method.plan(torch.linspace(1, 0, 26, dtype=torch.float64), **drawn).coefficient.sum(dim=0)
        torch.testing.assert_close(-total, torch.full((100,), expected, dtype=torch.float64))


def test_later_configs_go_over_those_before_and_overrides_over_all(tmp_path: Path) -> None:
    """Key by key in sections; a method or reward whole; what is no section as it is."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(
        "seed: 1\nthreshold: 2\ntrain: {iterations: 5, batch_size: 4}\nmethod: {name: leapalign, alpha: 0.7}\n"
        "reward: {name: pickscore, path: a, scale: probability}\n"
    )
    second.write_text(
        "seed: 3\ntrain: {batch_size: 8}\nema: {decay: 0.5}\nmethod: {name: flowbp_sparse}\n"
        "reward: [{name: hpsv2, weight: 2}]\n"
    )
    config = load_config([first, second], ["ema.decay=0.6"])
    assert (config.seed, config.threshold, config.ema.decay) == (3, 2, 0.6)
    assert (config.train.iterations, config.train.batch_size) == (5, 8)
    assert config.method == {"name": "flowbp_sparse"}
    assert config.reward == [{"name": "hpsv2", "weight": 2}]
    assert load_config([second, first]).method == {"name": "leapalign", "alpha": 0.7}
    assert load_config([first]) == load_config(first)


def test_what_is_wrong_with_several_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("trian: {iterations: 5}\n")
    with pytest.raises(UserError, match=r"^tiny with .*mine.yaml: unknown key 'trian'; did you mean 'train'"):
        load_config([Path("tiny"), tmp_path / "mine.yaml"])
    message = refused(["train", "--config", "tiny", "--config", "recipes/flux1_dev/leapalign_hpsv4"], capsys)
    assert "did you mean 'recipes/flux1_dev/leapalign_hpsv" in message


@pytest.mark.parametrize("after", [(), ("--config", "tiny")])
def test_a_recipe_over_nothing_is_refused(after: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Alone it would train the tiny model; before a profile it would be undone."""
    message = refused(["train", "--config", "recipes/flux1_dev/leapalign_hpsv2", *after], capsys)
    assert "is a recipe, and names no model; give a card's profile of its model first" in message


def test_a_run_of_two_configs_trains_with_both(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: {name: flowbp_sparse, per_image: false}\ntrain: {iterations: 1, batch_size: 2}\n")
    small = ("rollout.num_steps=3", "rollout.batch_size=2", "samples.every=0", "model.height=32", "model.width=32")
    run = tmp_path / "run"
    assert main(["train", "--config", "tiny", "--config", str(recipe), f"output={run}", *small]) == 0
    (record,) = read_metrics(run)
    assert {"gradient_term_0", "gradient_term_2"} <= set(record)
    saved = load_config(run / "config.yaml")
    assert saved.method == {"name": "flowbp_sparse", "per_image": False}
    assert saved.optimizer == load_config(Path("tiny")).optimizer
