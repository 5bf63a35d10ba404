"""Which cases of a test `make test` runs, and which only `make test-all`."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def some_slow(cases: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """``cases`` for `pytest.mark.parametrize`; all but the ``quick`` ones are marked ``slow``. A case of several
    arguments is a tuple."""
    found = list(cases)
    assert all(case in found for case in quick)
    return [case if case in quick else _slow(case) for case in found]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
