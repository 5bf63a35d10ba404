"""The house is as it says: imports run one way, rooms have a sentence, files are short, and the README has the map."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.parent for path in (ROOT / "leapalign").glob("*/__init__.py"))
SOURCES = sorted(
    path
    for folder in ("leapalign", "kernels", "benchmarks", "tests")
    for pattern in ("*.py", "*.cpp", "*.h")
    for path in (ROOT / folder).rglob(pattern)
)
LONGEST = 300


def test_imports_run_one_way_and_no_room_is_left_out() -> None:
    """By the contracts in pyproject.toml; in a process of its own, as it silences every logger that is there."""
    lint = "import sys; from importlinter.cli import lint_imports as lint; sys.exit(lint(no_cache=True, no_logo=True))"
    done = subprocess.run([sys.executable, "-c", lint], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_room_says_what_it_is(room: Path) -> None:
    said = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert said
    assert said.partition("\n")[0].endswith((".", "``."))


def test_the_map_in_the_readme_is_the_tree() -> None:
    """Every folder and file of the top floor stands there once, and nothing else does."""
    (block,) = re.findall(r"## Where things are\n.*?```\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    named = re.findall(r"^ *(leapalign/)?([a-z_]+(?:/|\.py))(?= )", block, flags=re.M)
    floor = {path.name for path in (ROOT / "leapalign").glob("*.py")} - {"__init__.py"}
    rooms = {f"{room.name}/" for room in ROOMS} | {"configs/"}
    assert sorted(name for prefix, name in named if prefix) == sorted(floor | rooms)


def test_tests_stand_in_rooms_of_the_same_names() -> None:
    rooms = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert rooms <= {*(room.name for room in ROOMS), "docs", "benchmarks"}


def test_the_kernels_tests_need_no_leapalign() -> None:
    """Nor does what they share with others."""
    shared = {path.stem: path for folder in ("tests/support", "kernels/tests") for path in (ROOT / folder).glob("*.py")}
    left, seen = sorted((ROOT / "kernels" / "tests").glob("test_*.py")), set()
    assert left
    while left:
        path = left.pop()
        for name in _imported(path) - seen:
            assert name != "leapalign", path
            seen.add(name)
            left += [shared[name]] if name in shared else []


def _imported(path: Path) -> set[str]:
    """The packages and modules of the top that a file imports, by name."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}
