"""What an export takes from a run's base model: files of a folder, or of the hub's cache, which it completes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from leapalign.inputs.validation import UserError, brief, first_of
from leapalign.models.folder import read_index
from leapalign.storage.embedded import resolve

CARD, INDEX, TRANSFORMER = "README.md", "model_index.json", "transformer"
_CONFIG = f"{TRANSFORMER}/config.json"
_LICENCES = "LICENSE*"
_NOT_LOADED = ("*.fp16*", "*.bin", "*.msgpack", "*.h5", "*.onnx*")
"""Forms of the weights beside the one that is loaded."""


def base_folder(path: str, whole: bool) -> Path:
    """The folder on this machine of the base model ``path``, a folder or hub id.

    whole: with all that `parts_of` names. Of a hub id it is the snapshot in the cache; what is missing there, card and
    licence text included, is downloaded, of the same commit. Raises UserError where something is missing still, but
    for card and licence text.
    """
    folder = Path(resolve(path))
    if not folder.is_dir():
        folder = _snapshot(path)
        if whole and (lacking := _lacking(folder, parts_of(folder))):
            folder = _downloaded(path, folder, [f"{name}/*" for name in lacking], lacking)
    elif whole and (lacking := _lacking(folder, parts_of(folder))):
        raise UserError(
            f"a whole model needs '{folder / lacking[0]}', which is not there or not complete; restore it, or set "
            "model.path to another base"
        )
    return folder


def parts_of(folder: Path) -> list[str]:
    """The names of the parts of the model in ``folder``, but for the transformer. Raises UserError without an index."""
    index = read_index(str(folder))
    return [name for name, part in index.items() if not isinstance(part, str) and part[0] and name != TRANSFORMER]


def licences_of(folder: Path) -> list[Path]:
    """The files with the text of the licence. Licences such as FLUX.1-dev's ask that it goes with the weights."""
    return sorted(path for path in folder.glob(_LICENCES) if path.is_file())


def _snapshot(path: str) -> Path:
    """With the index and the transformer's configuration, and card and licence text where they can be had."""
    needed = [INDEX, _CONFIG]
    try:
        index = try_to_load_from_cache(path, INDEX)
    except HFValidationError:
        raise UserError(f"there is no base model '{path}'; set model.path to where it is now") from None
    folder = Path(index).parent if isinstance(index, str) else None
    if folder is None or _lacking(folder, [*needed, CARD]) or not licences_of(folder):
        folder = _downloaded(path, folder, [*needed, CARD, _LICENCES], needed)
    return folder


def _downloaded(path: str, cached: Path | None, patterns: list[str], needed: list[str]) -> Path:
    """The snapshot, completed by what ``patterns`` say. Raises UserError where something ``needed`` is missing still.

    cached: the snapshot as it is.
    """
    folder, reason = cached, ""
    try:
        folder = Path(
            snapshot_download(
                path,
                revision=cached.name if cached else None,  # what was trained on, whatever came after it
                allow_patterns=patterns,
                ignore_patterns=list(_NOT_LOADED),
            )
        )
    except Exception as error:  # what HTTP, a connection and a cache make the client raise has no common type
        reason = f" ({brief(error)})"
    lacking = _lacking(folder, needed) if folder else needed
    if folder is None or lacking:
        raise UserError(
            f"the export needs {first_of(lacking)} of '{path}', which the hub's cache does not hold and which could "
            f"not be downloaded{reason}; run hf download {path} where the hub can be reached, then export again"
        )
    return folder


def _lacking(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the files and parts called ``names`` that ``folder`` does not have, or not with all their weights."""
    return [name for name in names if not (folder / name).exists() or not _has_weights(folder / name)]


def _has_weights(part: Path) -> bool:
    """False for a network without weights or with some of them; only networks have a ``config.json``."""
    named = {
        name
        for index in part.glob("*.safetensors.index.json")
        for name in json.loads(index.read_bytes()).get("weight_map", {}).values()
    }
    found = any(path.suffix in (".safetensors", ".bin") for path in part.glob("*"))
    return (found or not (part / "config.json").exists()) and all((part / name).exists() for name in named)
