"""Command lines run by several processes at once, as torchrun starts them, forked from one that has imported much."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import child_runs
import torch

from leapalign.cli import main
from leapalign.config import Config, save_config
from leapalign.storage import faults


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a process."""
    at = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), **at}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return int(taken.getsockname()[1])


def command(words: list[str], said: Path, variables: dict[str, str]) -> None:
    """Runs ``leapalign`` with ``words``, what it says on stderr going to ``said``; for `child_runs.started`."""
    torch.set_num_threads(1)
    os.environ.update(variables)
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.exit(main(words))


def begun(words: list[str], count: int, place: Path, faulty: dict[int, str] | None = None) -> list[Any]:
    """``count`` processes of one command line. faulty: by rank, the `storage.faults` point where that one dies."""
    place.mkdir(parents=True, exist_ok=True)
    port, processes = free_port(), []
    for rank in range(count):
        variables = environment(rank, count, port) if count > 1 else {}
        if faulty and rank in faulty:
            variables[faults.VARIABLE] = faulty[rank]
        processes.append(child_runs.started(command, words, place / f"said-{rank}.txt", variables))
    return processes


def ended(processes: list[Any]) -> list[int]:
    """Exit codes, all of them within 30 seconds of the first one that failed, if one does."""
    while not any(process.exitcode for process in processes) and any(process.exitcode is None for process in processes):
        time.sleep(0.05)
    deadline = time.monotonic() + 30
    for process in processes:
        process.join(timeout=max(0.0, deadline - time.monotonic()))
    left = [process for process in processes if process.exitcode is None]
    for process in left:
        process.kill()
    assert not left, "a process goes on without the others"
    return [int(process.exitcode) for process in processes]


def said(place: Path) -> str:
    """What all of them said on stderr."""
    return "".join(path.read_text() for path in sorted(place.glob("said-*.txt")))


def trained(config: Config, count: int, place: Path, *, resume: bool = False) -> Path:
    """The folder of a run by ``count`` processes, which end as they should."""
    words = ["train", "--resume", config.output] if resume else ["train", "--config", written(config, place)]
    codes = ended(begun(words, count, place))
    assert codes == [0] * count, said(place)
    return Path(config.output)


def written(config: Config, place: Path) -> str:
    """The file of ``config`` in ``place``."""
    place.mkdir(parents=True, exist_ok=True)
    save_config(config, place / "config.yaml")
    return str(place / "config.yaml")
