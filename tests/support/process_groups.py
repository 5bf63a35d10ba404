"""Command lines run by several processes at once, as torchrun starts them, forked from one that has imported much."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import child_runs
import torch
from torch.distributed import TCPStore

from leapalign.cli import main
from leapalign.config import Config, save_config
from leapalign.storage import faults


@dataclass(frozen=True)
class Group:
    """Processes, and the store by which they find each other: with who started them, as torchrun has it."""

    processes: list[Any]
    store: TCPStore

    def exit_codes(self) -> list[int]:
        """All of them within 30 seconds of the first one that failed, if one does."""
        while self.running and not any(process.exitcode for process in self.processes):
            time.sleep(0.05)
        deadline = time.monotonic() + 30
        for process in self.processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
        left = self.running
        for process in left:
            process.kill()
        assert not left, "a process goes on without the others"
        return [int(process.exitcode) for process in self.processes]

    @property
    def running(self) -> list[Any]:
        return [process for process in self.processes if process.exitcode is None]


def group(target: Callable[..., None], count: int, arguments: Callable[[int], tuple[Any, ...]]) -> Group:
    """``count`` processes of ``target(*arguments(rank), variables)``; the last are what torchrun would tell each."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    at = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes = []
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), **at}
        processes.append(child_runs.started(target, *arguments(rank), place if count > 1 else {}))
    return Group(processes, store)


def command(words: list[str], said: Path, fault: str | None, variables: dict[str, str]) -> None:
    """Runs ``leapalign`` with ``words``, what it says on stderr going to ``said``; for `child_runs.started`."""
    torch.set_num_threads(1)
    os.environ.update(variables)
    if fault is not None:
        os.environ[faults.VARIABLE] = fault
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.exit(main(words))


def begun(words: list[str], count: int, place: Path, faulty: dict[int, str] | None = None) -> Group:
    """``count`` processes of one command line. faulty: by rank, the `storage.faults` point where that one dies."""
    place.mkdir(parents=True, exist_ok=True)
    faults_of = faulty or {}
    return group(command, count, lambda rank: (words, place / f"said-{rank}.txt", faults_of.get(rank)))


def said(place: Path) -> str:
    """What all of them said on stderr."""
    return "".join(path.read_text() for path in sorted(place.glob("said-*.txt")))


def trained(config: Config, count: int, place: Path, *, resume: bool = False) -> Path:
    """The folder of a run by ``count`` processes, which end as they should."""
    words = ["train", "--resume", config.output] if resume else ["train", "--config", written(config, place)]
    codes = begun(words, count, place).exit_codes()
    assert codes == [0] * count, said(place)
    return Path(config.output)


def written(config: Config, place: Path) -> str:
    """The file of ``config`` in ``place``."""
    place.mkdir(parents=True, exist_ok=True)
    save_config(config, place / "config.yaml")
    return str(place / "config.yaml")
