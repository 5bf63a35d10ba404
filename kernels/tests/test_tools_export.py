"""The exported folder, loaded by Hugging Face's `kernels` as its users would."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import leap_kernels
import pytest
import torch
from leap_kernels._catalog import OPS
from leap_kernels.tools import main
from leap_kernels.tools.export import BACKENDS, MODULE, NAME, VERSION, collect
from leap_kernels.tools.report import ToolError

# In a process of its own, where leap_kernels and leapalign cannot be imported.
LOAD = """
import json, sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("leap_kernels", "leapalign", "diffusers", "transformers"):
            raise ImportError(f"{name} is not to be had here")

sys.meta_path.insert(0, Refuse())
import torch
from kernels import get_local_kernel

loaded = get_local_kernel(Path(sys.argv[1]), backend="cpu")
x, velocity = (torch.randn(2, 5, 3, requires_grad=True) for _ in range(2))
target = torch.randn(2, 5, 3)
latents, distance = loaded.leap_update(x, velocity, torch.tensor([0.9, 0.8]), 0.5, target)
latents.sum().backward()
delta = torch.tensor([0.4, 0.3]).view(2, 1, 1)
assert torch.equal(latents, target)
assert torch.allclose(distance, (target - x + delta * velocity).abs().mean(dim=(1, 2)))
assert torch.allclose(velocity.grad, -delta.expand(2, 5, 3))
assert torch.allclose(loaded.euler_step(x, velocity, 0.9, 0.5), x - 0.4 * velocity)
print(json.dumps({"module": loaded.__name__, "all": loaded.__all__, "file": loaded.__file__}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("export") / "leap-kernels"
    assert main(["export", str(path)]) == 0
    return path


@pytest.mark.hub
def test_kernels_loads_the_folder_without_this_package(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LOAD, folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert Path(loaded["file"]).parent == folder / "build" / "torch-cpu"
    assert loaded["module"].startswith("_leap_kernels_cpu_")
    assert loaded["all"] == leap_kernels.__all__


@pytest.mark.hub
def test_two_copies_live_in_one_process(folder: Path) -> None:
    from kernels import get_local_kernel

    x = torch.randn(2, 3)
    loaded = get_local_kernel(folder, backend="cpu")
    assert loaded.leap_update is not leap_kernels.leap_update
    with loaded.use_backend("reference"):
        theirs, _ = loaded.leap_update(x, x, 0.9, 0.5)
        ours, _ = leap_kernels.leap_update(x, x, 0.9, 0.5)
    torch.testing.assert_close(theirs, ours)
    # An older `kernels` would import the folder of the kernel's name.
    spec = importlib.util.spec_from_file_location("by_name", folder / "build" / "torch-cpu" / MODULE / "__init__.py")
    by_name = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(by_name)
    assert by_name.__all__ == leap_kernels.__all__
    assert by_name.scale_gradient(x, 0.5).equal(x)


@pytest.mark.hub
def test_build_file_and_metadata_are_what_kernels_reads(folder: Path) -> None:
    from kernels._rust import Build, Digest, DigestAlgorithm

    from kernels import Metadata

    assert [str(backend) for backend in Build.open(folder).general.backends] == list(BACKENDS)
    variants = {path.name: Metadata.read_from_file(path / "metadata.json") for path in (folder / "build").iterdir()}
    assert variants.keys() == {f"torch-{backend}" for backend in BACKENDS}
    assert len({metadata.id for metadata in variants.values()}) == len(BACKENDS)
    for name, metadata in variants.items():
        assert metadata.id.isidentifier()
        assert (str(metadata.name), metadata.version, metadata.license) == (NAME, VERSION, "Apache-2.0")
        digest = Digest.hash_variant(DigestAlgorithm.SHA256, folder / "build" / name)
        metadata.digest.validate(digest)


def test_every_copy_is_the_package_itself(folder: Path) -> None:
    package = Path(leap_kernels.__file__).parent
    copies = [folder / "torch-ext" / MODULE, *(folder / "build").iterdir()]
    assert len(copies) == 1 + len(BACKENDS)
    for copy in copies:
        sources = {path.name: path.read_text() for path in copy.glob("*.py")}
        assert sources.keys() >= {f"{op.name.rstrip('_')}.py" for op in OPS} | {"__init__.py", "_dispatch.py"}
        assert sources == {name: (package / name).read_text() for name in sources}


def test_export_is_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    assert main(["export", str(tmp_path)]) == 0
    files = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {path: (folder / path).read_bytes() for path in files}


def test_this_folder_hides_no_package_of_the_name() -> None:
    """As pytest would have it, which takes `kernels` for the package of these tests."""
    spec = importlib.util.find_spec("kernels")
    assert spec is None or Path(__file__).parents[1] not in map(Path, spec.submodule_search_locations or ())


@pytest.mark.parametrize("line", ["import leapalign", "from diffusers import utils", "import numpy as np"])
def test_import_that_a_kernel_may_not_have_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("from . import _inner\nfrom ._other import name\nimport torch, os\n")
    (tmp_path / "_other.py").write_text("")
    (tmp_path / "_inner.py").write_text("import math")
    (tmp_path / "not_imported.py").write_text("import leapalign")
    assert collect(tmp_path).keys() == {"__init__.py", "_inner.py", "_other.py"}
    (tmp_path / "_inner.py").write_text(f"def f():\n    {line}")
    with pytest.raises(ToolError, match=r"_inner\.py imports \w+"):
        collect(tmp_path)


def test_used_folder_is_refused(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "mine.txt").write_text("keep")
    for folder in (str(tmp_path), "~"):
        assert main(["export", folder]) == 2
    assert main(["export", str(tmp_path / "mine.txt")]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
