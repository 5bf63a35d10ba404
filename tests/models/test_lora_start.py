"""Adapters with a scale, and from a file: what they begin as, what is saved, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused
from diffusers import FluxPipeline
from hub_cache import offline, put_in_cache
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_runs import PROMPTS, config_of, train
from torch import Tensor

from leapalign.cli import main
from leapalign.config import Config, ModelConfig
from leapalign.inputs.validation import UserError
from leapalign.models import encode_prompts, load_model
from leapalign.models.adapter_files import FILE, PEFT_CONFIG, PEFT_FILE, read_adapter
from leapalign.planning.simulate import simulate
from leapalign.runs.checkpoint import TRANSFORMER, latest_checkpoint
from leapalign.trainer import Trainer

RANK, ALPHA = "model.lora_rank=4", "model.lora_alpha=6"


def adapter_of(config: Config) -> Path:
    checkpoint = latest_checkpoint(Path(config.output))
    assert checkpoint is not None
    return checkpoint / TRANSFORMER


@pytest.fixture(scope="module")
def trained(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with adapters of rank 4 and alpha 6."""
    config = config_of(parts, tmp_path_factory.mktemp("lora") / "run", RANK, ALPHA, "ema.decay=0.0")
    train(config)
    return config


def velocities(config: ModelConfig, weights: Path | None = None) -> Tensor:
    latents = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))
    embeddings = encode_prompts(ModelConfig(path=config.path), PROMPTS[:2])
    model = load_model(config)
    if weights is not None:
        pipeline = FluxPipeline.from_pretrained(config.path)
        pipeline.load_lora_weights(weights)
        model.transformer = pipeline.transformer
    with torch.no_grad():
        return model.velocity(latents, torch.full((2,), 0.5), embeddings)


def peft_layout(adapter: Path, folder: Path, **settings: Any) -> Path:
    """The adapter as PEFT itself saves one."""
    folder.mkdir()
    tensors = load_file(adapter / FILE)
    save_file({n.replace("transformer.", "base_model.model."): t for n, t in tensors.items()}, folder / PEFT_FILE)
    (folder / PEFT_CONFIG).write_text(json.dumps({"r": 4, "lora_alpha": 6, "rank_pattern": {}, **settings}))
    return folder


