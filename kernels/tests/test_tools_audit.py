"""Compiles every Triton kernel of the catalog for GPUs that are not here, and holds it to the bars.

Each in bfloat16, or the dtype that it takes, for one of the GPUs by turns, and by turns in float32 or float16 for
another: `python -m leap_kernels audit` takes them all.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from apart import printed_by
from leap_kernels import _triton
from leap_kernels._catalog import OPS
from leap_kernels.tools import audit, main

KERNELS = [spec.name for op in OPS for spec in op.kernels]
NVIDIA = ("sm_80", "sm_90", "sm_100")
EXAMINE = """
import json
import torch
from leap_kernels._catalog import OPS
from leap_kernels.tools.audit import misses
from leap_kernels.tools.audit_compile import audited, examine
from leap_kernels.tools.gpus import TARGETS
for number, spec in enumerate(spec for op in OPS for spec in op.kernels):
    first, *others = audited(spec)
    if others and torch.float16 in spec.dtypes and number % 6 == 0:
        others = [torch.float16]
    for dtype in [first, *others][: 2 if number % 3 == 0 else 1]:
        line = examine(spec, dtype, TARGETS[(number // 6 + number + (dtype != first)) % 3])
        print(json.dumps({**line, "misses": misses(line)}))
"""
LINE: dict[str, Any] = {
    "kernel": "leap_update",
    "dtype": "bfloat16",
    "target": "sm_90",
    "spills": 0,
    "atomics": 0,
    "float64_instructions": 0,
    "launched_otherwise": [],
    "vector_bits": 128,
    "widths_agree": True,
    "bytes_ratio": 1.01,
    "sums_only": False,
    "rounded_stochastically": ["dst_ptr"],
    "roundings": {"out_ptr": "nearest even", "dst_ptr": "bits and cut"},
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return printed_by(EXAMINE, tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
@pytest.mark.triton
def test_every_kernel_meets_the_bars(lines) -> None:
    assert {line["kernel"] for line in lines} == set(KERNELS)
    assert {(line["dtype"], line["target"]) for line in lines} == {
        (dtype, target) for dtype in ("bfloat16", "float16", "float32") for target in NVIDIA
    }
    for line in lines:
        where = (line["kernel"], line["dtype"], line["target"])
        assert line["misses"] == [], where
        assert line["registers"] > 0, where
        # Sums must not depend on the order in which blocks finish.
        assert line["atomics"] == 0, where
        assert line["sums_only"] or 1 <= line["bytes_ratio"] <= 1.05, where
        assert line["roofline"] is None or line["roofline"]["status"] == "computed, not measured"


@pytest.mark.slow
@pytest.mark.triton
def test_half_the_bits_are_rounded_to_nearest_or_at_random(lines) -> None:
    found = {(line["kernel"], name): how for line in lines for name, how in line["roundings"].items()}
    assert len(found) > 30
    at_random = {kernel for (kernel, _), how in found.items() if "bits" in how}
    assert at_random == {
        "stochastic_round_",
        *(f"adamw_8bit_step_{many}{variant}" for many in ("", "many_") for variant in ("", "/any_offset")),
    }
    # Where a leap lands, the connector puts the latent of the rollout.
    copied = {place for place, how in found.items() if how == "copied"}
    assert copied == {("leap_update", "out_ptr")}
    assert {how for (kernel, _), how in found.items() if kernel not in at_random} == {"nearest even", "copied"}


@pytest.mark.triton
def test_one_op_for_every_target() -> None:
    lines = list(audit.audit("gelu_tanh"))
    assert [(line["kernel"], line["dtype"], line["target"]) for line in lines] == [
        (kernel, dtype, target)
        for kernel in ("gelu_tanh", "gelu_tanh/backward", "gelu_tanh/backward_and_again")
        for dtype in ("bfloat16", "float32")
        for target in (*NVIDIA, "gfx942")
    ]
    assert all(line["misses"] == [] and line["triton"] for line in lines)


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
        ({"bytes_ratio": 1.06}, ["bytes at most 1.05 x least"]),
        ({"sums_only": True, "vector_bits": 32, "bytes_ratio": None}, []),
        ({"roundings": {"out_ptr": "copied"}}, []),
        ({"roundings": {"out_ptr": "cut"}}, ["rounding (out_ptr: cut)"]),
        ({"roundings": {"out_ptr": "cut and nearest even"}}, ["rounding (out_ptr: cut and nearest even)"]),
        ({"roundings": {"out_ptr": "towards zero"}}, ["rounding (out_ptr: towards zero)"]),
        ({"roundings": {"dst_ptr": "cut"}}, ["rounding (dst_ptr: cut)"]),
        ({"roundings": {"dst_ptr": "nearest even"}}, ["rounding (dst_ptr: nearest even)"]),
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
    monkeypatch.setattr(audit, "audit", lambda op: iter([line]))
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
