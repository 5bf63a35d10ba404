"""How many kernels a GPU would be given in an optimizer step of a model with as many parameters as FLUX.1."""

from __future__ import annotations

import launches
import pytest
import torch
from diffusers import FluxTransformer2DModel
from leap_kernels import use_backend
from torch import nn

from leapalign.config import EmaConfig, OptimizerConfig
from leapalign.memory.transfer import ToHost
from leapalign.optimizers.optimizer import Optimizer

# Without native code the reference computes the average, with a copy of its own for each parameter.
pytestmark = [pytest.mark.interpreter, pytest.mark.native]


@pytest.fixture(scope="module")
def transformer() -> FluxTransformer2DModel:
    """All blocks of FLUX.1-dev, of a tiny width."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=19,
        num_single_layers=38,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).bfloat16()


def optimizer_of(weights: list[nn.Parameter]) -> Optimizer:
    config = OptimizerConfig(name="adamw_8bit", learning_rate=1e-3)
    optimizer = Optimizer(weights, config, EmaConfig(dtype="float32"), iterations=10, seed=3)
    # As from a GPU: the average is in host memory.
    optimizer.average._to_host = ToHost(torch.device("cpu"), weights)
    return optimizer


@pytest.mark.slow
def test_a_step_of_1160_parameters_takes_few_launches(
    transformer: FluxTransformer2DModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = list(transformer.parameters())
    assert len(weights) == 1160
    optimizer = optimizer_of(weights)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    counts = [optimizer.rule.state[weight]["step"] for weight in weights]
    update = optimizer.average.update
    with use_backend("triton", strict=True), launches.counted(monkeypatch, counts) as counted:

        def updated() -> None:
            # What the host does with the copies is no launch.
            with counted.section("average"), use_backend("auto"):
                update()

        monkeypatch.setattr(optimizer.average, "update", updated)
        metrics = optimizer.step()
    assert metrics["moved"] > 0.5
    triton = {name: number for name, number in counted.counted[""].items() if name.endswith("_kernel")}
    assert triton.keys() == {"squares_kernel", "adamw_many_kernel"}
    assert counted.kernels() <= 100
    # The norm, which says whether anything moves, and the share that moved.
    assert counted.reads() == 2
    # The average takes one copy to the host for each parameter.
    assert counted.counted["average"]["aten::copy_"] == len(weights)
    assert counted.kernels("average") == len(weights)
