"""``leapalign export``: what diffusers loads, model cards, and what is refused before anything is written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_folders import save_flux2_klein
from command_line import refused
from diffusers import FluxPipeline
from family_checks import write_config
from huggingface_hub.repocard import metadata_load
from safetensors.torch import load_file
from small_runs import config_of, train

from leapalign.cli import main
from leapalign.export.layouts import FLUX
from leapalign.export.original_layout import original_weights
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


def loaded_by_card(output: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pipeline of the code in the card, run where it lies, beside the base that it names."""
    (output / "base").symlink_to(base)
    monkeypatch.chdir(output)
    (code,) = re.findall(r"```python\n(.*?)```", (output / "README.md").read_text(), flags=re.S)
    found: dict[str, Any] = {}
    exec(code, found)
    return found["pipeline"]


@pytest.mark.parametrize(("weights", "folder"), [("average", "transformer_ema"), ("last", "transformer")])
def test_diffusers_loads_the_whole_model(run: Path, tmp_path: Path, weights: str, folder: str) -> None:
    output = exported(run, tmp_path / "new" / "export", "--weights", weights)
    pipeline = FluxPipeline.from_pretrained(output)
    expected = read_weights(checkpoint(run) / folder)
    loaded = pipeline.transformer.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert not torch.equal(pictures(pipeline), pictures(FluxPipeline.from_pretrained(run.parent / "base")))
    assert not (output / "single_file.safetensors").exists()


@pytest.mark.parametrize("layout", ["original", "comfyui"])
def test_the_original_layout_is_one_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    output = exported(run, tmp_path / "export", "--layout", layout)
    assert sorted(path.name for path in output.iterdir()) == ["LICENSE.md", "README.md", "export.safetensors"]
    written = load_file(output / "export.safetensors")
    expected = original_weights(FLUX, read_weights(checkpoint(run) / "transformer_ema"))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    for said in (capsys.readouterr().out, (output / "README.md").read_text()):
        place = "put it in ComfyUI/models/diffusion_models and load it with Load Diffusion Model"
        assert (place in said) == (layout == "comfyui")


def test_diffusers_loads_the_adapter(adapter_run: Path, tmp_path: Path) -> None:
    output = exported(adapter_run, tmp_path / "export")
    pipeline = FluxPipeline.from_pretrained(adapter_run.parent / "base")
    before = pictures(pipeline)
    pipeline.load_lora_weights(output)
    assert not torch.equal(pictures(pipeline), before)
    assert metadata_load(output / "README.md")["tags"] == ["leapalign", "lora"]


def test_comfyuis_adapter_has_fused_modules(
    adapter_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = exported(adapter_run, tmp_path / "export", "--layout", "comfyui")
    written = load_file(output / "export.safetensors")
    assert written["diffusion_model.double_blocks.1.img_attn.qkv.lora_A.weight"].shape == (6, 96)
    assert written["diffusion_model.single_blocks.1.linear1.lora_B.weight"].shape == (7 * 96, 8)
    for said in (capsys.readouterr().out, (output / "README.md").read_text()):
        assert "put it in ComfyUI/models/loras and load it with LoraLoaderModelOnly" in said


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


@pytest.mark.parametrize("weights", ["average", "last"])
@pytest.mark.parametrize("kind", ["run", "adapter_run"])
def test_the_card_names_the_weights_and_its_code_loads_them(
    kind: str, weights: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = request.getfixturevalue(kind)
    output = exported(run, tmp_path / "export", "--weights", weights)
    assert f"| weights | {weights}: " in (output / "README.md").read_text()
    base = FluxPipeline.from_pretrained(run.parent / "base")
    assert not torch.equal(pictures(loaded_by_card(output, run.parent / "base", monkeypatch)), pictures(base))


def test_the_cards_code_loads_the_original_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of FLUX.2: diffusers reads FLUX.1's at the real width alone."""
    save_flux2_klein(tmp_path / "base")
    model = {"path": str(tmp_path / "base"), "height": 32, "width": 48}
    config = write_config(tmp_path, model, train={"iterations": 1, "batch_size": 2})
    assert main(["train", "--config", str(config)]) == 0
    output = exported(tmp_path / "run", tmp_path / "export", "--weights", "last", "--layout", "original")
    loaded = loaded_by_card(output, tmp_path / "base", monkeypatch).transformer.state_dict()
    expected = read_weights(checkpoint(tmp_path / "run") / "transformer")
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


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


def test_adapters_have_no_original_layout(
    adapter_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", "--run", str(adapter_run), "--output", str(tmp_path / "export"), "--layout", "original"]
    assert "use --layout comfyui or diffusers" in refused(arguments, capsys)
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
def test_a_disk_that_fills_up_is_one_sentence_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in ("copy", "save_file"):
        monkeypatch.setattr(f"leapalign.export.export.{call}", full)
    line = refused(
        ["export", "--run", str(run), "--output", str(tmp_path / "new" / "export"), "--layout", layout], capsys
    )
    assert "(No space left on device); make room and check its permissions, then export again" in line
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("run", "diffusers"), ("run", "comfyui"), ("adapter_run", "diffusers"), ("adapter_run", "comfyui")],
)
def test_a_full_disk_is_told_before_anything_is_written(
    kind: str,
    layout: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, usage = request.getfixturevalue(kind), namedtuple("usage", "total used free")
    margin = 1 << 14  # the real one is as large as the small model
    monkeypatch.setattr("leapalign.export.export._TEXT_BYTES", margin)
    whole = exported(run, tmp_path / "whole" / "export", "--layout", layout)
    needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    capsys.readouterr()
    arguments = ["export", "--run", str(run), "--output", str(tmp_path / "new" / "export"), "--layout", layout]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed))
    line = refused(arguments, capsys)
    assert f"the export needs {(needed + margin) / 2**30:.2f} GiB, and" in line
    assert line.endswith("make room, then export again")
    assert not (tmp_path / "new").exists()
    # What is asked for is the real size and a margin.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, needed + 2 * margin))
    assert main(arguments) == 0
