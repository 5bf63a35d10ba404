"""A part of a weight moves as it would within the whole, to the bit: moments, random bits and average."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel
from process_groups import group
from safetensors.torch import load_file, save_file
from small_models import small_flux
from tiers import some_slow
from torch import Tensor
from torch.distributed.tensor import DTensor

from leapalign.config import EmaConfig, OptimizerConfig
from leapalign.inputs.validation import UserError
from leapalign.memory.blocks import blocks_of
from leapalign.models.weights import load_weights, save_weights
from leapalign.optimizers.optimizer import Optimizer
from leapalign.parallel.processes import joined, rank
from leapalign.parallel.sharding import BLOCK, Part, divides, part_of, positions, shard

pytestmark = pytest.mark.posix
STEPS = 3
KINDS = {"adamw": torch.float32, "adamw_8bit": torch.bfloat16}


def network(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return small_flux(attention_head_dim=64, axes_dims_rope=(16, 24, 24)).to(dtype)


def optimizer_of(model: Any, name: str) -> Optimizer:
    ema = EmaConfig(dtype="bfloat16", decay=0.9)
    return Optimizer(list(model.parameters()), OptimizerConfig(name=name, learning_rate=1e-3), ema, STEPS, seed=3)


def set_gradients(model: Any, step: int) -> None:
    """The same numbers whoever has them; what all hold is added up over processes."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 1e-3
        if isinstance(parameter, DTensor):
            own = part_of(gradient)
            parameter.grad = DTensor.from_local(own, parameter.device_mesh, parameter.placements, run_check=False)
        else:
            parameter.grad = gradient * (rank() == 0)


def state_of(optimizer: Optimizer) -> dict[str, Tensor]:
    """All that a checkpoint holds."""
    lists = {"weight": optimizer.weights(), "average": optimizer.averages()}
    named = {f"{name}.{number}": value for name, values in lists.items() for number, value in enumerate(values)}
    return {**named, **optimizer.tensors()}


def stepped(model: Any, optimizer: Optimizer) -> list[dict[str, float]]:
    found = []
    for step in range(STEPS):
        set_gradients(model, step)
        found.append(optimizer.step())
    return found


def among_two(name: str, start: Path, end: Path, variables: dict[str, str]) -> None:
    """Steps by one of two processes, from the weights in ``start``; the first writes ``end``. For `started`."""
    os.environ.update(variables)
    torch.set_num_threads(1)
    with joined():
        model = network(KINDS[name])
        shard(model, blocks_of(model), torch.device("cpu"), whole_after=False)
        load_weights(model, start)
        optimizer = optimizer_of(model, name)
        divided = [isinstance(own, Part) for own in optimizer._parameters]
        assert any(divided)
        assert not all(divided)
        metrics = stepped(model, optimizer)
        state = state_of(optimizer)
        # What is saved can be taken up.
        again = optimizer_of(model, name)
        averages = [state.pop(key) for key in [key for key in state if key.startswith("average.")]]
        whole: list[Any] = [(state, averages)]
        dist.broadcast_object_list(whole)
        moments = {key: value for key, value in whole[0][0].items() if not key.startswith("weight.")}
        again.load(moments, optimizer.scalars(), whole[0][1])
        saved = state_of(again)
        if rank() == 0:
            rows = torch.tensor([list(one.values()) for one in metrics])
            save_file({**saved, "metrics": rows}, end)


@pytest.mark.parametrize("name", some_slow(KINDS, ["adamw_8bit"]))
def test_steps_are_those_of_one_process_to_the_bit(name: str, tmp_path: Path) -> None:
    model = network(KINDS[name])
    save_weights(model, tmp_path / "start")
    optimizer = optimizer_of(model, name)
    metrics = torch.tensor([list(one.values()) for one in stepped(model, optimizer)])
    exact = state_of(optimizer)
    two = group(among_two, 2, lambda rank: (name, tmp_path / "start", tmp_path / "end"))
    assert two.exit_codes() == [0, 0]
    found = load_file(tmp_path / "end")
    torch.testing.assert_close(found.pop("metrics"), metrics, rtol=1e-6, atol=0)
    assert found.keys() == exact.keys()
    # The norm, which clips, is added up in another order: with these gradients it does not clip.
    assert float(metrics[:, 0].max()) < 1
    assert [key for key in exact if not torch.equal(found[key], exact[key])] == []


def test_positions_are_those_in_the_whole() -> None:
    assert positions([torch.zeros(2, 3), torch.zeros(5)]) == ([0, 6], 11)


@pytest.mark.parametrize("count", [2, 3, 4, 6, 8])
def test_nearly_all_of_flux_is_divided(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of FLUX.1-dev, whose sizes are the defaults of its class."""
    monkeypatch.setattr("leapalign.parallel.sharding.count", lambda: count)
    with torch.device("meta"):
        parameters = list(FluxTransformer2DModel(guidance_embeds=True).parameters())
    whole = sum(parameter.numel() for parameter in parameters if not divides(parameter))
    assert whole <= sum(parameter.numel() for parameter in parameters) / 8000


def test_a_model_that_cannot_be_divided_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leapalign.parallel.sharding.count", lambda: 7)
    model = torch.nn.Linear(BLOCK, BLOCK)
    with pytest.raises(UserError, match=r"7 processes cannot share the weights of this model evenly.*start 2, 4 or 8"):
        shard(model, [], torch.device("cpu"), whole_after=False)
