"""What other libraries may say and do under the command line: nothing that nobody asked for."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def no_hub_code() -> Iterator[None]:
    """Within the block the package ``kernels`` is not there to be imported.

    Diffusers imports bitsandbytes, which on some processors would have it fetch code for 4-bit weights from the hub.
    """
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before


def quiet_libraries() -> None:
    """Loading bars and advice of other libraries would drown ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # It warns that the code it would have fetched is not there.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        # What goes wrong is told by the error that follows, in one sentence of ours.
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()


def growing_segments() -> None:
    """Has PyTorch's allocator on a GPU grow its segments of memory: gaps between blocks of fixed ones would be lost.

    Before the first use of a GPU, which is when PyTorch reads it. What the environment says itself is left as it is.
    """
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
