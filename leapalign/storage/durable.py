"""Files that outlast a crash: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from leapalign.inputs.validation import UserError, brief
from leapalign.storage.faults import point


@contextlib.contextmanager
def writing(path: Path, then: str = "continue with --resume") -> Iterator[None]:
    """Within the block a full disk, or a folder that cannot be written, is a UserError that names ``path``.

    then: what to do once it can be.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else brief(error)
        raise UserError(f"cannot write '{path}' ({reason}); make room and check its permissions, then {then}") from None


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of ``path`` at the end of the block. Raises UserError."""
    partial = partial_of(path)
    with writing(path):
        try:
            yield partial
            sync(partial)
            rename(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def partial_of(path: Path) -> Path:
    """The name of ``path`` as long as it is not whole."""
    return path.with_name(f"{path.name}.partial")


def write_text(path: Path, text: str) -> None:
    """Writes the file ``path``, whole or not at all. Raises UserError."""
    with beside(path) as partial:
        partial.write_text(text, encoding="utf-8")


def rename(source: Path, target: Path) -> None:
    """Renames within a folder, to last."""
    point("rename")
    os.replace(source, target)
    point("renamed")
    sync(target.parent)


def make_folder(folder: Path) -> None:
    """Makes ``folder``, and those above it, to last."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders, and journals their names.
    point("sync")
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync` for ``folder`` and everything in it."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def require_space(folder: Path, size: int, what: str, remedy: str) -> None:
    """Raises UserError where the disk of ``folder``, made or not, has less than ``size`` bytes free.

    what: needs them, as a sentence begins. remedy: how it ends.
    """
    made = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(made).free
    if free < size:
        raise UserError(
            f"{what} needs {size / 2**30:.2f} GiB, and '{folder}' has {free / 2**30:.2f} GiB free; {remedy}"
        )
