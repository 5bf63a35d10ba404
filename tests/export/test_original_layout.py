"""FLUX.1's original layout: diffusers' own conversions take it back, and adapters change the same weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_fal_kontext_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from torch import Tensor, nn
from worlds import small_flux

from leapalign.export.original_layout import COMFYUI_PREFIX, FLUX, comfyui_adapter, original_weights
from leapalign.inputs.validation import UserError

RANK = 2
COLUMNS = 3


@pytest.fixture(scope="module")
def flux1_dev() -> FluxTransformer2DModel:
    """The real size, without memory: diffusers' conversions know its width by heart."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


def matrices(model: nn.Module, endings: tuple[str, ...]) -> dict[str, Tensor]:
    """A random adapter for the linear modules whose names end so."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(endings)}
    downs = {f"{name}.lora_A.weight": torch.randn(RANK, module.in_features) for name, module in found.items()}
    ups = {f"{name}.lora_B.weight": torch.randn(module.out_features, RANK) for name, module in found.items()}
    return {**downs, **ups}


def widths(model: nn.Module) -> dict[str, int]:
    return {name: module.out_features for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def test_diffusers_turns_flux1_devs_weights_back_to_the_bit(flux1_dev: FluxTransformer2DModel) -> None:
    """Every weight of FLUX.1-dev by its real name and number of rows; conversions never look at columns."""
    weights = {
        name: torch.randn(value.shape[0], *(min(COLUMNS, side) for side in value.shape[1:]))
        for name, value in flux1_dev.state_dict().items()
    }
    original = original_weights(FLUX, weights)
    assert original["double_blocks.18.img_attn.qkv.weight"].shape[0] == 3 * 3072
    assert original["single_blocks.37.linear1.weight"].shape[0] == 7 * 3072
    assert len(original) == 780, "as many as flux1-dev.safetensors"
    back = convert_flux_transformer_checkpoint_to_diffusers(original)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_diffusers_reads_our_adapter_of_flux1_dev_as_the_same_change(flux1_dev: FluxTransformer2DModel) -> None:
    adapter = {n: m for n, m in matrices(flux1_dev, ("",)).items() if n.startswith(("tr", "si", "proj_out"))}
    ours = comfyui_adapter(FLUX, adapter, widths(flux1_dev))
    theirs = _convert_fal_kontext_lora_to_diffusers(
        {name.replace(COMFYUI_PREFIX, "base_model.model."): value for name, value in ours.items()}
    )
    for name in adapter:
        if name.endswith("lora_A.weight"):
            other = name.replace("lora_A", "lora_B")
            probe = torch.randn(adapter[name].shape[1])
            change = adapter[other] @ (adapter[name] @ probe)
            torch.testing.assert_close(
                theirs[f"transformer.{other}"] @ (theirs[f"transformer.{name}"] @ probe), change, rtol=1e-4, atol=1e-3
            )


@pytest.mark.parametrize("endings", [("",), ("to_q", "to_v", "proj_mlp"), ("norm_out.linear", "attn.to_k")])
def test_merging_an_adapter_and_changing_layout_commute(endings: tuple[str, ...]) -> None:
    model = small_flux(guidance_embeds=True)
    weights, adapter = dict(model.state_dict()), matrices(model, endings)
    merged = dict(weights)
    for name in widths(model):
        if f"{name}.lora_A.weight" in adapter:
            change = adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
            merged[f"{name}.weight"] = weights[f"{name}.weight"] + change
    expected = original_weights(FLUX, merged)

    ours, changes = original_weights(FLUX, weights), comfyui_adapter(FLUX, adapter, widths(model))
    for name in [name for name in changes if name.endswith("lora_A.weight")]:
        module = name.removeprefix(COMFYUI_PREFIX).removesuffix(".lora_A.weight")
        ours[f"{module}.weight"] = ours[f"{module}.weight"] + changes[name.replace("lora_A", "lora_B")] @ changes[name]
    assert ours.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-5)


def test_weights_without_a_place_are_refused() -> None:
    weights = {**small_flux().state_dict(), "transformer_blocks.0.attn.to_extra.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"to_extra' has no place in the original layout; use --layout diffusers"):
        original_weights(FLUX, weights)
    with pytest.raises(UserError, match="has no place"):
        comfyui_adapter(FLUX, {"x.lora_A.weight": torch.zeros(1, 1)}, widths(small_flux()))
