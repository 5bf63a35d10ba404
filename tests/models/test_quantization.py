"""Frozen weights of few bits: a run beside them is one beside what they are widened to."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from chat_folders import save_flux2_klein, save_z_image
from diffusers import FluxTransformer2DModel
from leap_kernels import patch
from measured_iterations import measured
from small_runs import config_of, make_parts, train, without_time
from tiny_folders import save_qwen_image, save_stable_diffusion_3
from tolerances import unit_roundoff
from torch import Tensor, nn

from leapalign import cli
from leapalign.config import Config, MemoryConfig, ModelConfig, SamplesConfig, load_config
from leapalign.inputs.validation import UserError
from leapalign.memory.blocks import in_blocks
from leapalign.memory.placement import place_for_climbing
from leapalign.memory.quantization import BLOCK, KINDS, quantize, scales
from leapalign.models import load_model
from leapalign.models.adapter_files import FILE
from leapalign.models.velocity import prompted_velocity
from leapalign.planning.fit import change
from leapalign.planning.ledger import StorageLedger
from leapalign.planning.simulate import simulate
from leapalign.runs.checkpoint import TRANSFORMER, latest_checkpoint
from leapalign.runs.run_folder import read_metrics
from leapalign.trainer import Trainer

pytestmark = pytest.mark.bitsandbytes

RANK = "model.lora_rank=4"
BITS = {"nf4": 4 + 8 / BLOCK + 32 / (256 * BLOCK), "int8": 8 + 32 / BLOCK}
"""A weight's, its share of the scales included."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FLUX of which all matrices in blocks have rows of whole blocks of weights."""
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    sizes = {"num_attention_heads": 4, "attention_head_dim": 32, "axes_dims_rope": (16, 8, 8)}
    widths = {"in_channels": 16, "joint_attention_dim": 64, "pooled_projection_dim": 64}
    FluxTransformer2DModel(
        patch_size=1, num_layers=2, num_single_layers=2, guidance_embeds=False, **sizes, **widths
    ).save_pretrained(folder / "model" / TRANSFORMER)
    return folder


