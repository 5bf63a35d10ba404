"""What the pages say exists: YAML trains, and paths, modules, settings and links lead somewhere."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import PAGES, ROOT, SHELLS, blocks, spans, text_of

from benchmarks.mutations import SECTIONS, TINY
from leapalign.config import load_config
from leapalign.inputs.yaml_values import yaml_values
from leapalign.runs.run import Run

YAML = [(page, block) for page in PAGES for block in blocks(page, "yaml")]
EMBEDDED = {
    "openai/clip-vit-large-patch14": "embedded:reward",
    "held_out_clipscore < 0.9 base": "held_out_clipscore < base - 5",
}
"""What stands in for a model that has to be downloaded, and for a rule: the embedded one's cosines are negative."""
NOT_THERE = ("leapalign/rewards/brightness.py", "runs/tiny/index.html", "runs/flux1_dev/samples/")
"""Paths of what a reader makes."""


@pytest.mark.parametrize(("page", "block"), YAML, ids=[f"{page}-{number}" for number, (page, _) in enumerate(YAML)])
def test_yaml_is_part_of_a_config_that_trains(page: str, block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("held_out.txt").write_text("a red circle\na green cross\n")
    Path("my_package").mkdir()
    Path("my_package", "my_module.py").write_text("def my_reward(images, prompts): return images.mean((1, 2, 3))")
    monkeypatch.syspath_prepend(Path.cwd())
    for name, instead in EMBEDDED.items():
        block = block.replace(name, instead)
    values = yaml_values(block, page)
    assert values
    small = {key: {**TINY[key], **values.get(key, {})} for key in ("model", "prompts", "rollout", "train", "samples")}
    Path("config.yaml").write_text(yaml.safe_dump({**TINY, "output": "run", **values, **small}))
    Run.from_config(load_config(Path("config.yaml"))).train()
    assert Path("run", "metrics.jsonl").exists()


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    """Those with a folder in front, from the top of the clone; leap_kernels by its name."""
    named = [span for span in spans(page) if re.fullmatch(r"[\w.-]+/[\w./-]*(/|\.\w+)", span)]
    missing = [name for name in named if not ((ROOT / name).exists() or (ROOT / "kernels" / name).exists())]
    assert set(missing) <= set(NOT_THERE)


@pytest.mark.parametrize("page", PAGES)
def test_modules_and_what_is_in_them_exist(page: str) -> None:
    text = text_of(page)
    named = re.findall(r"`((?:leapalign|leap_kernels)(?:\.\w+)+)[`(]", text)
    named += [f"{module}.{name}" for module, name in re.findall(r"^from (leap\S+) import (\w+)$", text, flags=re.M)]
    for name in named:
        assert found(name) is not None, name


def found(name: str) -> Any:
    """The module, or what is in one, or None."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute, None)


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page: str) -> None:
    """`section.key`, with a value or without one."""
    for span in spans(page):
        section, dot, key = span.partition("=")[0].partition(".")
        if (
            section
            and dot
            and section in SECTIONS
            and re.fullmatch(r"\w+", key)
            and Path(span).suffix not in (".json", ".jsonl", ".txt")
        ):
            assert any(key in keys for keys in SECTIONS[section]), span


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text_of(page))
    assert all((ROOT / page).parent.joinpath(link).exists() for link in links)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_a_test_takes(page: str) -> None:
    """YAML here, commands next door, Python by a test of its page; what names no language may be for show."""
    languages = re.findall(r"^```(\w+)$", text_of(page), flags=re.M)
    assert set(languages) <= {"python", "yaml", *SHELLS}
