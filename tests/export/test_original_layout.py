"""Original layouts: diffusers' own conversions take them back, and adapters change the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import diffusers
import pytest
import torch
from chat_folders import save_flux2_dev, save_flux2_klein, save_z_image
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_fal_kontext_lora_to_diffusers
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from safetensors.torch import save_file
from small_models import small_flux
from tiny_folders import save_qwen_image, save_stable_diffusion_3
from torch import Tensor, nn

from leapalign.export.layouts import FLUX, Layout
from leapalign.export.original_layout import COMFYUI_PREFIX, comfyui_adapter, layout_of, original_weights
from leapalign.inputs.validation import UserError
from leapalign.models.adapter_files import Adapter
from leapalign.models.folder import linear_widths, read_index

RANK = 2
COLUMNS = 3
Family: TypeAlias = tuple[Path, nn.Module, set[str]]
# What ComfyUI tells a model by, in detect_unet_config of comfy/model_detection.py.
FAMILIES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "stable diffusion 3": (
        save_stable_diffusion_3,
        {"joint_blocks.0.context_block.attn.qkv.weight", "x_embedder.proj.weight", "pos_embed"},
    ),
    "flux.2 klein": (
        save_flux2_klein,
        {
            "double_stream_modulation_img.lin.weight",
            "double_blocks.0.img_attn.norm.key_norm.scale",
            "img_in.weight",
            "txt_in.weight",
        },
    ),
    "flux.2 dev": (save_flux2_dev, {"double_stream_modulation_img.lin.weight", "guidance_in.in_layer.weight"}),
    "z-image": (
        save_z_image,
        {
            "cap_embedder.1.weight",
            "noise_refiner.0.attention.k_norm.weight",
            "layers.0.attention.qkv.weight",
            "x_embedder.weight",
            "cap_pad_token",
        },
    ),
    "qwen-image": (save_qwen_image, {"txt_norm.weight", "img_in.weight"}),
}


@pytest.fixture(scope="module")
def flux1_dev() -> FluxTransformer2DModel:
    """The real size, without memory: diffusers' conversions know its width by heart."""
    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True)


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, nn.Module, set[str]]:
    """A model's folder, its transformer, and names of its original layout."""
    save, told_by = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("models") / request.param
    save(folder)
    kind = getattr(diffusers, read_index(str(folder))["transformer"][1])
    return folder, kind.from_pretrained(folder, subfolder="transformer"), told_by


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
    ours = comfyui_adapter(FLUX, Adapter(RANK, RANK, adapter), widths(flux1_dev))
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


def test_diffusers_loads_each_familys_file_as_the_same_weights(family: Family, tmp_path: Path) -> None:
    folder, model, told_by = family
    # Some are zero or one at first.
    weights = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    original = original_weights(layout_of(folder), weights)
    assert told_by <= original.keys()
    save_file(original, tmp_path / "file.safetensors")
    back = type(model).from_single_file(str(tmp_path / "file.safetensors"), config=str(folder), subfolder="transformer")
    found = back.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def check_merging_commutes(layout: Layout, model: nn.Module, endings: tuple[str, ...], alpha: float = RANK) -> None:
    """With the change of layout: adapters merged before it, and after it, as ComfyUI scales them."""
    weights, adapter = dict(model.state_dict()), matrices(model, endings)
    merged = dict(weights)
    for name in widths(model):
        if f"{name}.lora_A.weight" in adapter:
            change = alpha / RANK * adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
            merged[f"{name}.weight"] = weights[f"{name}.weight"] + change
    expected = original_weights(layout, merged)

    ours = original_weights(layout, weights)
    changes = comfyui_adapter(layout, Adapter(RANK, alpha, adapter), widths(model))
    for name in [name for name in changes if name.endswith("lora_A.weight")]:
        module = name.removeprefix(COMFYUI_PREFIX).removesuffix(".lora_A.weight")
        rank = len(changes[name])
        scale = changes.get(f"{COMFYUI_PREFIX}{module}.alpha", torch.tensor(rank)) / rank
        change = changes[name.replace("lora_A", "lora_B")] @ changes[name]
        ours[f"{module}.weight"] = ours[f"{module}.weight"] + scale * change
    assert ours.keys() == expected.keys()
    assert sum(not torch.equal(expected[name], value) for name, value in original_weights(layout, weights).items()) > 1
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("endings", [("",), ("to_q", "to_v", "proj_mlp"), ("norm_out.linear", "attn.to_k")])
def test_merging_an_adapter_and_changing_layout_commute(endings: tuple[str, ...]) -> None:
    for alpha in (RANK, 3.0):
        check_merging_commutes(FLUX, small_flux(guidance_embeds=True), endings, alpha)


@pytest.mark.parametrize("endings", [("",), ("to_k", "to_v")])
def test_the_same_holds_in_each_family(family: Family, endings: tuple[str, ...]) -> None:
    folder, model, _ = family
    assert linear_widths(str(folder)) == widths(model)
    check_merging_commutes(layout_of(folder), model, endings)


def test_weights_without_a_place_are_refused() -> None:
    weights = {**small_flux().state_dict(), "transformer_blocks.0.attn.to_extra.weight": torch.zeros(1)}
    with pytest.raises(UserError, match=r"to_extra' has no place in the original layout; use --layout diffusers"):
        original_weights(FLUX, weights)
    with pytest.raises(UserError, match="has no place"):
        comfyui_adapter(FLUX, Adapter(1, 1, {"x.lora_A.weight": torch.zeros(1, 1)}), widths(small_flux()))
