"""What every test gets, and the only place that decides which tests are skipped."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import hypothesis
import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from leap_kernels import _native, _triton

# More threads gain nothing at these sizes, and on a busy machine they wait for each other.
torch.set_num_threads(1)
hypothesis.settings.register_profile("project", deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile("project")


def _no_cuda() -> str | None:
    return None if torch.cuda.is_available() else "no CUDA device"


# Marker -> why its tests cannot run here, or None.
SKIP_RULES: dict[str, Callable[[], str | None]] = {
    "cuda": _no_cuda,
    "hub": lambda: None if importlib.util.find_spec("kernels") else "Hugging Face's kernels package is not installed",
    "native": _native.unavailable,
    "triton": lambda: _triton.MISSING,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for marker, rule in SKIP_RULES.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        reason = rule() if marked else None
        for item in marked if reason else []:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
