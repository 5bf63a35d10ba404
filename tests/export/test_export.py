"""``leapalign export``: what diffusers loads, model cards, and what is refused before anything is written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from command_line import refused
from diffusers import FluxPipeline
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file
from small_runs import config_of, train

from leapalign.cli import main
from leapalign.export.original_layout import FLUX, original_weights
from leapalign.models.weights import read_weights
from leapalign.runs.checkpoint import latest_checkpoint

CARD = "---\nlicense: other\nlicense_name: some-licence\nlicense_link: LICENSE.md\ntags: [image]\n---\n# A base\n"


def trained(parts: Path, folder: Path, *assignments: str) -> Path:
    """A run from a base of its own, whose card states a licence."""
    shutil.copytree(parts / "model", folder / "base")
    (folder / "base" / "README.md").write_text(CARD)
    (folder / "base" / "LICENSE.md").write_text("Do as you like.")
    (folder / "base" / "single_file.safetensors").write_text("not a part of the pipeline")
    train(config_of(parts, folder / "run", "train.iterations=2", f"model.path={folder / 'base'}", *assignments))
    return folder / "run"


@pytest.fixture(scope="module")
def run(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(parts, tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def adapter_run(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(parts, tmp_path_factory.mktemp("export"), "model.lora_rank=2", "ema.decay=0.0")


def checkpoint(run: Path) -> Path:
    found = latest_checkpoint(run)
    assert found is not None
    return found


def exported(run: Path, output: Path, *arguments: str) -> Path:
    assert main(["export", "--run", str(run), "--output", str(output), *arguments]) == 0
    assert [path.name for path in output.parent.iterdir() if "export" in path.name] == [output.name]
    return output


def pictures(pipeline: FluxPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt="a red circle",
        height=128,
        width=128,
        num_inference_steps=3,
        max_sequence_length=8,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
    ).images


@pytest.mark.parametrize(("weights", "folder"), [("average", "transformer_ema"), ("last", "transformer")])
def test_diffusers_loads_the_whole_model(run: Path, tmp_path: Path, weights: str, folder: str) -> None:
    output = exported(run, tmp_path / "new" / "export", "--weights", weights)
    pipeline = FluxPipeline.from_pretrained(output, vae=None)
    expected = read_weights(checkpoint(run) / folder)
    loaded = pipeline.transformer.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert not torch.equal(pictures(pipeline), pictures(FluxPipeline.from_pretrained(run.parent / "base", vae=None)))
    assert not (output / "single_file.safetensors").exists()


def test_the_original_layout_is_one_file(run: Path, tmp_path: Path) -> None:
    output = exported(run, tmp_path / "export", "--layout", "original")
    assert sorted(path.name for path in output.iterdir()) == ["LICENSE.md", "README.md", "export.safetensors"]
    written = load_file(output / "export.safetensors")
    expected = original_weights(FLUX, read_weights(checkpoint(run) / "transformer_ema"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_diffusers_loads_the_adapter(adapter_run: Path, tmp_path: Path) -> None:
    output = exported(adapter_run, tmp_path / "export")
    pipeline = FluxPipeline.from_pretrained(adapter_run.parent / "base", vae=None)
    before = pictures(pipeline)
    pipeline.load_lora_weights(output)
    assert not torch.equal(pictures(pipeline), before)
    assert metadata_load(output / "README.md")["tags"] == ["leapalign", "lora"]


def test_comfyuis_adapter_has_fused_modules(adapter_run: Path, tmp_path: Path) -> None:
    output = exported(adapter_run, tmp_path / "export", "--layout", "comfyui")
    written = load_file(output / "export.safetensors")
    assert written["diffusion_model.double_blocks.1.img_attn.qkv.lora_A.weight"].shape == (6, 96)
    assert written["diffusion_model.single_blocks.1.linear1.lora_B.weight"].shape == (7 * 96, 8)


def test_the_card_inherits_the_licence_and_says_what_was_trained(run: Path, tmp_path: Path) -> None:
    output = exported(run, tmp_path / "export")
    settings = metadata_load(output / "README.md")
    assert settings == {
        "base_model": "base",
        "license": "other",
        "license_name": "some-licence",
        "license_link": "LICENSE.md",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["leapalign"],
    }
    text = (output / "README.md").read_text()
    for said in ("| method | leapalign |", "| reward | pickscore |", "| iterations | 2 of 4 images |", "(EMA)"):
        assert said in text
    for file in ("README.md", "transformer/config.json"):
        assert str(run.parent) not in (output / file).read_text()
    assert (output / "LICENSE.md").read_text() == "Do as you like."


def test_a_base_on_a_hub_is_named_and_its_licence_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "export"
    assert main(["export", "--run", str(run), "--output", str(output), "model.path=someone/a-model"]) == 0
    assert "only transformer/ is written: the other parts are those of 'someone/a-model'" in capsys.readouterr().out
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "transformer"]
    settings = metadata_load(output / "README.md")
    assert settings["base_model"] == "someone/a-model"
    assert "license" not in settings
    assert "could not be read: state it above" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    "card", [None, "# no front matter", "---\n- a list\n---\n", "---\na: [\n---\n", "---\nx: 1\n---\n"]
)
def test_cards_without_licence_are_no_obstacle(run: Path, tmp_path: Path, card: str | None) -> None:
    base = tmp_path / "base"
    shutil.copytree(run.parent / "base", base)
    (base / "README.md").unlink()
    if card is not None:
        (base / "README.md").write_text(card)
    output = exported(run, tmp_path / "export", f"model.path={base}")
    assert "could not be read" in (output / "README.md").read_text()


def test_nothing_is_written_over(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").mkdir()
    message = refused(["export", "--run", str(run), "--output", str(tmp_path / "taken")], capsys)
    assert "already exists; choose another --output" in message
    assert not list((tmp_path / "taken").iterdir())


def test_what_fails_half_way_leaves_nothing(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    shutil.copytree(run.parent / "base", base)
    shutil.rmtree(base / "text_encoder_2")
    arguments = ["export", "--run", str(run), "--output", str(tmp_path / "export"), f"model.path={base}"]
    assert "text_encoder_2', which is not there" in refused(arguments, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("kind", "layout", "message"),
    [
        ("run", "comfyui", "use --layout original or diffusers"),
        ("adapter_run", "original", "use --layout comfyui or diffusers"),
    ],
)
def test_layouts_that_do_not_fit_name_one_that_does(
    kind: str,
    layout: str,
    message: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = request.getfixturevalue(kind)
    arguments = ["export", "--run", str(run), "--output", str(tmp_path / "export"), "--layout", layout]
    assert message in refused(arguments, capsys)
    assert not list(tmp_path.iterdir())


def test_families_without_a_table_are_told_of_diffusers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "model_index.json").write_text('{"_class_name": "OtherPipeline"}')
    arguments = ["export", "--run", str(run), "--output", str(tmp_path / "export"), "--layout", "original"]
    assert "OtherPipeline's transformer is not known; use --layout diffusers" in refused(
        [*arguments, f"model.path={base}"], capsys
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_run_without_checkpoint_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(run / "config.yaml", tmp_path)
    arguments = ["export", "--run", str(tmp_path), "--output", str(tmp_path / "export")]
    assert "holds no checkpoint yet" in refused(arguments, capsys)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copytree", full)
    monkeypatch.setattr("leapalign.export.export.save_file", full)
    line = refused(
        ["export", "--run", str(run), "--output", str(tmp_path / "new" / "export"), "--layout", layout], capsys
    )
    assert "(No space left on device); make room and check its permissions, then export again" in line
    assert not list((tmp_path / "new").iterdir())
