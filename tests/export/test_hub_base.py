"""Exports of runs whose base is a hub id: the cache holds what training needed, and is completed where it can be."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused
from diffusers import FluxPipeline
from hub_cache import COMMIT, offline, put_in_cache
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import filter_repo_objects
from small_runs import config_of, train

from leapalign.cli import main
from leapalign.export import base
from leapalign.models.weights import read_weights
from leapalign.runs.checkpoint import run_weights

NAME = "someone/a-model"
CARD = "---\nlicense: other\nlicense_name: some-licence\n---\n"


@pytest.fixture(scope="module")
def model(parts: Path) -> Path:
    """All files of the base."""
    (parts / "model" / "README.md").write_text(CARD)
    (parts / "model" / "LICENSE.md").write_text("Do as you like.")
    return parts / "model"


@pytest.fixture(scope="module")
def run(parts: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    put_in_cache(model, folder / "cache", NAME)
    with offline(folder / "cache"):
        train(config_of(parts, folder / "run", "train.iterations=2", f"model.path={NAME}"))
    return folder / "run"


@pytest.fixture
def snapshot(model: Path, tmp_path: Path) -> Iterator[Path]:
    """In a cache that tests may change."""
    snapshot = put_in_cache(model, tmp_path / "cache", NAME)
    with offline(tmp_path / "cache"):
        yield snapshot


def export(run: Path, tmp_path: Path, *arguments: str) -> list[str]:
    return ["export", "--run", str(run), "--output", str(tmp_path / "new" / "export"), *arguments]


def test_the_whole_model_comes_from_the_cache(run: Path, tmp_path: Path, snapshot: Path) -> None:
    assert main(export(run, tmp_path)) == 0
    output = tmp_path / "new" / "export"
    shutil.rmtree(tmp_path / "cache")
    expected = read_weights(run_weights(run, "average"))
    loaded = FluxPipeline.from_pretrained(output)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.transformer.state_dict().items())
    assert loaded.text_encoder_2 is not None
    assert (output / "LICENSE.md").read_text() == "Do as you like."
    settings = metadata_load(output / "README.md")
    assert (settings["base_model"], settings["license_name"]) == (NAME, "some-licence")


def without_folder(snapshot: Path) -> None:
    shutil.rmtree(snapshot / "text_encoder_2")


def without_weights(snapshot: Path) -> None:
    (snapshot / "text_encoder_2" / "model.safetensors").unlink()


def without_a_shard(snapshot: Path) -> None:
    part = snapshot / "text_encoder_2"
    (part / "model.safetensors").rename(part / "model-00001-of-00002.safetensors")
    index = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    (part / "model.safetensors.index.json").write_text(index)


HARMS = [without_folder, without_weights, without_a_shard]


@pytest.mark.parametrize("harm", HARMS)
def test_what_was_never_downloaded_is_named(
    run: Path, tmp_path: Path, snapshot: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None]
) -> None:
    harm(snapshot)
    line = refused(export(run, tmp_path), capsys)
    assert f"the export needs text_encoder_2 of '{NAME}', which the hub's cache does not hold" in line
    assert f"run hf download {NAME} where the hub can be reached, then export again" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("harm", HARMS)
def test_what_is_missing_is_downloaded_of_the_same_commit(
    run: Path,
    model: Path,
    tmp_path: Path,
    snapshot: Path,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None],
) -> None:
    harm(snapshot)
    asked: list[dict[str, Any]] = []

    published = [path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()]
    other_forms = ["text_encoder_2/model.fp16.safetensors", "text_encoder_2/pytorch_model.bin"]

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str], **options: Any) -> str:
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        asked.append({"name": name, "other forms": list(filter_repo_objects(other_forms, **patterns)), **options})
        shutil.rmtree(snapshot / "text_encoder_2", ignore_errors=True)
        (snapshot / "text_encoder_2").mkdir()
        for file in filter_repo_objects(published, **patterns):
            shutil.copy(model / file, snapshot / file)
        return str(snapshot)

    monkeypatch.setattr(base, "snapshot_download", download)
    assert main(export(run, tmp_path)) == 0
    assert asked == [{"name": NAME, "other forms": [], "revision": COMMIT}]
    FluxPipeline.from_pretrained(tmp_path / "new" / "export")


def test_nothing_is_known_of_a_base_that_was_never_loaded(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with offline(tmp_path / "empty"):
        line = refused(export(run, tmp_path), capsys)
    assert f"the export needs model_index.json, transformer/config.json of '{NAME}'" in line
    assert not (tmp_path / "new").exists()


def test_a_licence_text_that_cannot_be_had_is_asked_for(
    run: Path, tmp_path: Path, snapshot: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training reads no licence text: it is not in the cache as a rule."""
    for name in ("LICENSE.md", "README.md"):
        (snapshot / name).unlink()
    assert main(export(run, tmp_path, "--layout", "comfyui")) == 0
    assert "add the text of the base's licence before you pass it on" in capsys.readouterr().out
    output = tmp_path / "new" / "export"
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "export.safetensors"]
    assert "license" not in metadata_load(output / "README.md")
    assert "could not be read: state it above" in (output / "README.md").read_text()


def test_a_licence_text_is_downloaded(
    run: Path, model: Path, tmp_path: Path, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (snapshot / "LICENSE.md").unlink()

    def download(_: str, allow_patterns: list[str], **__: Any) -> str:
        assert {"README.md", "LICENSE*"} <= set(allow_patterns)
        shutil.copy(model / "LICENSE.md", snapshot)
        return str(snapshot)

    monkeypatch.setattr(base, "snapshot_download", download)
    assert main(export(run, tmp_path, "--layout", "comfyui")) == 0
    assert (tmp_path / "new" / "export" / "LICENSE.md").read_text() == "Do as you like."


def test_a_folder_that_is_gone_is_no_hub_id(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(export(run, tmp_path, f"model.path={tmp_path / 'gone'}"), capsys)
    assert f"there is no base model '{tmp_path / 'gone'}'; set model.path to where it is now" in line
