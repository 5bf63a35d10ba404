"""Code that runs in a process of its own, where Triton compiles and does not interpret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def printed_by(code: str, cache: Path, *arguments: str, **variables: str) -> list[Any]:
    """The JSON lines that ``code`` prints, given ``arguments`` and more environment ``variables``.

    What it compiles goes to ``cache``.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(cache), **variables}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
