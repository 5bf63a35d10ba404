"""Every profile in configs/: what all have in common, and each family's on a tiny model of its real classes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from chat_folders import save_flux2_dev, save_flux2_klein, save_z_image
from small_runs import PROMPTS as SHAPES
from small_runs import make_parts
from tiny_folders import PROMPTS, save_qwen_image, save_stable_diffusion_3

from benchmarks.families import profiles
from leapalign import cli
from leapalign.config import load_config, read_config
from leapalign.runs.run_folder import read_metrics
from leapalign.tiny.train_reward import build_scorer, save_scorer
from leapalign.watch.metrics import metric_names
from leapalign.watch.records import read_watch
from leapalign.watch.rules import StopRule

MODELS: dict[str, Callable[[Path], None]] = {
    "flux1": lambda model: make_parts(model.parent),
    "flux2_dev": save_flux2_dev,
    "flux2_klein": save_flux2_klein,
    "qwen_image": save_qwen_image,
    "stable_diffusion_3_5": save_stable_diffusion_3,
    "z_image": save_z_image,
}
Overrides = tuple[str, ...]


def family_of(profile: str) -> str:
    return next(family for family in MODELS if profile.startswith(family))


def of_distinct_memory() -> list[str]:
    """Of each family one profile for each memory section."""
    chosen: dict[tuple[str, str], str] = {}
    for name, path in profiles().items():
        chosen.setdefault((family_of(name), repr(read_config(path)["memory"])), name)
    return list(chosen.values())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Overrides]:
    """Paths and sizes of a family's tiny model, with its prompts in a cache as the profiles' comments say."""

    @functools.cache
    def made(family: str) -> Overrides:
        folder = tmp_path_factory.mktemp(family)
        MODELS[family](folder / "model")
        save_scorer(build_scorer(), folder / "reward")
        prompts = SHAPES if family == "flux1" else PROMPTS
        (folder / "prompts.txt").write_text(prompts[0])
        (folder / "held_out.txt").write_text(prompts[1])
        overrides = (
            f"model.path={folder / 'model'}",
            "model.height=32",
            "model.width=32",
            f"prompts.path={folder / 'prompts.txt'}",
            f"prompts.cache={folder / 'cache'}",
            f"reward.path={folder / 'reward'}",
            "reward.processor=null",
            f"watch.prompts={folder / 'held_out.txt'}",
            f"watch.rewards=[{{name: clipscore, path: {folder / 'reward'}, dtype: bfloat16}}]",
            # That a published CLIP's score is above zero, where this rule makes sense, a random one does not know.
            "watch.stop_when=[diversity < 0.7 base]",
            "rollout.num_steps=2",
            "rollout.batch_size=2",
            "train.batch_size=2",
            "train.iterations=2",
            "samples.count=1",
        )
        config = next(str(path) for name, path in profiles().items() if family_of(name) == family)
        for more in ((), ("--prompts", str(folder / "held_out.txt"))):
            assert cli.main(["cache", "--config", config, *more, *overrides]) == 0
        return overrides

    return made


@pytest.mark.parametrize("profile", of_distinct_memory())
def test_a_profile_trains_its_family_from_a_cache_and_is_watched(
    profile: str, tiny: Callable[[str], Overrides], tmp_path: Path
) -> None:
    overrides = tiny(family_of(profile))
    assert cli.main(["train", "--config", str(profiles()[profile]), f"output={tmp_path}", *overrides]) == 0
    records = read_metrics(tmp_path)
    assert [record["iteration"] for record in records] == [1, 2]
    assert all(record["grad_norm"] > 0 for record in records)
    assert [record["iteration"] for record in read_watch(tmp_path)] == [0, 2]


@pytest.mark.parametrize("profile", profiles())
def test_profiles_name_what_a_user_replaces_alike(profile: str) -> None:
    path = profiles()[profile]
    title, config = path.read_text().splitlines()[0], load_config(path)
    size = f"{config.model.height} x {config.model.width}"
    assert title.startswith("# ")
    assert title.endswith(".")
    assert f"all weights, at {size} on one {path.stem.partition('gb')[0]} GB GPU" in title
    assert config.output == f"runs/{path.parent.name}"
    assert (config.prompts.path, config.prompts.cache, config.watch.prompts) == ("prompts.txt", "cache", "held_out.txt")
    assert config.watch.every
    rules = [StopRule.parsed(text, metric_names(config)) for text in config.watch.stop_when]
    assert [rule.metric for rule in rules] == ["held_out_clipscore", "diversity"]
    assert config.checkpoint.every % config.watch.every == 0
    first = load_config(min(path.parent.glob("*.yaml")))
    places = ("height", "width", "true_cfg_batched")
    assert {**vars(config.model), **dict.fromkeys(places)} == {**vars(first.model), **dict.fromkeys(places)}
    for section in ("threshold", "method", "reward", "optimizer", "ema", "watch"):
        assert getattr(config, section) == getattr(first, section)
