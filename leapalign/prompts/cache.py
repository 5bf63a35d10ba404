"""Embeddings of prompts on disk: encoded once, one text encoder at a time, read back row by row.

``manifest.json`` says of which model they are; ``shards/<n>-<encoder>.safetensors`` hold a row for each of some prompts
and, under `HASHES`, the prompts' sha256. Shards are written in ``unfinished/`` and renamed, so that they are whole or
absent.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from leapalign.config import ModelConfig
from leapalign.inputs.validation import UserError, brief, validated
from leapalign.models import text_tokens
from leapalign.models.embeddings import PromptEmbeddings
from leapalign.models.folder import read_index
from leapalign.models.text_encoders import fingerprint
from leapalign.storage.embedded import resolve
from leapalign.storage.folder_lock import LOCK, OWNER, run_lock
from leapalign.storage.modes import save_file

MANIFEST, SHARDS, UNFINISHED = "manifest.json", "shards", "unfinished"
HASHES, HASH_BYTES = "sha256", 32
DIGITS = 6
REMEDY = "run leapalign cache --config CONFIG --prompts FILE --output"


def hash_of(prompt: str) -> bytes:
    """The `HASH_BYTES` by which a prompt is found."""
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class Manifest:
    """Whose embeddings a cache holds."""

    model: str
    """Absolute folder, or hub id."""
    pipeline: str
    """The class of the model's pipeline."""
    fingerprint: str | None
    """Of the text encoders' files, where they were there to be read."""
    dtype: str
    """Of the text encoders."""
    max_sequence_length: int | None = None
    """Most tokens of a prompt; None, in older ones: as the model's own pipeline."""
    quantization: str | None = None
    """Of the text encoders' matrices."""
    encoders: list[dict[str, list[int]]] | None = None
    """What each text encoder gives, with the shape and so the text length of a row; None until all have run."""

    @classmethod
    def of(cls, config: ModelConfig, dtype: str, quantization: str | None) -> Manifest:
        """For the model that ``config`` names. Raises UserError where it cannot be read."""
        path = resolve(config.path)
        return cls(_absolute(path), _pipeline(path), fingerprint(path), dtype, text_tokens(config), quantization)

    def is_of(self, config: ModelConfig) -> bool:
        """Whether the model's text encoders are those of the cache; where some are gone, whether its path is.

        A folder that has none takes those of any model of its pipeline.
        """
        path = resolve(config.path)
        if self.pipeline != _pipeline(path):
            return False
        found = fingerprint(path)
        if self.fingerprint and found:
            return self.fingerprint == found
        bare = Path(path).is_dir() and not any(Path(path).glob("text_encoder*"))
        return bare or self.model == _absolute(path)


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def _pipeline(path: str) -> str:
    return str(read_index(path).get("_class_name"))


