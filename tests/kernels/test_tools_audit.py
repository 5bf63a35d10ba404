"""Compiles every Triton kernel of the catalog for GPUs that are not here, and holds it to the bars."""

from __future__ import annotations

import json
from typing import Any

import pytest
from leap_kernels import _triton
from leap_kernels._catalog import OPS
from leap_kernels.tools import audit, main

KERNELS = [spec.name for op in OPS for spec in op.kernels]
NVIDIA = ("sm_80", "sm_90", "sm_100")
KEYS = {
    "kernel",
    "target",
    "registers",
    "spills",
    "shared_bytes",
    "vector_bits",
    "bytes_per_element",
    "least_bytes_per_element",
    "bytes_ratio",
}
LINE: dict[str, Any] = {
    "kernel": "leap_update",
    "target": "sm_90",
    "spills": 0,
    "atomics": 0,
    "float64_instructions": 0,
    "launched_otherwise": [],
    "vector_bits": 128,
    "widths_agree": True,
    "bytes_ratio": 1.01,
}


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    return list(audit.audit())


@pytest.mark.triton
def test_every_kernel_is_compiled_for_every_target(lines) -> None:
    assert [(line["kernel"], line["target"]) for line in lines] == [
        (kernel, target) for kernel in KERNELS for target in (*NVIDIA, "gfx942")
    ]
    assert all(line.keys() >= KEYS for line in lines)


@pytest.mark.triton
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_meets_the_bars(lines, kernel: str) -> None:
    for line in lines:
        if line["kernel"] == kernel and line["target"] in NVIDIA:
            assert line["misses"] == [], line["target"]
            assert line["spills"] == 0
            assert line["vector_bits"] >= 128
            assert 1 <= line["bytes_ratio"] <= 1.02
            assert line["registers"] > 0
            assert line["roofline"] is None or line["roofline"]["status"] == "computed, not measured"


@pytest.mark.parametrize(
    ("change", "miss"),
    [
        ({}, []),
        ({"spills": 1}, ["spills"]),
        ({"atomics": 1}, ["atomics"]),
        ({"float64_instructions": 1}, ["no float64"]),
        ({"launched_otherwise": ["num_warps 1, not 4"]}, ["launched as in the catalog (num_warps 1, not 4)"]),
        ({"vector_bits": 64}, ["accesses of 128 bits"]),
        ({"vector_bits": None}, ["accesses of 128 bits"]),
        ({"widths_agree": False}, ["accesses of 128 bits"]),
        ({"bytes_ratio": 1.03}, ["bytes at most 1.02 x least"]),
        ({"target": "gfx942", "vector_bits": 64, "bytes_ratio": None, "widths_agree": None}, []),
    ],
)
def test_missed_bars_are_named(change: dict[str, Any], miss: list[str]) -> None:
    assert audit.misses({**LINE, **change}) == miss


@pytest.mark.parametrize(("missed", "code"), [([], 0), (["spills"], 1)])
def test_prints_lines_or_a_table_and_fails_on_a_miss(missed, code, monkeypatch, capsys) -> None:
    roofline = {"microseconds": 60.0, "gpu": "H100 SXM"}
    rest = {"registers": 32, "shared_bytes": 0, "bytes_per_element": 6.0, "least_bytes_per_element": 6}
    line = {**LINE, **rest, "occupancy": 1.0, "roofline": roofline, "misses": missed}
    monkeypatch.setattr(audit, "audit", lambda: iter([line]))
    assert main(["audit", "--json"]) == code
    assert json.loads(capsys.readouterr().out) == line
    assert main(["audit"]) == code
    out = capsys.readouterr().out
    assert "60.0 us on H100 SXM" in out
    assert "computed, not measured" in out
    assert ("misses: spills" in out) == bool(missed)


def test_missing_triton_is_said_in_one_sentence(monkeypatch, capsys) -> None:
    monkeypatch.setattr(_triton, "MISSING", "Triton cannot be imported (no module)")
    assert main(["audit"]) == 2
    assert "install triton" in capsys.readouterr().err


@pytest.mark.triton
def test_kernel_that_does_not_compile_is_said_in_one_sentence(monkeypatch, capsys) -> None:
    monkeypatch.setattr(audit, "__package__", "leap_kernels.no_such")
    assert main(["audit"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("leap_kernels: a kernel could not be audited: ")
    assert error.count("\n") == 1
