"""Tiny random models of diffusers that `patch` knows, and what they compute."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from chat_folders import WIDTH as Z_WIDTH
from chat_folders import small_flux2, small_z_image
from diffusers import QwenImageTransformer2DModel, SD3Transformer2DModel
from diffusers.models import normalization
from diffusers.models.resnet import ResnetBlock2D
from small_models import small_flux, small_vae
from torch import Tensor, nn

BATCH = 2


@dataclass(frozen=True)
class PatchCase:
    """A model, the tensors that it takes, and which of its modules `patch` should replace by these ops.

    Of PyTorch's operations those that are `gone` should run no more. Modules that are `left` should say why.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    ops: dict[str, tuple[str, ...]]
    gone: tuple[str, ...] = ("native_layer_norm", "gelu", "rsqrt")
    left: dict[str, str] = field(default_factory=dict)

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
    """One tensor, also of a model that returns a list of images."""
    (output,) = model(**inputs, return_dict=False)
    return torch.stack(output) if isinstance(output, list) else output


def _as(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_as(one, dtype) for one in value]
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
_FEED_FORWARD, _ATTENTION, _GATED = ("gelu_tanh",), ("qk_norm_rope",), ("gated_residual",)
Z_BLOCKS = [
    f"{blocks}.{number}"
    for blocks, count in (("noise_refiner", 2), ("context_refiner", 2), ("layers", 3))
    for number in range(count)
]


def _block(prefix: str, *norms: str, attention: str = "attn", forwards: tuple[str, ...] = ()) -> dict[str, Any]:
    """A block of a transformer with two ops of its own, and its parts."""
    parts = {f"{prefix}.{name}": _MODULATED for name in norms} | {f"{prefix}.{attention}": _ATTENTION}
    parts |= {f"{prefix}.{name}{part}": _FEED_FORWARD for name in forwards for part in ("", ".net.0")}
    return {prefix: _BLOCK, **parts}


_TWO_FORWARDS = ("ff", "ff_context")

CASES = {
    "flux": PatchCase(
        small_flux,
        _flux_inputs,
        {
            **_block("transformer_blocks.0", "norm1", "norm1_context", forwards=_TWO_FORWARDS),
            **_block("single_transformer_blocks.0", "norm"),
            "single_transformer_blocks.0": ("gelu_tanh", "gated_residual"),
            "norm_out": _MODULATED,
        },
    ),
}


def _flux2_inputs() -> dict[str, Any]:
    inputs = _flux_inputs() | {"img_ids": torch.cartesian_prod(*[torch.arange(2.0)] * 4), "txt_ids": torch.ones(5, 4)}
    del inputs["pooled_projections"]
    return inputs


CASES["flux2"] = PatchCase(
    lambda: small_flux2(joint_attention_dim=20, guidance_embeds=False),
    _flux2_inputs,
    {
        **{name: ops for number in (0, 1) for name, ops in _block(f"transformer_blocks.{number}").items()},
        **{name: ops for number in (0, 1) for name, ops in _block(f"single_transformer_blocks.{number}").items()},
        **{f"transformer_blocks.{number}.{ff}.act_fn": ("swiglu",) for number in (0, 1) for ff in ("ff", "ff_context")},
        **{f"single_transformer_blocks.{number}.attn.mlp_act_fn": ("swiglu",) for number in (0, 1)},
        "norm_out": _MODULATED,
    },
)


def _small_sd3() -> nn.Module:
    """As 3.5 medium: dual attention in the first block; of the last one the text is of no more use."""
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=20,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def _sd3_inputs() -> dict[str, Any]:
    inputs = _flux_inputs() | {"hidden_states": _double(BATCH, 4, 8, 8)}
    return {name: value for name, value in inputs.items() if not name.endswith("ids")}


CASES["stable_diffusion_3"] = PatchCase(
    _small_sd3,
    _sd3_inputs,
    {
        **_block("transformer_blocks.0", "norm1", "norm1_context", forwards=_TWO_FORWARDS),
        "transformer_blocks.0.attn2": _ATTENTION,
        **_block("transformer_blocks.1", "norm1", "norm1_context", forwards=_TWO_FORWARDS),
        **_block("transformer_blocks.2", "norm1", "norm1_context", forwards=("ff",)),
        "norm_out": _MODULATED,
    },
)


def _small_qwen_image() -> nn.Module:
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        axes_dims_rope=(4, 6, 6),
    )


def _qwen_inputs() -> dict[str, Any]:
    return {
        "hidden_states": _double(BATCH, 16, 16),
        "encoder_hidden_states": _double(BATCH, 5, 20),
        "encoder_hidden_states_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool(),
        "timestep": torch.tensor([0.3, 0.8], dtype=torch.float64),
        "img_shapes": [[(1, 4, 4)]] * BATCH,
    }


CASES["qwen_image"] = PatchCase(
    _small_qwen_image,
    _qwen_inputs,
    {
        **_block("transformer_blocks.0", forwards=("img_mlp", "txt_mlp")),
        **_block("transformer_blocks.1", forwards=("img_mlp", "txt_mlp")),
        "norm_out": _MODULATED,
    },
    gone=("native_layer_norm", "gelu"),
)


def _z_block(prefix: str) -> dict[str, tuple[str, ...]]:
    return {f"{prefix}.attention": _ATTENTION, f"{prefix}.feed_forward": ("swiglu",)}


CASES["z_image"] = PatchCase(
    small_z_image,
    lambda: {
        "x": [_double(4, 1, 8, 8), _double(4, 1, 8, 8)],
        "t": torch.tensor([0.3, 0.8], dtype=torch.float64),
        "cap_feats": [_double(5, Z_WIDTH), _double(3, Z_WIDTH)],
    },
    {
        **{name: _GATED for name in Z_BLOCKS if not name.startswith("context")},
        **{name: ops for prefix in Z_BLOCKS for name, ops in _z_block(prefix).items()},
        "all_final_layer.2-1": _MODULATED,
    },
    gone=("native_layer_norm",),
    left={name: "it has no modulation, and no gates" for name in Z_BLOCKS if name.startswith("context")},
)


def _autoencoder() -> nn.Module:
    model = small_vae()
    # Its second block changes the number of channels, and halves.
    model.decoder.up_blocks[1].resnets[0] = ResnetBlock2D(
        in_channels=8, out_channels=8, groups=4, temb_channels=None, use_in_shortcut=True, output_scale_factor=2.0
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


def compute_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have diffusers compute in float64 what it would in float32 whatever the model: how it turns queries and keys, and
    its root mean squares."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    double = types.ModuleType("torch")
    vars(double).update(vars(torch), float32=torch.float64)
    monkeypatch.setattr(normalization, "torch", double)


@pytest.fixture
def all_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_in_double(monkeypatch)
