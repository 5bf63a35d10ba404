"""The names FLUX.1's authors gave its weights, which ComfyUI reads: what diffusers splits is one module there."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from leapalign.inputs.validation import UserError
from leapalign.models.folder import read_index

Layout: TypeAlias = Mapping[str, tuple[str, ...]]
"""Original module <- the diffusers modules whose rows it has, one below the other; ``{n}`` is a block's number."""

_DOUBLE, _DOUBLE_DIFFUSERS = "double_blocks.{n}", "transformer_blocks.{n}"
_SINGLE, _SINGLE_DIFFUSERS = "single_blocks.{n}", "single_transformer_blocks.{n}"
_EMBEDDER = "time_text_embed"
FLUX: Layout = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": (f"{_EMBEDDER}.timestep_embedder.linear_1",),
    "time_in.out_layer": (f"{_EMBEDDER}.timestep_embedder.linear_2",),
    "vector_in.in_layer": (f"{_EMBEDDER}.text_embedder.linear_1",),
    "vector_in.out_layer": (f"{_EMBEDDER}.text_embedder.linear_2",),
    "guidance_in.in_layer": (f"{_EMBEDDER}.guidance_embedder.linear_1",),
    "guidance_in.out_layer": (f"{_EMBEDDER}.guidance_embedder.linear_2",),
    f"{_DOUBLE}.img_mod.lin": (f"{_DOUBLE_DIFFUSERS}.norm1.linear",),
    f"{_DOUBLE}.txt_mod.lin": (f"{_DOUBLE_DIFFUSERS}.norm1_context.linear",),
    f"{_DOUBLE}.img_attn.qkv": tuple(f"{_DOUBLE_DIFFUSERS}.attn.to_{part}" for part in "qkv"),
    f"{_DOUBLE}.txt_attn.qkv": tuple(f"{_DOUBLE_DIFFUSERS}.attn.add_{part}_proj" for part in "qkv"),
    f"{_DOUBLE}.img_attn.norm.query_norm": (f"{_DOUBLE_DIFFUSERS}.attn.norm_q",),
    f"{_DOUBLE}.img_attn.norm.key_norm": (f"{_DOUBLE_DIFFUSERS}.attn.norm_k",),
    f"{_DOUBLE}.txt_attn.norm.query_norm": (f"{_DOUBLE_DIFFUSERS}.attn.norm_added_q",),
    f"{_DOUBLE}.txt_attn.norm.key_norm": (f"{_DOUBLE_DIFFUSERS}.attn.norm_added_k",),
    f"{_DOUBLE}.img_attn.proj": (f"{_DOUBLE_DIFFUSERS}.attn.to_out.0",),
    f"{_DOUBLE}.txt_attn.proj": (f"{_DOUBLE_DIFFUSERS}.attn.to_add_out",),
    f"{_DOUBLE}.img_mlp.0": (f"{_DOUBLE_DIFFUSERS}.ff.net.0.proj",),
    f"{_DOUBLE}.img_mlp.2": (f"{_DOUBLE_DIFFUSERS}.ff.net.2",),
    f"{_DOUBLE}.txt_mlp.0": (f"{_DOUBLE_DIFFUSERS}.ff_context.net.0.proj",),
    f"{_DOUBLE}.txt_mlp.2": (f"{_DOUBLE_DIFFUSERS}.ff_context.net.2",),
    f"{_SINGLE}.modulation.lin": (f"{_SINGLE_DIFFUSERS}.norm.linear",),
    f"{_SINGLE}.linear1": (
        *(f"{_SINGLE_DIFFUSERS}.attn.to_{part}" for part in "qkv"),
        f"{_SINGLE_DIFFUSERS}.proj_mlp",
    ),
    f"{_SINGLE}.norm.query_norm": (f"{_SINGLE_DIFFUSERS}.attn.norm_q",),
    f"{_SINGLE}.norm.key_norm": (f"{_SINGLE_DIFFUSERS}.attn.norm_k",),
    f"{_SINGLE}.linear2": (f"{_SINGLE_DIFFUSERS}.proj_out",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
LAYOUTS: dict[str, Layout] = {"FluxPipeline": FLUX}
"""By the class of pipeline in a model's ``model_index.json``."""
_SHIFT_FIRST = "final_layer.adaLN_modulation.1"
"""Its rows are shift, then scale; diffusers has scale, then shift."""
_NORMS = ("query_norm", "key_norm")
"""Their weight is called scale."""
_DOWN, _UP = "lora_A.weight", "lora_B.weight"
COMFYUI_PREFIX = "diffusion_model."


def layout_of(path: str) -> Layout:
    """The original layout of the model in a folder or hub id. Raises UserError where we know none."""
    pipeline = str(read_index(path).get("_class_name"))
    if pipeline not in LAYOUTS:
        raise UserError(f"the original layout of {pipeline}'s transformer is not known; use --layout diffusers")
    return LAYOUTS[pipeline]


def original_weights(layout: Layout, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by diffusers' names as weights by the original ones, of the same dtype.

    Raises UserError for one that ``layout`` does not have.
    """
    modules = _filled(layout, {name.rpartition(".")[0] for name in weights})
    result = {}
    for original, parts in modules.items():
        for kind in ("weight", "bias"):
            if f"{parts[0]}.{kind}" in weights:
                name = "scale" if original.endswith(_NORMS) else kind
                result[f"{original}.{name}"] = _rows(original, [weights[f"{part}.{kind}"] for part in parts])
    return result


def comfyui_adapter(layout: Layout, adapter: Mapping[str, Tensor], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """An adapter by diffusers' names as ComfyUI's ``diffusion_model.<original module>.lora_A.weight`` and ``lora_B``.

    adapter: ``<module>.lora_A.weight (rank, in)`` and ``<module>.lora_B.weight (out, rank)``, of scale 1.
    widths: ``out`` of every linear module of the transformer, adapted or not.

    A module that is several in diffusers has the sum of their ranks: A's one below the other, B block-diagonal, with
    rows of zeros for parts without adapter. Raises UserError for a module that ``layout`` does not have.
    """
    modules = _filled(layout, widths)
    known = {part for parts in modules.values() for part in parts}
    _refuse({name.removesuffix(f".{_DOWN}") for name in adapter if name.endswith(_DOWN)} - known)
    result = {}
    for original, parts in modules.items():
        downs = [adapter[f"{part}.{_DOWN}"] for part in parts if f"{part}.{_DOWN}" in adapter]
        if downs:
            ups = [adapter.get(f"{part}.{_UP}", downs[0].new_zeros(widths[part], 0)) for part in parts]
            result[f"{COMFYUI_PREFIX}{original}.{_DOWN}"] = torch.cat(downs)
            result[f"{COMFYUI_PREFIX}{original}.{_UP}"] = _rows(original, [torch.block_diag(*ups)])
    return result


def _filled(layout: Layout, names: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The part of ``layout`` that a transformer with modules called ``names`` has, with block numbers.

    Raises UserError for one that is not there.
    """
    numbers = sorted({int(found[1]) for name in names if (found := re.match(r"\w+\.(\d+)\.", name))})
    filled = {
        original.format(n=number): tuple(part.format(n=number) for part in parts)
        for original, parts in layout.items()
        for number in (numbers if "{n}" in original else (0,))
    }
    present = {original: parts for original, parts in filled.items() if all(part in names for part in parts)}
    _refuse(set(names) - {part for parts in present.values() for part in parts})
    return present


def _refuse(modules: Iterable[str]) -> None:
    """Raises UserError where there is a module."""
    for module in sorted(modules):
        raise UserError(f"'{module}' has no place in the original layout; use --layout diffusers")


def _rows(original: str, parts: list[Tensor]) -> Tensor:
    rows = torch.cat(parts) if len(parts) > 1 else parts[0]
    return torch.cat(rows.chunk(2)[::-1]) if original == _SHIFT_FIRST else rows