def quantized_layers(transformer: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and module.weight.dtype in (torch.uint8, torch.int8):
            yield name, module


def widened(layer: Any) -> Tensor:
    """The matrix by the formats' definitions, in float32: a code's value times the scale of its 64 weights."""
    if hasattr(layer, "scale"):
        values, scale = layer.code[layer.weight.view(torch.uint8).flatten().long()], layer.scale
    else:
        state = layer.weight.quant_state
        first, second = layer.weight.flatten() >> 4, layer.weight.flatten() & 15
        values = state.code[torch.stack([first, second], dim=1).flatten().long()]
        outer = state.state2.absmax.repeat_interleave(256)[: len(state.absmax)]
        scale = state.state2.code[state.absmax.long()] * outer + state.offset
    return (values * scale.repeat_interleave(BLOCK)).view(layer.out_features, layer.in_features)


def widen(transformer: nn.Module) -> None:
    """Puts plain layers of the same weights in the place of quantized ones."""
    for name, layer in list(quantized_layers(transformer)):
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        plain.weight, plain.bias = nn.Parameter(widened(layer), requires_grad=False), layer.bias
        parent, _, own = name.rpartition(".")
        setattr(transformer.get_submodule(parent), own, plain)


def first_gradient(config: Config, prepare: Callable[[nn.Module], object]) -> Tensor:
    """Of an iteration of adapters that change something, on the model that is prepared so."""
    trainer = Trainer.from_config(config)
    prepare(trainer.model.transformer)
    torch.manual_seed(1)
    trained = [p for p in trainer.model.transformer.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = 0.1 * torch.randn(parameter.shape)
    trainer.accumulate_gradients()
    return torch.cat([p.grad.flatten() for p in trained if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_nearest_and_take_as_many_bits_as_told(parts: Path, kind: str) -> None:
    """Matrices outside of blocks, biases and norms are the model's own."""
    path = str(parts / "model")
    source = load_model(ModelConfig(path=path)).transformer
    found = load_model(ModelConfig(path=path, lora_rank=4, quantization=kind)).transformer
    layers = {name.replace(".base_layer", ""): layer for name, layer in quantized_layers(found)}
    in_blocks = [n for n, m in source.named_modules() if isinstance(m, nn.Linear) and "transformer_blocks." in n]
    assert sorted(layers) == sorted(in_blocks)
    for name, layer in layers.items():
        code = layer.code if kind == "int8" else layer.weight.quant_state.code
        half = code.diff().max() / 2 + 2**-15  # on a CPU a byte is looked up by one of 65536 even steps
        exact, near = source.get_submodule(name).weight.view(-1, BLOCK), widened(layer).view(-1, BLOCK)
        largest, scale = (values.abs().amax(dim=1) for values in (exact, near))  # which nf4 rounds, too
        assert (near - exact).abs().amax(dim=1).le(half * largest + (scale - largest).abs()).all()
        assert torch.equal(layer.bias, source.get_submodule(name).bias)
    assert torch.equal(found.proj_out.weight, source.proj_out.weight)
    # Without tables of 16 and 256 numbers a layer, which are many in so small a model.
    tables = 4 * len(layers) * {"nf4": 16 + 256 + 1, "int8": 0}[kind]
    held = [*(layer.weight for layer in layers.values()), *scales(found)]
    held += [layer.scale for layer in layers.values() if kind == "int8"]
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    assert 8 * (sum(one.nbytes for one in held) - tables) / weights == pytest.approx(BITS[kind], rel=0.01)


@pytest.mark.parametrize(("kind", "error"), [("nf4", 0.092), ("int8", 0.006)])
def test_normal_weights_are_as_near_as_told(kind: str, error: float) -> None:
    """In docs/methods.md: by the root mean square."""
    layer = nn.Linear(1024, 256, bias=False)
    nn.init.normal_(layer.weight)
    near = widened(KINDS[kind](layer, torch.device("cpu")))
    assert float((near - layer.weight).norm() / layer.weight.norm()) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_beside_the_widened_weights(
    parts: Path, tmp_path: Path, kind: str, checkpointing: str
) -> None:
    """Of the rollout, the reward and the staged backward pass, in float32."""
    config = config_of(parts, tmp_path, RANK, f"model.quantization={kind}", f"memory.checkpointing={checkpointing}")
    ours, reference = first_gradient(config, lambda model: None), first_gradient(config, widen)
    plain = first_gradient(config_of(parts, tmp_path, RANK), lambda model: None)
    # Sums of at most 1152 products, by the same library in another order, one after the other through some 50 layers.
    bound = 50 * 1152**0.5 * unit_roundoff(torch.float32)
    assert (ours - reference).norm() < bound * reference.norm()
    assert (plain - reference).norm() > bound * reference.norm(), "weights that are rounded must show"


@pytest.mark.parametrize("save", [save_flux2_klein, save_qwen_image, save_stable_diffusion_3, save_z_image])
def test_every_family_runs_beside_them(save: Callable[[Path], None], tmp_path: Path) -> None:
    """Of so small models some matrices have rows of whole blocks."""
    save(tmp_path)
    settings = ModelConfig(path=str(tmp_path), lora_rank=2)
    velocities, reached = [], []
    for kind in (None, *KINDS):
        model = load_model(dataclasses.replace(settings, quantization=kind))
        assert (kind is None) != any(quantized_layers(model.transformer))
        velocity = prompted_velocity(model, model.blank_embeddings(1, 8))(model.draw_noise([0]), torch.tensor([0.5]))
        velocity.sum().backward()
        reached.append([name for name, p in model.transformer.named_parameters() if p.grad is not None])
        velocities.append(velocity.detach())
    assert reached[0] == reached[1] == reached[2] != []
    exact, four, eight = velocities
    assert 0 < (eight - exact).norm() < (four - exact).norm() < 0.2 * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_where_blocks_are_patched(parts: Path, tmp_path: Path, kind: str) -> None:
    """Blocks are recomputed, and go on to call the layers that were put in their place."""
    asked = (RANK, f"model.quantization={kind}", "memory.checkpointing=blocks")
    layers, called = set(), set()

    def noted(model: nn.Module) -> None:
        assert set(patch(model).left.values()) == {"it is patched already"}
        for name, layer in quantized_layers(model):
            layers.add(name)
            layer.register_forward_hook(lambda *_, name=name: called.add(name))

    plain = first_gradient(config_of(parts, tmp_path, *asked), lambda model: None)
    patched = first_gradient(config_of(parts, tmp_path, *asked, "kernels.patch=true"), noted)
    assert layers == called != set()
    assert 0 < (patched - plain).norm() < 1e-4 * plain.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_continues_to_the_bit_and_holds_adapters_alone(parts: Path, tmp_path: Path, kind: str) -> None:
    asked = (RANK, f"model.quantization={kind}", "model.dtype=bfloat16", "optimizer.name=adamw_8bit")
    whole = train(config_of(parts, tmp_path / "whole", *asked))
    train(config_of(parts, tmp_path / "cut", *asked, "train.iterations=2"))
    resumed = train(config_of(parts, tmp_path / "cut", *asked), resume=True)
    trained = [[p for p in one.model.transformer.parameters() if p.requires_grad] for one in (whole, resumed)]
    assert all(torch.equal(first, second) for first, second in zip(*trained, strict=True))
    first, second = (without_time(read_metrics(tmp_path / name)) for name in ("whole", "cut"))
    assert first == second
    checkpoint = latest_checkpoint(tmp_path / "cut")
    assert checkpoint is not None
    assert [file.name for file in (checkpoint / TRANSFORMER).iterdir()] == [FILE]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_given_up_for_a_climb(parts: Path, kind: str) -> None:
    model = load_model(ModelConfig(path=str(parts / "model"), lora_rank=4, quantization=kind))
    place_for_climbing(model, (), MemoryConfig(), torch.device("cpu"))
    assert {p.device.type for p in model.transformer.parameters()} == {"meta"}


def test_a_run_is_evaluated_and_exported_and_keeps_its_weights(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(config_of(parts, run, RANK, "model.quantization=nf4", "train.iterations=2"))
    assert cli.main(["evaluate", "--run", str(run)]) == 0
    assert cli.main(["export", "--run", str(run), "--output", str(tmp_path / "adapter")]) == 0
    assert (tmp_path / "adapter" / FILE).exists()
    assert load_config(run / "config.yaml").model.quantization == "nf4"
    capsys.readouterr()
    assert cli.main(["train", "--resume", str(run), "model.quantization=null"]) == 2
    assert 'model.quantization from "nf4" to null: adapters were trained beside' in capsys.readouterr().err


@pytest.mark.slow
def test_simulated_peaks_are_the_real_ones(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the library, which keeps tables for the whole process, is left as it was."""
    monkeypatch.setattr(bitsandbytes.functional, "name2qmap", {})
    asked = (RANK, "memory.checkpointing=blocks", "samples.every=0", "train.batch_size=8")
    config = config_of(parts, tmp_path, *asked, "model.quantization=nf4")
    found, plain = simulate(config), simulate(config_of(parts, tmp_path, *asked))
    real = measured(dataclasses.replace(config, samples=SamplesConfig(count=1)))
    for name, peak in found.device.items():
        assert peak.total == pytest.approx(real.device.peaks[name].total, rel=0.005)
    assert found.flops == plain.flops
    # Of 32 bits a weight before; adapters and what lies outside of blocks are as large as they were.
    roles = [one.device["optimizer"].by_role["weights"] for one in (found, plain)]
    assert roles[0] < 0.25 * roles[1]


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_ledger_sees_the_widened_matrix(kind: str, gradient: bool) -> None:
    """Of 256 KiB beside a product of 2 KiB, and again, alone, in the backward pass."""
    layer = KINDS[kind](nn.Linear(256, 256, bias=False), torch.device("cpu"))
    x = torch.randn(2, 256, requires_grad=gradient)
    with StorageLedger() as ledger:
        ledger.exclude(x, layer.weight)
        y = layer(x)
        assert 4 * 256 * 256 <= ledger.peak < 1.1 * 4 * 256 * 256
        assert ledger.live == y.nbytes
        if gradient:
            y.sum().backward()
            assert 4 * 256 * 256 <= ledger.peak < 1.1 * 4 * 256 * 256


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        ((), "quantization rounds weights that stay frozen; train adapters"),
        ((RANK, "memory.weights=streamed", "memory.checkpointing=blocks"), "quantized weights are not streamed"),
        ((RANK, "model.quantization=nf3"), "model.quantization"),
    ],
)
def test_what_it_does_not_go_with_is_refused(
    parts: Path, tmp_path: Path, assignments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config_of(parts, tmp_path, "model.quantization=nf4", *assignments)


@pytest.mark.parametrize(
    ("assignments", "advice"), [((), "set model.quantization to nf4"), (("model.quantization=nf4",), "reduce rollout")]
)
def test_where_adapters_do_not_fit_what_they_can_change_is_named(
    parts: Path, tmp_path: Path, assignments: tuple[str, ...], advice: str
) -> None:
    config = config_of(parts, tmp_path, RANK, "memory.checkpointing=blocks", *assignments)
    assert change("rollout", {"weights": 1}, config).startswith(advice)


def test_without_bitsandbytes_nothing_begins(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    with pytest.raises(UserError, match=r"nf4 needs bitsandbytes for cpu, .* install it with pip install bitsandbytes"):
        Trainer.from_config(config_of(parts, tmp_path, RANK, "model.quantization=nf4"))


def test_rows_of_other_widths_stay_as_they_are_and_a_model_of_nothing_else_is_refused() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(BLOCK + 32, BLOCK), nn.Linear(BLOCK, BLOCK)])
    model.head = nn.Linear(BLOCK, BLOCK)
    quantize(model, "nf4", torch.device("cpu"), partial(in_blocks, model), "model.quantization")
    assert [name for name, _ in quantized_layers(model)] == ["blocks.1"]
    model.blocks = model.blocks[:1]
    with pytest.raises(UserError, match="has a matrix whose rows are multiples of 64 weights"):
        quantize(model, "nf4", torch.device("cpu"), partial(in_blocks, model), "model.quantization")
