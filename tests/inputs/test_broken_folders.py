"""Models and rewards that are missing, half there, of another kind or not finite: one sentence, and nothing written."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leapalign.cli import main
from leapalign.inputs.networks import require_finite
from leapalign.inputs.validation import UserError
from leapalign.models.folder import read_index
from leapalign.storage.embedded import FOLDER

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
BIAS, BLOCKS = "context_embedder.bias", "transformer_blocks.1."
Break = Callable[[Path], Any]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER / "base", tmp_path / "model"))


@pytest.fixture
def reward(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FOLDER / "reward", tmp_path / "reward"))


def removed(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Break:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:3000])


def written(name: str, text: str) -> Break:
    return lambda folder: (folder / name).write_text(text)


def with_json(name: str, **values: Any) -> Break:
    def change(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return change


def with_tensors(name: str, change: Callable[[dict[str, Tensor]], Any]) -> Break:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return apply


def filled(key: str, value: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[key].view(-1)[-1:].fill_(value)


def sharded(part: str, name: str) -> Break:
    """The first of two shards, as an interrupted download leaves it."""

    def apply(folder: Path) -> None:
        file = folder / part / f"{name}.safetensors"
        shards = [f"{name}-0000{number}-of-00002.safetensors" for number in (1, 2)]
        places = {key: shards[number % 2] for number, key in enumerate(load_file(file))}
        file.rename(file.with_name(shards[0]))
        file.with_name(f"{shards[1]}.incomplete").touch()
        (folder / part / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

    return apply


MODELS: dict[str, tuple[Break, str]] = {
    "no index": (removed("model_index.json"), "no model in diffusers layout"),
    "index is no JSON": (written("model_index.json", "{"), "no model in diffusers layout"),
    "index is a list": (written("model_index.json", "[]"), "which is not supported"),
    "no weights": (removed(TRANSFORMER), "cannot load the transformer"),
    "weights cut off": (cut(TRANSFORMER), "transformer' are damaged"),
    "a shard is missing": (sharded("transformer", "diffusion_pytorch_model"), "00002-of-00002.safetensors' is missing"),
    "a weight is missing": (with_tensors(TRANSFORMER, lambda t: t.pop(BIAS)), f"(missing: {BIAS})"),
    "a weight of another shape": (with_tensors(TRANSFORMER, lambda t: t.update({BIAS: torch.ones(7)})), BIAS),
    "a weight is NaN": (with_tensors(TRANSFORMER, filled(BIAS, float("nan"))), f"{BIAS} in the transformer"),
    "a weight is infinite": (with_tensors(TRANSFORMER, filled(BIAS, float("inf"))), f"{BIAS} in the transformer"),
    "config is no JSON": (written("transformer/config.json", "{"), "not a valid JSON file"),
    "config is a list": (written("transformer/config.json", "[1]"), "cannot load the transformer"),
    "config of wrong types": (with_json("transformer/config.json", num_layers="x"), "cannot load the transformer"),
    "config of fewer blocks": (with_json("transformer/config.json", num_layers=1), f"unexpected: {BLOCKS}"),
    "config of another class": (
        with_json("transformer/config.json", _class_name="SD3Transformer2DModel"),
        "is a SD3Transformer2DModel, and FluxTransformer2DModel is needed",
    ),
    "another scheduler": (
        with_json("scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
        "is a DDIMScheduler",
    ),
    "text encoder cut off": (cut("text_encoder_2/model.safetensors"), "text_encoder_2' are damaged"),
    "a text encoder's shard is missing": (sharded("text_encoder_2", "model"), "00002-of-00002.safetensors' is missing"),
    "a text encoder of more blocks": (
        with_json("text_encoder_2/config.json", num_layers=3),
        "missing: encoder.block.2.",
    ),
    "a text encoder is NaN": (
        with_tensors("text_encoder_2/model.safetensors", filled("shared.weight", float("nan"))),
        "shared.weight in the text_encoder_2",
    ),
    "tokenizer is no JSON": (written("tokenizer/tokenizer.json", "{"), "cannot load the tokenizer of"),
    "a text encoder of no class": (with_json("model_index.json", text_encoder_2="T5"), "has no text_encoder_2"),
    "a later tokenizer has no files": (removed("tokenizer_2/tokenizer.json"), "cannot load the tokenizer_2 of"),
    "a text encoder without weights": (removed("text_encoder_2/model.safetensors"), "holds no safetensors"),
}
REWARDS: dict[str, tuple[Break, str]] = {
    "no weights": (removed("model.safetensors"), "cannot load the reward"),
    "weights cut off": (cut("model.safetensors"), "reward' are damaged"),
    "a weight is missing": (
        with_tensors("model.safetensors", lambda t: t.pop("visual_projection.weight")),
        "(missing: visual_projection.weight)",
    ),
    "a weight is NaN": (
        with_tensors("model.safetensors", filled("visual_projection.weight", float("nan"))),
        "visual_projection.weight in the reward",
    ),
    "of other sizes": (with_json("config.json", projection_dim=7), "of another shape: text_projection.weight"),
    "config is a list": (written("config.json", "[]"), "check reward.path"),
    "image processor is a list": (written("preprocessor_config.json", "[]"), "check reward.path"),
    "tokenizer is odd": (written("tokenizer.json", "{}"), "check reward.path"),
}


def refusal(arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with 2 and writes nothing."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert not output.exists()
    (line,) = captured.err.splitlines()
    assert line.startswith("leapalign: ")
    return line


@pytest.mark.parametrize("fault", MODELS)
def test_a_broken_model_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    breaking, message = MODELS[fault]
    breaking(model)
    output = tmp_path / "run"
    assert message in refusal(["train", "--config", TINY, f"model.path={model}", f"output={output}"], output, capsys)


@pytest.mark.parametrize("fault", REWARDS)
def test_a_broken_reward_is_one_sentence(
    reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    breaking, message = REWARDS[fault]
    breaking(reward)
    output = tmp_path / "run"
    assert message in refusal(["train", "--config", TINY, f"reward.path={reward}", f"output={output}"], output, capsys)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("generate", "a weight is NaN"),
        ("generate", "text encoder cut off"),
        ("evaluate", "a weight is missing"),
        ("cache", "text encoder cut off"),
        ("memory", "config of wrong types"),
        ("memory", "config of another class"),
        ("memory", "config is a list"),
    ],
)
def test_every_command_says_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, fault: str
) -> None:
    breaking, message = MODELS[fault]
    breaking(model)
    output = tmp_path / "output"
    folder = {"generate": ["--output", str(output)], "cache": ["--output", str(output)]}.get(command, [])
    prompts = [] if command == "memory" else ["--prompts", str(FOLDER / "training_prompts.txt")]
    line = refusal([command, "--config", TINY, *folder, *prompts, f"model.path={model}"], output, capsys)
    assert command == "memory" or message in line


def test_memory_says_what_is_wrong_with_a_reward(reward: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (reward / "config.json").write_text("[]")
    line = refusal(["memory", "--config", TINY, f"reward.path={reward}"], reward / "none", capsys)
    assert "cannot read the config.json" in line


@pytest.mark.parametrize("named", [["evil", "Encoder"], ["os", "system"], ["transformers", "AutoModel"]])
def test_code_in_a_model_folder_never_runs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], named: list[str]
) -> None:
    code = f"open({str(tmp_path / 'pwned')!r}, 'w')\nclass Encoder: pass\n"
    for folder in (model, model / "text_encoder"):
        (folder / "evil.py").write_text(code)
    with_json("model_index.json", text_encoder=named)(model)
    output = tmp_path / "run"
    line = refusal(["train", "--config", TINY, f"model.path={model}", f"output={output}"], output, capsys)
    assert "code of a model folder is never run" in line
    assert not (tmp_path / "pwned").exists()


def test_parts_lie_in_their_folder(model: Path) -> None:
    with_json("model_index.json", **{"../secret": ["diffusers", "AutoencoderKL"], "..": ["a", "b"], "vae": 3})(model)
    assert {"../secret", "..", "vae"}.isdisjoint(read_index(str(model)))


def test_pickled_weights_are_not_read(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = model / TRANSFORMER
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    output = tmp_path / "run"
    line = refusal(["train", "--config", TINY, f"model.path={model}", f"output={output}"], output, capsys)
    assert "no file named diffusion_pytorch_model.safetensors" in line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    network = nn.Sequential(nn.Linear(30, 50), nn.Linear(50, 70)).to(dtype)
    require_finite(network.named_parameters(), "it")
    require_finite([("empty", torch.empty(0)), ("counts", torch.arange(3))], "it")
    for value in (float("nan"), float("inf"), -float("inf")):
        with torch.no_grad():
            network[1].weight[-1, -1] = value
        with pytest.raises(UserError, match=r"1\.weight in it holds NaN or infinite numbers"):
            require_finite(network.named_parameters(), "it")


def test_looking_at_every_weight_takes_no_time() -> None:
    """In bfloat16, where PyTorch's isfinite would take 4 seconds a GB."""
    weights = torch.zeros(50_000_000, dtype=torch.bfloat16)
    started = time.process_time()
    require_finite([("weights", weights)], "it")
    assert time.process_time() - started < 0.2
