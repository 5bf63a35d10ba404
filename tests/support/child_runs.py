"""Runs in processes of their own, which may be killed: forked from one that has imported what takes long."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch

from leapalign.config import Config
from leapalign.runs.opening import opened_run
from leapalign.storage import faults

_CONTEXT = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
_CONTEXT.set_forkserver_preload(
    [
        "leapalign.runs.opening",
        "leapalign.optimizers",
        "leapalign.models.flux",
        "leapalign.rewards.pickscore",
        "diffusers.models.transformers.transformer_flux",
        "diffusers.pipelines.flux.pipeline_flux",
        "transformers.models.clip.modeling_clip",
        "transformers.models.t5.modeling_t5",
    ]
)


def started(target: Callable[..., None], *arguments: Any) -> Any:
    """A running process of ``target(*arguments)``."""
    process = _CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def exit_code(process: Any) -> int:
    """Waits for a process; negative: the signal that killed it."""
    process.join(timeout=1200)  # long: on a busy machine it may take minutes
    if process.exitcode is None:
        process.kill()
        raise AssertionError("the process does not end")
    return int(process.exitcode)


def train(config: Config, resume: bool = False, fault: str | None = None) -> None:
    """Trains the run to its end, or to the fault; for `started`."""
    torch.set_num_threads(1)
    if fault is not None:
        os.environ[faults.VARIABLE] = fault
    with opened_run(config, resume) as run:
        run.train()
