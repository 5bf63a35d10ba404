"""Tiny random models of diffusers that `patch` knows, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from tiny_folders import small_vae
from torch import Tensor, nn
from worlds import small_flux

BATCH = 2


@dataclass(frozen=True)
class PatchCase:
    """A model, the tensors that it takes, and which of its modules `patch` should replace by these ops.

    None of PyTorch's operations that are `gone` should be left.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    ops: dict[str, tuple[str, ...]]
    gone: tuple[str, ...] = ("native_layer_norm", "gelu", "rsqrt")

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """With weights at random: where modulation begins at zero, or norms at one, wrong ones would go unseen."""
        torch.manual_seed(0)
        model = self.build().eval()
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=scale)
        return model.to(dtype)

    def drawn(self, dtype: torch.dtype) -> dict[str, Any]:
        """The same values for each dtype."""
        torch.manual_seed(1)
        return {name: _as(value, dtype) for name, value in self.inputs().items()}

    def run(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """The output, and its gradients at every input and parameter, by name."""
        inputs = self.drawn(dtype)
        leaves = {name: value for name, value in inputs.items() if _carries_gradient(value)}
        for value in leaves.values():
            value.requires_grad_()
        output = outputs(model, inputs)
        torch.manual_seed(2)
        weights = torch.randn(output.shape, dtype=torch.float64).to(dtype)
        leaves |= {name: p for name, p in model.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(output, list(leaves.values()), weights.to(output.dtype), allow_unused=True)
        found = {name: g for name, g in zip(leaves, gradients, strict=True) if g is not None}
        return {"output": output.detach(), **found}


def outputs(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    (output,) = model(**inputs, return_dict=False)
    return output


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float64 else value


def _carries_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 2 and value.is_floating_point()


def _double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def _flux_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _double(BATCH, 16, 16),
        "encoder_hidden_states": _double(BATCH, 5, 20),
        "pooled_projections": _double(BATCH, 10),
        "timestep": torch.tensor([0.3, 0.8], dtype=torch.float64),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(5, 3),
    }


_MODULATED, _BLOCK = ("adaln_modulate",), ("adaln_modulate", "gated_residual")
_FEED_FORWARD, _ATTENTION = ("gelu_tanh",), ("qk_norm_rope",)

CASES = {
    "flux": PatchCase(
        small_flux,
        _flux_inputs,
        {
            "transformer_blocks.0": _BLOCK,
            "transformer_blocks.0.norm1": _MODULATED,
            "transformer_blocks.0.norm1_context": _MODULATED,
            "transformer_blocks.0.attn": _ATTENTION,
            "transformer_blocks.0.ff.net.0": _FEED_FORWARD,
            "transformer_blocks.0.ff_context.net.0": _FEED_FORWARD,
            "single_transformer_blocks.0": ("gelu_tanh", "gated_residual"),
            "single_transformer_blocks.0.norm": _MODULATED,
            "single_transformer_blocks.0.attn": _ATTENTION,
            "norm_out": _MODULATED,
        },
    ),
}


def _autoencoder() -> nn.Module:
    model = small_vae()
    # Its second block changes the number of channels.
    model.decoder.up_blocks[1].resnets[0] = ResnetBlock2D(
        in_channels=8, out_channels=8, groups=4, temb_channels=None, use_in_shortcut=True
    )
    return model


_RESNETS = {"encoder.down_blocks": (4, 1), "decoder.up_blocks": (4, 2)}
_NORMED = ("group_norm_silu",)

CASES["autoencoder"] = PatchCase(
    _autoencoder,
    lambda: {"sample": _double(BATCH, 3, 32, 32)},
    {
        **{
            f"{blocks}.{block}.resnets.{number}": _NORMED
            for blocks, (count, resnets) in _RESNETS.items()
            for block in range(count)
            for number in range(resnets)
        },
        **{f"{half}.mid_block.resnets.{number}": _NORMED for half in ("encoder", "decoder") for number in range(2)},
        "encoder": _NORMED,
        "decoder": _NORMED,
    },
    gone=("silu",),
)


def difference(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """How far each tensor is from the exact one, relative to its norm.

    A gradient may be zero but for rounding, as that of the bias of keys: it counts as a share of the largest.
    """
    assert found.keys() == exact.keys()
    least = 1e-5 * max(value.norm() for value in exact.values())
    return {
        name: float((found[name].double() - value).norm() / value.norm().clamp(least)) for name, value in exact.items()
    }


@pytest.fixture
def all_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has diffusers compute in float64 what it would in float32 whatever the model: the turning of queries and keys."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
