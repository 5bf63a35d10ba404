"""Text encoders of eight bits: prompts are encoded as by the weights that these stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes.functional import quantize_blockwise
from chat_folders import save_flux2_dev, save_flux2_klein, save_z_image
from prompt_caches import CPU, prompts_of, write
from tiny_folders import save_flux, save_qwen_image, save_stable_diffusion_3
from torch import Tensor, nn

from leapalign.cli import main
from leapalign.config import Config, ModelConfig, PromptsConfig
from leapalign.memory.quantization import BLOCK
from leapalign.models import encoded, text_encoders
from leapalign.prompts.embeddings import embeddings_to_sample
from leapalign.prompts.filling import fill_cache

pytestmark = pytest.mark.bitsandbytes

FAMILIES = [
    save_flux,
    save_stable_diffusion_3,
    save_flux2_dev,
    save_flux2_klein,
    save_qwen_image,
    save_z_image,
]
PROMPTS = ["a cat", "two blue squares and a dog"]


def encoder_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("text_encoder*"))


def rewrite(folder: Path, change: Callable[[nn.Module], None] | None = None) -> None:
    """Saves the text encoder in ``folder`` with its weights changed; drawn anew, with rows of 64 weights, if not."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, json.loads((folder / "config.json").read_bytes())["architectures"][0])
    if change is None:
        part = getattr(config, "text_config", config)
        setattr(part, "d_ff" if hasattr(part, "d_ff") else "intermediate_size", BLOCK)
        torch.manual_seed(0)
        network = kind(config)
    else:
        network = kind.from_pretrained(folder)
        change(network)
    network.save_pretrained(folder)


@torch.no_grad()
def round_weights(network: nn.Module) -> None:
    """The definition: byte b of a block of 64 stands for its largest magnitude times (b - 127) / 127."""
    rounded = 0
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and layer.in_features % BLOCK == 0 and ".".join(name.split(".")[:-1]):
            steps = torch.linspace(-1, 1, 255)
            code = torch.cat([steps[:127], torch.zeros(1), steps[127:]])
            found, state = quantize_blockwise(layer.weight, code=code, blocksize=BLOCK)
            blocks = code[found.long()].view(-1, BLOCK) * layer.weight.view(-1, BLOCK).abs().amax(1, keepdim=True)
            torch.testing.assert_close(state.absmax, layer.weight.view(-1, BLOCK).abs().amax(1))
            assert (blocks - layer.weight.view(-1, BLOCK)).abs().max() > 0
            layer.weight.copy_(blocks.view_as(layer.weight))
            rounded += 1
    assert rounded


def embeddings(folder: Path, quantization: str | None = None) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for encode in text_encoders(ModelConfig(path=str(folder)), CPU, quantization):
        (batch,) = encoded(encode, PROMPTS)
        found |= batch.parts
    return found


@pytest.mark.parametrize("save", FAMILIES, ids=lambda save: save.__name__.removeprefix("save_"))
def test_prompts_are_encoded_as_by_the_rounded_weights(tmp_path: Path, save: Callable[[Path], None]) -> None:
    save(tmp_path)
    for folder in encoder_folders(tmp_path):
        rewrite(folder)
    whole, quantized = embeddings(tmp_path), embeddings(tmp_path, "int8")
    for folder in encoder_folders(tmp_path):
        rewrite(folder, round_weights)
    rounded = embeddings(tmp_path)
    assert quantized.keys() == rounded.keys()
    for name, part in rounded.items():
        assert torch.equal(quantized[name], part)
        assert not part.is_floating_point() or not torch.equal(part, whole[name])


def test_a_cache_is_of_one_number_of_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_flux(tmp_path / "model")
    for folder in encoder_folders(tmp_path / "model"):
        rewrite(folder)
    write(tmp_path / "prompts.txt", prompts_of(3))
    command = ["cache", "--config", "tiny", f"model.path={tmp_path / 'model'}"]
    command += ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "cache")]
    assert main([*command, "--quantization", "int8"]) == 0
    assert json.loads((tmp_path / "cache" / "manifest.json").read_bytes())["quantization"] == "int8"
    assert main([*command, "--quantization", "int8"]) == 0
    assert "3 reused" in capsys.readouterr().out
    assert main(command) == 2
    assert "is of text encoders with int8, not no quantization; use another folder" in capsys.readouterr().err


def test_encoders_without_a_matrix_to_round_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_qwen_image(tmp_path / "model")
    command = ["cache", "--config", "tiny", f"model.path={tmp_path / 'model'}", "--output", str(tmp_path / "cache")]
    assert main([*command, "--quantization", "int8"]) == 2
    assert "do without --quantization" in capsys.readouterr().err
    assert main(command) == 0, "what was refused holds no folder"


def test_prompts_that_a_cache_lacks_are_encoded_alike(tmp_path: Path) -> None:
    save_flux(tmp_path / "model")
    for folder in encoder_folders(tmp_path / "model"):
        rewrite(folder)
    model = ModelConfig(path=str(tmp_path / "model"))
    cache = tmp_path / "cache"
    fill_cache(cache, model, write(tmp_path / "prompts.txt", PROMPTS), CPU, "int8")
    config = Config(model=model, prompts=PromptsConfig(cache=str(cache)))
    found = embeddings_to_sample(config, [*PROMPTS, "another"])
    rounded = embeddings(tmp_path / "model", "int8")
    for name, part in rounded.items():
        torch.testing.assert_close(found[:2].parts[name], part)
        assert not torch.equal(part, embeddings(tmp_path / "model")[name])