class PromptCache:
    """One such folder. Raises UserError for what cannot be read or written, and for text encoders of another model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def is_begun(self) -> bool:
        """Whether it may hold embeddings."""
        return (self.folder / MANIFEST).exists()

    def size(self) -> int:
        """Bytes of all shards."""
        return sum(path.stat().st_size for path in (self.folder / SHARDS).glob("*.safetensors"))

    def manifest(self, config: ModelConfig) -> Manifest:
        """What the folder holds, which must be of the model that ``config`` names."""
        path = self.folder / MANIFEST
        try:
            values = json.loads(path.read_bytes())
        except OSError:
            raise UserError(f"'{self.folder}' is no prompt cache; {REMEDY} {self.folder}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"'{path}' is damaged ({brief(error)}); delete its folder") from None
        if not isinstance(values, Mapping):
            raise UserError(f"'{path}' is damaged; delete its folder")
        manifest = validated(Manifest, values, str(path))
        if not manifest.is_of(config):
            raise UserError(
                f"the prompt cache '{self.folder}' is of the text encoders of '{manifest.model}', not of those of "
                f"'{config.path}'; use another folder"
            )
        wanted = text_tokens(config)
        held = manifest.max_sequence_length or text_tokens(dataclasses.replace(config, max_sequence_length=None))
        if held != wanted:
            raise UserError(
                f"the prompt cache '{self.folder}' has {held} tokens of a prompt, not {wanted}; set "
                f"model.max_sequence_length to {held}, or use another folder"
            )
        return manifest

    @contextmanager
    def being_filled(self) -> Iterator[None]:
        """Within the block no other process fills the folder, which is made where there is none.

        Raises UserError where one does, and where the folder holds files of something else.
        """
        own = {MANIFEST, SHARDS, UNFINISHED, LOCK, OWNER}
        with self._writing():
            if self.folder.exists() and {path.name for path in self.folder.iterdir()} - own:
                raise UserError(f"'{self.folder}' holds files of something else; use another folder")
            self.folder.mkdir(parents=True, exist_ok=True)
        with run_lock(self.folder, "filled"):
            yield

    def begin(self, config: ModelConfig, dtype: str, quantization: str | None) -> Manifest:
        """The manifest of a folder to be filled by text encoders of so many bits, a new one where there is none yet."""
        # Where its first text encoder could not run it is as good as new.
        if self.is_begun() and any((self.folder / SHARDS).glob("*.safetensors")):
            manifest = self.manifest(config)
            if manifest.dtype != dtype:
                raise UserError(
                    f"the prompt cache '{self.folder}' is in {manifest.dtype}, and here text encoders run in {dtype}; "
                    "use another folder"
                )
            if manifest.quantization != quantization:
                held, asked = (kind or "no quantization" for kind in (manifest.quantization, quantization))
                raise UserError(
                    f"the prompt cache '{self.folder}' is of text encoders with {held}, not {asked}; use another folder"
                )
        else:
            manifest = Manifest.of(config, dtype, quantization)
        with self._writing():
            shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)  # of a run that was killed
            for name in (SHARDS, UNFINISHED):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        self.write_manifest(manifest)
        return manifest

    def write_manifest(self, manifest: Manifest) -> None:
        with self._writing():
            partial = self.folder / UNFINISHED / MANIFEST
            partial.write_text(json.dumps(dataclasses.asdict(manifest), indent=2) + "\n", encoding="utf-8")
            partial.replace(self.folder / MANIFEST)

    def shards(self, encoder: int) -> list[Path]:
        """Of the text encoder of that number, in the order of writing."""
        return sorted((self.folder / SHARDS).glob(f"{'[0-9]' * DIGITS}-{encoder}.safetensors"))

    def next_shard(self, encoder: int) -> Path:
        """Where the text encoder's next shard belongs."""
        written = self.shards(encoder)
        number = int(written[-1].name[:DIGITS]) + 1 if written else 0
        return self.folder / SHARDS / f"{number:0{DIGITS}d}-{encoder}.safetensors"

    def held(self, encoder: int) -> set[bytes]:
        """Hashes of what the text encoder has done; shards that are damaged are deleted."""
        found: set[bytes] = set()
        for shard in self.shards(encoder):
            try:
                found.update(hashes_in(shard))
            except UserError:
                with self._writing():
                    shard.unlink()
        return found

    def row_shapes(self, encoder: int) -> dict[str, list[int]]:
        """What the text encoder gives for a prompt, by its first shard."""
        with opened(self.shards(encoder)[0]) as file:
            return {name: file.get_slice(name).get_shape()[1:] for name in parts_in(file)}

    def add(self, encoder: int, hashes: Sequence[bytes], embeddings: PromptEmbeddings) -> None:
        """Writes a shard of ``len(hashes)`` rows."""
        final = self.next_shard(encoder)
        partial = self.folder / UNFINISHED / final.name
        joined_hashes = torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.uint8)
        rows = {name: part.contiguous() for name, part in embeddings.parts.items()}
        with self._writing():
            save_file({**rows, HASHES: joined_hashes.view(-1, HASH_BYTES)}, partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())  # or a power failure could leave a renamed file empty
            partial.replace(final)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot write the prompt cache '{self.folder}' ({brief(error)}); make room or use another folder"
            ) from None


def hashes_in(shard: Path) -> list[bytes]:
    """Of a shard's rows, in their order. Raises UserError where the file is damaged."""
    with opened(shard) as file:
        joined_hashes = file.get_tensor(HASHES).numpy().tobytes()
    return [joined_hashes[start : start + HASH_BYTES] for start in range(0, len(joined_hashes), HASH_BYTES)]


@contextmanager
def opened(shard: Path) -> Iterator[Any]:
    try:
        with safe_open(shard, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"shard '{shard}' of the prompt cache is damaged ({brief(error)}); {REMEDY} {shard.parents[1]}"
        ) from None


def parts_in(file: Any) -> list[str]:
    return [name for name in file.keys() if name != HASHES]  # noqa: SIM118 -- it is no mapping
