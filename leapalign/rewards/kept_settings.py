"""Settings of PyTorch that a process has one of, kept from a user's code: what changes them changes the whole run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

_log = logging.getLogger("leapalign")

SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
}
"""How each is read and set."""


@contextlib.contextmanager
def settings_kept(title: str, told: set[str]) -> Iterator[None]:
    """What the block changes of `SETTINGS` is set back, and told of once.

    title: of what runs in the block. told: names of settings that need no further word; those told of are added.
    """
    before = {name: read() for name, (read, _) in SETTINGS.items()}
    try:
        yield
    finally:
        for name, (read, set_to) in SETTINGS.items():
            value = read()
            if value == before[name]:
                continue
            set_to(before[name])
            if name not in told:
                told.add(name)
                _log.warning(
                    "%s sets %s to %s for the whole process: it is set back to %s each time; take that out",
                    title,
                    name,
                    value,
                    before[name],
                )
