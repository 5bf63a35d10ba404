"""Weights and adapters by the names that a model's authors gave them: what diffusers splits is one module there.

ComfyUI tells a model by these names (``detect_unet_config`` in comfy/model_detection.py): FLUX by
``double_blocks.0.img_attn.norm.key_norm.scale`` and ``img_in.weight``, FLUX.2 by
``double_stream_modulation_img.lin.weight`` beside them, Stable Diffusion 3 by
``joint_blocks.0.context_block.attn.qkv.weight``, Z-Image by ``cap_embedder.1.weight`` and
``noise_refiner.0.attention.k_norm.weight``, Qwen-Image by ``txt_norm.weight``. Load Diffusion Model takes them bare, as
the authors' own files have them, or behind ``model.diffusion_model.``, which it cuts off
(``unet_prefix_from_state_dict``).

Of adapters it reads every module as ``diffusion_model.<original module>``. Behind ``transformer.`` it also knows
diffusers' names of the families here (``model_lora_keys_unet`` in comfy/lora.py), but not of every module: FLUX.2's
modulations are missing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from leapalign.export.layouts import LAYOUTS, Layout
from leapalign.inputs.validation import UserError
from leapalign.models.adapter_files import Adapter
from leapalign.models.folder import read_index

_NORMS = ("query_norm", "key_norm")
"""Their weight is called scale."""
_DOWN, _UP = "lora_A.weight", "lora_B.weight"
COMFYUI_PREFIX = "diffusion_model."


def layout_of(base: Path) -> Layout:
    """The original layout of the model in a folder. Raises UserError where we know none."""
    pipeline = str(read_index(str(base)).get("_class_name"))
    if pipeline not in LAYOUTS:
        raise UserError(f"the original layout of {pipeline}'s transformer is not known; use --layout diffusers")
    return LAYOUTS[pipeline]


def original_weights(layout: Layout, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by diffusers' names as weights by the original ones, of the same dtype.

    Raises UserError for one that ``layout`` does not have.
    """
    filled = _Filled(layout, {name.removesuffix(".weight").removesuffix(".bias") for name in weights})
    result = {}
    for original, parts in filled.modules.items():
        for kind in (".weight", ".bias", ""):
            if f"{parts[0]}{kind}" in weights:
                name = ".scale" if original.endswith(_NORMS) else kind
                result[f"{original}{name}"] = filled.rows(original, [weights[f"{part}{kind}"] for part in parts])
    return result


def comfyui_adapter(layout: Layout, adapter: Adapter, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """An adapter by diffusers' names as ComfyUI's ``diffusion_model.<original module>.lora_A.weight`` and ``lora_B``.

    widths: ``out`` of every linear module of the transformer, adapted or not.

    A module that is several in diffusers has the sum of their ranks: A's one below the other, B block-diagonal, with
    rows of zeros for parts without adapter. Where alpha is not the rank, each module has an ``alpha ()`` that keeps its
    scale: ComfyUI divides it by the sum. Raises UserError for a module that ``layout`` does not have.
    """
    filled = _Filled(layout, widths)
    known = {part for parts in filled.modules.values() for part in parts}
    matrices = adapter.matrices
    _refuse(set(adapter.modules) - known)
    result = {}
    for original, parts in filled.modules.items():
        downs = [matrices[f"{part}.{_DOWN}"] for part in parts if f"{part}.{_DOWN}" in matrices]
        if downs:
            ups = [matrices.get(f"{part}.{_UP}", downs[0].new_zeros(widths[part], 0)) for part in parts]
            result[f"{COMFYUI_PREFIX}{original}.{_DOWN}"] = torch.cat(downs)
            result[f"{COMFYUI_PREFIX}{original}.{_UP}"] = filled.rows(original, [torch.block_diag(*ups)])
            if adapter.alpha != adapter.rank:
                result[f"{COMFYUI_PREFIX}{original}.alpha"] = torch.tensor(adapter.alpha * len(downs))
    return result


class _Filled:
    """The part of a layout that a transformer with modules called ``names`` has, with block numbers.

    Raises UserError for a name that is not there.
    """

    def __init__(self, layout: Layout, names: Collection[str]) -> None:
        numbers = sorted({int(found[1]) for name in names if (found := re.match(r"\w+\.(\d+)\.", name))})
        filled = {
            original.format(n=number): tuple(part.format(n=number) for part in parts)
            for original, parts in layout.modules.items()
            for number in (numbers if "{n}" in original else (0,))
        }
        self.modules = {original: parts for original, parts in filled.items() if all(part in names for part in parts)}
        others = set(names) - {part for parts in self.modules.values() for part in parts}
        if layout.rest:
            self.modules |= {name: (name,) for name in sorted(others)}
        else:
            _refuse(others)
        self._shift_first = {name.format(last=max(numbers, default=0)) for name in layout.shift_first}

    def rows(self, original: str, parts: list[Tensor]) -> Tensor:
        """Of the module ``original``, from those of its parts."""
        rows = torch.cat(parts) if len(parts) > 1 else parts[0]
        return torch.cat(rows.chunk(2)[::-1]) if original in self._shift_first else rows


def _refuse(modules: Iterable[str]) -> None:
    """Raises UserError where there is a module."""
    for module in sorted(modules):
        raise UserError(f"'{module}' has no place in the original layout; use --layout diffusers")
