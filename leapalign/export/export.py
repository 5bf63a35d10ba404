"""A run's weights as other software reads them: a folder of diffusers, or one file in the original layout."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from leapalign.config import Config
from leapalign.export.base import CARD, INDEX, TRANSFORMER, base_folder, licences_of, parts_of
from leapalign.export.model_card import Export, in_comfyui, model_card
from leapalign.export.original_layout import comfyui_adapter, layout_of, original_weights
from leapalign.inputs.validation import UserError
from leapalign.models.adapter_files import FILE as ADAPTER_FILE
from leapalign.models.adapter_files import read_adapter
from leapalign.models.folder import linear_widths
from leapalign.models.weights import read_weights
from leapalign.runs.checkpoint import run_weights
from leapalign.storage.durable import require_space, writing
from leapalign.storage.modes import copy, save_file

_TEXT_BYTES = 1 << 20
"""Of the card and of headers, at most."""
_THEN = "export again"


@dataclass(frozen=True)
class _Contents:
    """What an export holds beside card and licence text."""

    copies: Mapping[str, Path] = field(default_factory=dict)
    """Name in the export <- file or folder."""
    tensors: Callable[[], Mapping[str, Tensor]] | None = None
    """Those of its own safetensors file, if it has one."""
    tensor_bytes: int = 0


def export(run: Path, config: Config, output: Path, weights: str, layout: str, step: int | None = None) -> str:
    """Writes the run's `WEIGHTS` called ``weights``, with card and licence text, to a new folder ``output``.

    They are those of ``step``, or of the latest checkpoint, or the best. layout: diffusers, original (all weights) or
    comfyui.

    Returns a sentence on what was written. Raises UserError where ``output`` exists, the run has no checkpoint, files
    of the base are missing, there is no such layout of these weights, or the disk has no room.
    """
    if output.exists():
        raise UserError(f"'{output}' already exists; choose another --output")
    source = run_weights(run, weights, step)
    adapter = read_adapter(source) if (source / ADAPTER_FILE).exists() else None
    contents_of, sentence = _way(layout, adapter is not None)
    base = base_folder(config.model.path, whole=contents_of is _model)
    contents = contents_of(source, base)
    iterations = int(json.loads((source.parent / "state.json").read_text())["iteration"])
    file = f"{output.name}.safetensors"
    card = model_card(Export(config, base, iterations, weights, layout, adapter, file))
    copies = {**contents.copies, **{path.name: path for path in licences_of(base)}}
    with writing(output, _THEN):
        size = sum(_bytes(path) for path in copies.values()) + contents.tensor_bytes + _TEXT_BYTES
        require_space(output.parent, size, "the export", f"make room, then {_THEN}")
        output.parent.mkdir(parents=True, exist_ok=True)
        # Whole or absent: what fails half-way goes with the scratch folder.
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
            partial = Path(scratch) / output.name
            partial.mkdir()
            for name, path in copies.items():
                copy(path, partial / name)
            if contents.tensors:
                save_file(contents.tensors(), partial / file, {"format": "pt"})
            _forget_origin(partial / TRANSFORMER / "config.json")
            (partial / CARD).write_text(card, encoding="utf-8")
            os.rename(partial, output)
    unlicensed = "" if licences_of(base) else "; add the text of the base's licence before you pass it on"
    return f"{sentence.format(file=file)}{unlicensed}"


def _way(layout: str, adapter: bool) -> tuple[Callable[[Path, Path], _Contents], str]:
    """What makes the contents of weights in ``source``, of the model in ``base``, and a sentence on them."""
    ways = {
        ("diffusers", False): (_model, "a model that diffusers' from_pretrained loads"),
        ("original", False): (_transformer, "the transformer in its original layout, in {file}"),
        ("comfyui", False): (_transformer, f"the transformer for ComfyUI, in {{file}}: {in_comfyui(adapter=False)}"),
        ("diffusers", True): (_adapter, "an adapter that diffusers' load_lora_weights loads"),
        ("comfyui", True): (_comfyui_adapter, f"an adapter for ComfyUI, in {{file}}: {in_comfyui(adapter=True)}"),
    }
    if (layout, adapter) not in ways:
        raise UserError("adapters have no original layout; use --layout comfyui or diffusers")
    return ways[layout, adapter]


def _model(source: Path, base: Path) -> _Contents:
    parts = {name: base / name for name in (*parts_of(base), INDEX)}
    return _Contents({TRANSFORMER: source, **parts})


def _transformer(source: Path, base: Path) -> _Contents:
    layout = layout_of(base)
    return _Contents(tensors=lambda: original_weights(layout, read_weights(source)), tensor_bytes=_bytes(source))


def _adapter(source: Path, base: Path) -> _Contents:
    return _Contents({ADAPTER_FILE: source / ADAPTER_FILE})


def _comfyui_adapter(source: Path, base: Path) -> _Contents:
    matrices = comfyui_adapter(layout_of(base), read_adapter(source), linear_widths(str(base)))
    return _Contents(tensors=lambda: matrices, tensor_bytes=sum(matrix.nbytes for matrix in matrices.values()))


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _forget_origin(config: Path) -> None:
    """Drops where diffusers read the model from, which is a folder of this machine, from the configuration if any."""
    if config.exists():
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)
        config.write_text(json.dumps(values, indent=2) + "\n")
