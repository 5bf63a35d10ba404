"""A place of their own for the tests: nothing of the caller's folder, home, caches and environment reaches them.

The environment is that of the session, since libraries read it as they are imported; processes inherit it. The current
folder is each test's own.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PLACE = "LEAPALIGN_TESTS_PLACE"
KEPT = (
    *("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "TMPDIR", "TEMP", "TMP"),
    *("SYSTEMROOT", "CC", "CXX", "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES", "LEAPALIGN_PROMPT_FILES"),
    *("CI", "NO_COLOR", "PY_COLORS", "TERM"),
)
"""Variables that say where the machine keeps things, and how pytest shall look; so do those of pytest itself."""


def leave_the_callers() -> None:
    """Makes the session's folder, with a home and caches that its processes share, and clears the environment."""
    if PLACE in os.environ:
        return  # a worker process: its parent did
    place = Path(tempfile.mkdtemp(prefix="leapalign-tests-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    kept = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith("PYTEST_")}
    home, caches = place / "home", place / "caches"
    home.mkdir()
    os.environ.clear()
    os.environ.update(kept)
    os.environ.update(
        {
            PLACE: str(place),
            "HOME": str(home),
            "USERPROFILE": str(home),
            "XDG_CACHE_HOME": str(caches),
            "HF_HOME": str(caches / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "HYPOTHESIS_STORAGE_DIRECTORY": str(caches / "hypothesis"),
            # More threads gain nothing at these sizes, and on a busy machine they wait for each other.
            "OMP_NUM_THREADS": "1",
        }
    )


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """Within the block the current folder is a new, empty one."""
    before = Path.cwd()
    folder = Path(tempfile.mkdtemp(dir=os.environ[PLACE]))
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        shutil.rmtree(folder, ignore_errors=True)