def test_alpha_scales_what_adapters_add(parts: Path, trained: Config) -> None:
    """The pipeline draws what we do, by the file's header; the same matrices at rank's alpha are another model."""
    adapter = adapter_of(trained)
    start = ModelConfig(path=trained.model.path, lora_path=str(adapter))
    ours = velocities(start)
    assert torch.equal(ours, velocities(ModelConfig(path=trained.model.path), adapter))
    with safe_open(adapter / FILE, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 6
    assert read_adapter(adapter).alpha == 6
    plain = adapter.parent / "plain"
    plain.mkdir()
    save_file(load_file(adapter / FILE), plain / FILE)
    assert read_adapter(plain).alpha == 4, "without a header alpha is the rank, as diffusers has it"
    assert not torch.allclose(ours, velocities(ModelConfig(path=trained.model.path, lora_path=str(plain))), atol=1e-6)
    shutil.rmtree(plain)


def test_without_alpha_the_scale_is_one(parts: Path) -> None:
    one, other = (
        load_model(ModelConfig(path=str(parts / "model"), lora_rank=4, **more)).transformer
        for more in ({}, {"lora_alpha": 4.0})
    )
    for model in (one, other):
        assert {m.scaling["default"] for m in model.modules() if hasattr(m, "scaling")} == {1.0}


@pytest.mark.slow
def test_a_run_starts_where_another_ended(parts: Path, trained: Config, tmp_path: Path) -> None:
    """Rank, alpha and layers are the file's, in either layout; simulated without it being trained."""
    adapter = adapter_of(trained)
    layouts = (adapter, peft_layout(adapter, tmp_path / "peft"))
    before = {n: p for n, p in Trainer.from_config(trained).model.transformer.named_parameters() if p.requires_grad}
    for number, folder in enumerate(layouts):
        asked = (f"model.lora_path={folder}", "train.iterations=1")
        config = config_of(parts, tmp_path / f"run-{number}", *asked)
        trainer = Trainer.from_config(config)
        found = {n: p for n, p in trainer.model.transformer.named_parameters() if p.requires_grad}
        assert found.keys() == before.keys()
        saved = load_file(adapter / FILE)
        for name, value in found.items():
            assert torch.equal(value, saved[f"transformer.{name.replace('.default', '')}"])
        train(config)
        assert (read_adapter(adapter_of(config)).rank, read_adapter(adapter_of(config)).alpha) == (4, 6)
    assert simulate(config).trainable_parameters == sum(p.numel() for p in before.values())
    assert main(["export", "--run", config.output, "--output", str(tmp_path / "export")]) == 0
    assert "Adapters of rank 4 and alpha 6 beside" in (tmp_path / "export" / "README.md").read_text()


def test_a_resumed_run_goes_on_from_its_checkpoint(parts: Path, trained: Config, tmp_path: Path) -> None:
    path = f"model.lora_path={adapter_of(trained)}"
    whole = train(config_of(parts, tmp_path / "whole", path))
    train(config_of(parts, tmp_path / "cut", path, "train.iterations=2"))
    resumed = train(config_of(parts, tmp_path / "cut", path), resume=True)
    pairs = zip(whole.model.transformer.parameters(), resumed.model.transformer.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_a_hub_id_is_read_from_the_cache(parts: Path, trained: Config, tmp_path: Path) -> None:
    peft_layout(adapter_of(trained), tmp_path / "peft")
    put_in_cache(tmp_path / "peft", tmp_path / "cache", "somebody/adapter")
    direct, cached = (
        ModelConfig(path=trained.model.path, lora_path=p) for p in (str(tmp_path / "peft"), "somebody/adapter")
    )
    with offline(tmp_path / "cache"):
        assert torch.equal(velocities(direct), velocities(cached))
        with pytest.raises(UserError, match=r"somebody/other.*the hub could not be reached.*model\.lora_path"):
            load_model(ModelConfig(path=trained.model.path, lora_path="somebody/other"))


def test_another_alpha_is_no_change_of_a_run(trained: Config, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(["train", "--resume", trained.output, "train.iterations=9", "model.lora_alpha=8"], capsys)
    assert "cannot change model.lora_alpha from 6.0 to 8" in error
    error = refused(["train", "--resume", trained.output, "train.iterations=9", "model.lora_targets=[to_v]"], capsys)
    assert "cannot change model.lora_targets from" in error
    assert main(["evaluate", "--run", trained.output, "model.lora_alpha=8"]) == 2
    assert "its adapter has alpha 6, the model 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (("model.lora_rank=8",), r"lora_rank is 8, and the adapter in .* has 4; leave model.lora_rank out"),
        (("model.lora_alpha=3",), r"lora_alpha is 3, and the adapter in .* has 6; leave model.lora_alpha out"),
        (("model.lora_targets=[to_q]",), r"lora_targets and the adapter in .* disagree about .*; leave"),
        (("memory.optimizer=host", "optimizer.name=adamw_8bit"), "adapters are small enough"),
    ],
)
def test_what_disagrees_is_one_sentence(
    parts: Path, trained: Config, tmp_path: Path, assignments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Trainer.from_config(config_of(parts, tmp_path, f"model.lora_path={adapter_of(trained)}", *assignments))
    agreeing = (RANK, ALPHA, f"model.lora_path={adapter_of(trained)}")
    Trainer.from_config(config_of(parts, tmp_path, *agreeing))


def broken(folder: Path, change: str, adapter: Path) -> None:
    tensors = load_file(adapter / FILE)
    name = next(iter(tensors))
    if change == "empty":
        return
    if change == "damaged":
        (folder / FILE).write_bytes(b"x" * 100)
        return
    if change == "dora":
        shutil.rmtree(folder)
        peft_layout(adapter, folder, use_dora=True)
        return
    tensors = {
        "kohya": {"lora_unet_x.lora_down.weight": tensors[name]},
        "half": {name: tensors[name]},
        "layer": {n.replace("attn.to_q", "attn.to_z"): t for n, t in tensors.items()},
        "ranks": {**tensors, **{n: t[:2] for n, t in tensors.items() if n.endswith("0.attn.to_q.lora_A.weight")}},
        "width": {n: t[:, :5].contiguous() if n.endswith("lora_A.weight") else t for n, t in tensors.items()},
        "nan": {n: t * torch.nan for n, t in tensors.items()},
    }[change]
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / FILE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("empty", "holds neither pytorch_lora_weights.safetensors nor adapter_model.safetensors"),
        ("damaged", "cannot read the adapter in .*check model.lora_path"),
        ("dora", "has use_dora; only adapters of one rank and alpha"),
        ("kohya", "'lora_unet_x.lora_down.weight' is none of its names"),
        ("half", "matrices are missing"),
        ("layer", "it adapts .*to_z, and the model has no such linear layer"),
        ("ranks", "has several ranks; only adapters of one rank"),
        ("width", "and the model has one of 96 inputs and"),
        ("nan", "holds NaN"),
    ],
)
def test_files_that_do_not_fit_are_one_sentence(
    parts: Path, trained: Config, tmp_path: Path, change: str, message: str
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    broken(folder, change, adapter_of(trained))
    with pytest.raises(UserError, match=message):
        load_model(ModelConfig(path=trained.model.path, lora_path=str(folder)))


def test_a_file_in_the_place_of_its_folder_is_told_at_once(trained: Config, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"")
    with pytest.raises(UserError, match=r"is a file; set model.lora_path to the folder"):
        load_model(ModelConfig(path=trained.model.path, lora_path=str(tmp_path / FILE)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ALPHA, "model.lora_alpha scales adapters; set model.lora_rank, too"),
        ("model.lora_targets=[to_q]", "model.lora_targets are layers with adapters; set model.lora_rank, too"),
    ],
)
def test_what_is_said_of_adapters_without_any_is_refused(parts: Path, given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(parts, parts / "none", given)
