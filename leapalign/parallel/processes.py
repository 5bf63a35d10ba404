"""The processes of a run: which one this is, and what all of them agree on. One alone agrees with itself, at no cost.

Whoever calls a function that asks the others has them wait until each has called it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Mapping
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from leapalign.inputs.validation import UserError

T = TypeVar("T")

ENDED = 1
"""Exit code of a process that ends because another one did."""
_PATIENCE = datetime.timedelta(hours=2)
"""The longest that one process waits for another, which may be writing a checkpoint."""


def count() -> int:
    """How many processes share the run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if count() > 1 else 0


def first() -> bool:
    """Whether this is the one that writes."""
    return rank() == 0


def share(images: int) -> int:
    """How many of so many ``images`` a process has at once."""
    return max(1, images // count())


def gathered(value: T) -> list[T]:
    """The values of all processes, in order."""
    if count() == 1:
        return [value]
    found: list[T | None] = [None] * count()
    dist.all_gather_object(found, value)
    return cast(list[T], found)


def any_of(one: bool) -> bool:
    """Whether ``one`` holds in any process."""
    return any(gathered(one))


def wait() -> None:
    """Returns when all processes are here."""
    gathered(None)


def rows_of_all(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of each name the rows ``(n, ...)`` of all processes, in order; in host memory, where there are several."""
    if count() == 1:
        return dict(columns)
    parts = gathered({name: column.cpu() for name, column in columns.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in columns}


def mean_of_all(values: Tensor) -> float:
    """The mean of the elements of ``values`` in all processes, however many each has."""
    if count() == 1:
        return float(values.mean())
    parts = gathered((float(values.double().sum()), values.numel()))
    return sum(total for total, _ in parts) / max(1, sum(size for _, size in parts))


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within the block this process is one of those that torchrun started, where it did.

    The first of them that fails says why; the others end with `ENDED`, in silence. Raises UserError where this one
    finds that another was killed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    _join()
    try:
        yield
    except Exception as error:
        if not _first_to_fail():
            raise SystemExit(ENDED) from None
        if _parted(error):
            raise UserError(
                f"another of the {count()} processes was killed, as the system does where memory runs out, or its "
                "machine is gone; look into what torchrun says of it, then continue with --resume"
            ) from None
        raise
    # Not after an error: the others may be waiting for what this process will not do.
    dist.destroy_process_group()


def _join() -> None:
    """Raises UserError where this machine has fewer GPUs than processes."""
    if not (dist.is_available() and dist.is_gloo_available()):
        raise UserError("this PyTorch is built without torch.distributed; install another, or train with one process")
    backend = "gloo"
    if torch.cuda.is_available():
        number, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= gpus:
            raise UserError(f"there are more processes than the {gpus} GPUs of this machine; start {gpus} of them")
        torch.cuda.set_device(number)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)


def _first_to_fail() -> bool:
    """Whether no other process has said yet why the run ends; torchrun keeps the count, whoever is gone."""
    try:
        return dist.distributed_c10d._get_default_store().add("leapalign/failed", 1) == 1
    except RuntimeError:
        return True  # who kept the count is gone, too


def _parted(error: Exception) -> bool:
    """Whether ``error`` says no more than that another process is not there."""
    said = str(error).lower()
    lost = ("closed by peer", "reset by peer", "broken pipe", "connection refused", "remote process has terminated")
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or any(one in said for one in lost))
