"""What every test gets, and the only place that decides which tests are skipped."""

# ruff: noqa: E402 -- the environment comes before what reads it as it is imported.

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator

import own_place

own_place.leave_the_callers()

import hypothesis
import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from leap_kernels import _native, _triton

torch.set_num_threads(1)
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("project")


def _no_bitsandbytes() -> str | None:
    """Ask for the version that `adamw_8bit_step_` is the same as, and for a processor where that is so."""
    try:
        version = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return "bitsandbytes is not installed"
    if version != "0.50.2":
        return f"bitsandbytes {version} may compute otherwise than 0.50.2"
    fused = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    return None if fused else "bitsandbytes rounds otherwise without AVX2"


def _no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA device"


def _no_data() -> str | None:
    missing = [name for name in ("pyarrow", "datasets") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def _no_interpreter() -> str | None:
    """Ask for Triton on CPU tensors; a process either interprets or compiles."""
    return _triton.unavailable(torch.device("cpu"))


def _no_large_gpu() -> str | None:
    if not torch.cuda.is_available():
        return _no_cuda()
    free = torch.cuda.mem_get_info()[0] / 2**30
    return None if free >= 40 else f"the CUDA device has {free:.0f} GiB free"


def _no_open_clip() -> str | None:
    """Ask that it can be imported: a torchvision for CUDA beside a PyTorch for CPUs breaks it."""
    try:
        importlib.import_module("open_clip")
    except (ImportError, RuntimeError) as error:
        return f"open_clip cannot be imported ({error})"
    return None


def _no_sanitizers() -> str | None:
    """Ask for what building the native core's tests takes: CMake, and a C++ compiler that links sanitizers."""
    if shutil.which("cmake") is None or shutil.which("ctest") is None:
        return "CMake is not installed"
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        return "no C++ compiler"
    command = [compiler, "-xc++", "-fsanitize=address,undefined", "-o", os.devnull, "-"]
    linked = subprocess.run(command, input="int main() {}", capture_output=True, text=True, check=False)
    return None if linked.returncode == 0 else f"{compiler} cannot link sanitizers"


def _no_wheel() -> str | None:
    """Ask for what builds one without a network."""
    if shutil.which("cmake") is None:
        return "CMake is not installed"
    # Not pip itself: looking for it has setuptools step back in this process, and PyTorch's compiler needs setuptools.
    return None if importlib.util.find_spec("scikit_build_core") else "scikit-build-core is not installed"


# Marker -> why its tests cannot run here, or None.
SKIP_RULES: dict[str, Callable[[], str | None]] = {
    "bitsandbytes": _no_bitsandbytes,
    "cuda": _no_cuda,
    "data": _no_data,
    "hub": lambda: None if importlib.util.find_spec("kernels") else "Hugging Face's kernels package is not installed",
    "interpreter": _no_interpreter,
    "large_gpu": _no_large_gpu,
    "liger": lambda: None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed",
    "native": _native.unavailable,
    "open_clip": _no_open_clip,
    "posix": lambda: None if os.name == "posix" else "not Linux or macOS",
    "prompt_files": lambda: None if os.environ.get("LEAPALIGN_PROMPT_FILES") else "LEAPALIGN_PROMPT_FILES is not set",
    "sanitizers": _no_sanitizers,
    "triton": lambda: _triton.MISSING,
    "wheel": _no_wheel,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, rule in SKIP_RULES.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = rule() if marked else None
        for item in marked if reason else []:
            item.add_marker(pytest.mark.skip(reason=reason))


REFUSED_WITHOUT_NATIVE_CODE = "memory.optimizer host without native code"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    return (yield from _skipped_where_refused())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    return (yield from _skipped_where_refused())


def _skipped_where_refused() -> Iterator[None]:
    """Skip what trains with the optimizer in host memory, which is refused where the native library is missing."""
    try:
        return (yield)
    except Exception as error:
        reason = _native.unavailable()
        if reason and REFUSED_WITHOUT_NATIVE_CODE in str(error):
            pytest.skip(f"memory.optimizer=host is refused: {reason}")
        raise


@pytest.fixture(autouse=True, scope="session")
def _no_callers_folder() -> Iterator[None]:
    """For fixtures that several tests share."""
    with own_place.own_folder():
        yield


@pytest.fixture(autouse=True)
def _own_folder() -> Iterator[None]:
    with own_place.own_folder():
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
