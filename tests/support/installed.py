"""Environments with nothing in them but wheels of this checkout, and what those need from here."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def wheel_of(sources: Path | str, folder: Path, compiler: Path | None) -> Path:
    """Build a wheel of what pip is told into ``folder``; without a C++ compiler it is sooner done."""
    build = [*PIP, "wheel", str(sources), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run(build, check=True, env={**os.environ, "CXX": str(compiler or "none")})
    (wheel,) = folder.glob("*.whl")
    return wheel


def bare_python(folder: Path) -> Path:
    """The Python of a new environment, which finds the packages that are installed here, but not this checkout."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", asked], check=True, capture_output=True, text=True).stdout.strip()
    # Of a folder named in such a file, files like it are not read: the hook of an editable install has no say.
    here = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    Path(packages, "here.pth").write_text("\n".join(here))
    return python


def install(python: Path, *wheels: Path) -> None:
    """Install wheels, and nothing else."""
    pip = [*PIP, "--python", str(python), "install", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*pip, *map(str, wheels)], check=True)


def uninstall(python: Path, distribution: str) -> None:
    """Remove a distribution."""
    subprocess.run([*PIP, "--python", str(python), "uninstall", "--yes", distribution], check=True)
