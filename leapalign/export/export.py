"""A run's weights as other software reads them: a folder of diffusers, or one file in the original layout."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file

from leapalign.config import Config
from leapalign.export.model_card import FILE as CARD
from leapalign.export.model_card import Export, model_card
from leapalign.export.original_layout import comfyui_adapter, layout_of, original_weights
from leapalign.inputs.validation import UserError
from leapalign.models.folder import linear_widths, read_index
from leapalign.models.lora import FILE as ADAPTER_FILE
from leapalign.models.lora import read_matrices
from leapalign.models.weights import read_weights
from leapalign.runs.checkpoint import TRANSFORMER, run_weights
from leapalign.storage.durable import writing
from leapalign.storage.embedded import resolve

LAYOUTS = ("diffusers", "original", "comfyui")
_INDEX = "model_index.json"


def export(run: Path, config: Config, output: Path, weights: str, layout: str, step: int | None = None) -> str:
    """Writes the run's `WEIGHTS` called ``weights``, as one of `LAYOUTS`, and a model card to a new folder ``output``.

    They are those of ``step``, or of the latest checkpoint, or the best.

    Returns a sentence on what was written. Raises UserError where ``output`` exists, the run has no checkpoint,
    there is no such layout of these weights, or the disk is full.
    """
    if output.exists():
        raise UserError(f"'{output}' already exists; choose another --output")
    source = run_weights(run, weights, step)
    base = resolve(config.model.path)
    adapter = (source / ADAPTER_FILE).exists()
    write = _writer(layout, adapter)
    iterations = int(json.loads((source.parent / "state.json").read_text())["iteration"])
    with writing(output, "export again"):
        output.parent.mkdir(parents=True, exist_ok=True)
        # Whole or absent: what fails half-way goes with the scratch folder.
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
            partial = Path(scratch) / output.name
            partial.mkdir()
            sentence = write(source, base, partial)
            _copy_licence(base, partial)
            card = model_card(Export(config, base, iterations, weights, layout, adapter))
            (partial / CARD).write_text(card, encoding="utf-8")
            os.rename(partial, output)
    return sentence


def _writer(layout: str, adapter: bool) -> Callable[[Path, str, Path], str]:
    writers: dict[tuple[str, bool], Callable[[Path, str, Path], str]] = {
        ("diffusers", False): _write_model,
        ("original", False): _write_original,
        ("diffusers", True): _write_adapter,
        ("comfyui", True): _write_comfyui_adapter,
    }
    if (layout, adapter) not in writers:
        other = (
            "adapters have no original layout; use --layout comfyui"
            if adapter
            else ("ComfyUI reads a whole transformer in its original layout; use --layout original")
        )
        raise UserError(f"{other} or diffusers")
    return writers[layout, adapter]


def _write_model(source: Path, base: str, target: Path) -> str:
    """The transformer, and beside it the base's other parts where they are on this machine."""
    shutil.copytree(source, target / TRANSFORMER)
    _forget_origin(target / TRANSFORMER / "config.json")
    if not Path(base).is_dir():
        return f"only {TRANSFORMER}/ is written: the other parts are those of '{base}'"
    parts = [name for name, part in read_index(base).items() if isinstance(part, list | tuple) and part[0]]
    for name in parts:
        if name != TRANSFORMER:
            _copy_part(Path(base) / name, target)
    shutil.copy(Path(base) / _INDEX, target)
    return "a model that diffusers' from_pretrained loads"


def _forget_origin(config: Path) -> None:
    """Drops where diffusers read the model from, which is a folder of this machine."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2) + "\n")


def _copy_part(part: Path, target: Path) -> None:
    if not part.is_dir():
        raise UserError(
            f"a whole model needs '{part}', which is not there; restore it, or set model.path to another base"
        )
    shutil.copytree(part, target / part.name)


def _write_original(source: Path, base: str, target: Path) -> str:
    weights = original_weights(layout_of(base), read_weights(source))
    file = target / f"{target.name}.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    return f"the transformer in its original layout, in {file.name}"


def _write_adapter(source: Path, base: str, target: Path) -> str:
    shutil.copy(source / ADAPTER_FILE, target)
    return "an adapter that diffusers' load_lora_weights loads"


def _write_comfyui_adapter(source: Path, base: str, target: Path) -> str:
    matrices = comfyui_adapter(layout_of(base), read_matrices(source), linear_widths(base))
    file = target / f"{target.name}.safetensors"
    save_file(matrices, file, metadata={"format": "pt"})
    return f"an adapter for ComfyUI, in {file.name}"


def _copy_licence(base: str, target: Path) -> None:
    """Licences such as FLUX.1-dev's ask that their text goes with the weights."""
    for file in Path(base).glob("LICENSE*"):
        shutil.copy(file, target)
