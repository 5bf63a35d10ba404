"""Starts the processes of a run on this machine, by torchrun's own launcher."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from leapalign.inputs.validation import UserError


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Runs ``leapalign`` with ``arguments`` in so many ``processes``.

    Returns the exit code of the first that failed, with which the others are ended, or 0. Raises UserError where it was
    killed from outside.
    """
    # As many threads as the machine has, not as many in each.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "leapalign.cli", *arguments)
    except SignalException as error:
        return 128 + int(error.sigval)  # as a shell has it; the processes were asked to stop, and have
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode  # it has said why
        raise UserError(
            f"process {number} of {processes} was ended by {signal.Signals(-failure.exitcode).name}, as the system "
            "does where memory runs out, and the others with it; continue with --resume"
        ) from None
    return 0
