"""A model without text encoders: it needs none where a cache, made with the complete folder, holds the prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import TINY, refused

from leapalign.cli import main
from leapalign.storage.embedded import FOLDER
from leapalign.tiny.model import build_transformer

PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
FEW = ("rollout.num_steps=2", "rollout.batch_size=2", "train.batch_size=2", "train.iterations=1", "samples.count=1")


FORMS = ("null", "absent", "named")


def bare_folder(tmp_path: Path, form: str = "null") -> Path:
    """As saved by a pipeline that was loaded without them, as written by hand, and as downloaded without them."""
    folder = Path(shutil.copytree(FOLDER / "base", tmp_path / "bare"))
    index = json.loads((folder / "model_index.json").read_text())
    for name in PARTS:
        shutil.rmtree(folder / name)
        if form == "null":
            index[name] = [None, None]
        elif form == "absent":
            del index[name]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> str:
    """Made with the complete folder."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    given = ("--config", TINY, "--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "cache"))
    assert main(["cache", *given]) == 0
    return f"prompts.cache={tmp_path / 'cache'}"


def test_every_command_runs_from_a_cache(cache: str, tmp_path: Path) -> None:
    given = (
        "--config",
        TINY,
        f"model.path={bare_folder(tmp_path)}",
        cache,
        f"prompts.path={tmp_path / 'prompts.txt'}",
        *FEW,
    )
    assert main(["train", *given, f"output={tmp_path / 'run'}"]) == 0
    assert main(["evaluate", *given]) == 0
    assert main(["evaluate", "--run", str(tmp_path / "run")]) == 0
    assert main(["generate", *given, "--prompt", "a red circle", "--output", str(tmp_path / "images")]) == 0
    assert main(["memory", *given]) == 0


@pytest.mark.parametrize("form", FORMS)
def test_however_they_are_left_out(cache: str, tmp_path: Path, form: str) -> None:
    given = ("--config", TINY, f"model.path={bare_folder(tmp_path, form)}", cache, "--prompt", "a red circle", *FEW)
    assert main(["generate", *given, "--output", str(tmp_path / "images")]) == 0


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "cache"])
def test_without_a_cache_both_remedies_are_told(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = bare_folder(tmp_path)
    output = ["--output", str(tmp_path / "out")] if command in ("generate", "cache") else [f"output={tmp_path / 'out'}"]
    line = refused([command, "--config", TINY, *output, f"model.path={bare}"], capsys)
    assert f"'{bare}' has no text_encoder, which prompts are encoded with; set model.path to the complete" in line
    assert "prompts.cache" in line
    assert not (tmp_path / "out").exists()


def test_embeddings_of_another_size_are_refused(cache: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No text encoder tells whose they are."""
    bare, own = bare_folder(tmp_path), build_transformer()
    config = {**own.config, "joint_attention_dim": own.config.joint_attention_dim * 2}
    type(own).from_config(config).save_pretrained(bare / "transformer")
    capsys.readouterr()
    settings = (f"model.path={bare}", cache, f"prompts.path={tmp_path / 'prompts.txt'}", f"output={tmp_path / 'run'}")
    line = refused(["train", "--config", TINY, *settings, *FEW], capsys)
    assert "wide (tokens), and the model takes" in line
    assert "set prompts.cache to those of this model" in line
    assert not (tmp_path / "run").exists()
