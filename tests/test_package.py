"""leap-kernels as a distribution of its own, by itself and beside leapalign, which brings a copy."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from installed import bare_python, install, uninstall, wheel_of

ROOT = Path(__file__).parents[1]
KERNELS, LEAPALIGN = "leap-kernels", "leapalign"
SUM = "import torch, leap_kernels; print(leap_kernels.accumulate_(torch.ones(3), torch.ones(3)).tolist())"

pytestmark = pytest.mark.wheel


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> dict[str, Path]:
    kernels = wheel_of(ROOT / "kernels", tmp_path_factory.mktemp("kernels"), compiler=None)
    return {KERNELS: kernels, LEAPALIGN: wheel}


@pytest.fixture(scope="module")
def alone(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with nothing but the kernels."""
    python = bare_python(tmp_path_factory.mktemp("alone"))
    install(python, wheels[KERNELS])
    return python


def said(python: Path, code: str) -> str:
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False, cwd=python.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_by_itself_without_a_compiler(alone: Path) -> None:
    assert said(alone, SUM) == "[2.0, 2.0, 2.0]"
    assert "was not built" in said(alone, "from leap_kernels import explain; print(explain()[0].reason)")
    assert said(alone, "from importlib.util import find_spec; print(find_spec('leapalign'))") == "None"


@pytest.mark.native
@pytest.mark.slow
def test_by_itself_with_a_compiler(tmp_path: Path) -> None:
    # What it does not optimize, a compiler has done in a tenth of the time.
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o700)
    python = bare_python(tmp_path / "venv")
    wheel = wheel_of(ROOT / "kernels", tmp_path, compiler=compiler)
    # One for every Python from 3.10 on.
    assert "-cp310-abi3-" in wheel.name
    install(python, wheel)
    code = "import leap_kernels as k, torch\nwith k.use_backend('native', strict=True):\n    "
    assert said(python, code + "print(k.ema_update_(torch.ones(2), torch.zeros(2), 0.5).tolist())") == "[0.5, 0.5]"


def test_from_a_folder_of_the_repository(wheels: dict[str, Path], tmp_path: Path) -> None:
    """As `pip install git+https://...#subdirectory=kernels` takes it; what is committed, that is."""
    wheel = wheel_of(f"git+file://{ROOT}#subdirectory=kernels", tmp_path / "wheel", compiler=None)
    python = bare_python(tmp_path)
    install(python, wheel)
    assert wheel.name == wheels[KERNELS].name
    assert said(python, SUM) == "[2.0, 2.0, 2.0]"


def test_tests_stay_in_the_repository(wheels: dict[str, Path], tmp_path: Path) -> None:
    """Neither wheel installs them; the native library's own are sources that a build may ask for."""
    for wheel in wheels.values():
        with zipfile.ZipFile(wheel) as file:
            assert not [name for name in file.namelist() if "test" in name]
    build = f"from scikit_build_core.build import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], check=True, cwd=ROOT / "kernels", capture_output=True)
    (sources,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sources) as file:
        inside = [name.partition("/")[2] for name in file.getnames()]
    assert "leap_kernels/patch.py" in inside
    assert not [name for name in inside if name.startswith("tests")]


def test_it_needs_torch_alone(alone: Path) -> None:
    asked = f"from importlib.metadata import requires; print(requires('{KERNELS}'))"
    assert said(alone, asked) == "['torch>=2.6']"


@pytest.mark.parametrize("order", [(KERNELS, LEAPALIGN), (LEAPALIGN, KERNELS)], ids="-".join)
@pytest.mark.slow
def test_both_can_be_installed_and_the_first_removed(
    order: tuple[str, str], wheels: dict[str, Path], tmp_path: Path
) -> None:
    """Neither owns a file of the other."""
    python = bare_python(tmp_path)
    for name in order:
        install(python, wheels[name])
    trains = "import leapalign.trainer, leap_kernels; "
    at = "from pathlib import Path; print(Path(leap_kernels.__file__).parents[1].name)"
    if order[0] == LEAPALIGN:
        assert said(python, trains + at) == "site-packages"
    uninstall(python, order[0])
    assert said(python, SUM) == "[2.0, 2.0, 2.0]"
    if order[0] == KERNELS:
        assert said(python, trains + at) == "leapalign_bundled"


def test_kernels_of_another_version_are_refused(wheels: dict[str, Path], tmp_path: Path) -> None:
    """In a sentence, not by a name that is missing."""
    python = bare_python(tmp_path)
    install(python, wheels[LEAPALIGN], wheels[KERNELS])
    (metadata,) = (tmp_path / "lib").rglob("leap_kernels-*.dist-info/METADATA")
    metadata.write_text(metadata.read_text().replace("Version: 0.1.0", "Version: 0.0.9"))
    done = subprocess.run([python, "-c", "import leapalign"], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("as leapalign brings its own copy")
    assert "needs leap-kernels 0.1.0, and 0.0.9 is installed" in done.stderr


def test_both_are_of_one_version() -> None:
    lines = [(ROOT / folder / "pyproject.toml").read_text().splitlines() for folder in ("", "kernels")]
    ours, theirs = (next(line for line in text if line.startswith("version = ")) for text in lines)
    assert ours == theirs
