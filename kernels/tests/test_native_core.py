"""Builds the native core with sanitizers and runs its own tests, which stop at any bad address or undefined step."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "native"


@pytest.mark.sanitizers
@pytest.mark.slow
def test_core_under_sanitizers(tmp_path: Path) -> None:
    for command in (
        ["cmake", "-S", str(SOURCES), "-B", str(tmp_path), "-DLEAP_TESTS=ON", "-DLEAP_SANITIZE=ON"],
        ["cmake", "--build", str(tmp_path)],
        ["ctest", "--test-dir", str(tmp_path), "--output-on-failure", "--no-tests=error"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
