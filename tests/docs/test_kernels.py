"""kernels/README.md keeps its word: its examples run, its ops exist, its tables say what the results say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import leap_kernels
import pytest
from leap_kernels._catalog import OPS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "kernels" / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("example", EXAMPLES, ids=["training-loop", "sampler", "model"])
def test_example_runs(example: str) -> None:
    assert "assert_close" in example
    exec(compile(example, str(PAGE), "exec"), {"__name__": "example"})


def test_examples_fail_when_an_op_is_wrong(monkeypatch) -> None:
    loop, sampler, model = EXAMPLES
    correct = leap_kernels.leap_update
    monkeypatch.setattr(leap_kernels, "leap_update", lambda x, v, a, b, target: correct(x, v, b, a, target))
    with pytest.raises(AssertionError):
        exec(loop, {})
    monkeypatch.setattr(leap_kernels, "euler_step", lambda x, v, a, b, u, scale: x + (b - a) * v)
    with pytest.raises(AssertionError):
        exec(sampler, {})
    monkeypatch.setattr(leap_kernels, "patch", lambda model: model.norm_out.linear.weight.data.zero_())
    with pytest.raises(AssertionError):
        exec(model, {})


def test_every_op_has_a_line_and_every_line_an_op() -> None:
    named = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), flags=re.M)
    assert sorted(set(named)) == sorted(op.name for op in OPS)
    assert all(name in leap_kernels.__all__ for name in named)


@pytest.mark.parametrize(("path", "count"), [(PAGE, 3), (ROOT / "README.md", 1)])
def test_tables_come_from_the_results(tables: ModuleType, path: Path, count: int) -> None:
    page = path.read_text()
    assert page.count("<!-- table: ") == count
    assert tables.filled(page) == page


def test_results_cover_the_catalog() -> None:
    results = ROOT / "benchmarks" / "results"
    audited = [json.loads(line) for line in (results / "audit.jsonl").read_text().splitlines()]
    assert {line["kernel"] for line in audited} == {spec.name for op in OPS for spec in op.kernels}
    rooflines = [line["roofline"] for line in audited if line["roofline"]]
    assert {roofline["status"] for roofline in rooflines} == {"computed, not measured"}
    measured = [json.loads(line) for line in (results / "bench.jsonl").read_text().splitlines()]
    # Steps are measured beside bitsandbytes, by benchmarks/host_adamw.py.
    elsewhere = {"adamw_8bit_step_", "adamw_8bit_step_many_", "total_norm"}
    assert {line["op"] for line in measured} == {op.name for op in OPS} - elsewhere


def test_figures_of_the_eight_bit_step_come_from_its_results() -> None:
    line = json.loads((ROOT / "benchmarks" / "results" / "host_adamw.jsonl").read_text())
    ours, theirs = (line[f"{name}_millions_per_second"] for name in ("ours", "bitsandbytes"))
    figures = f"{ours:.0f} million parameters a second on {line['threads']} threads of an {line['device']}"
    page = " ".join(PAGE.read_text().split())
    assert f"{figures}, {line['times_faster']:.1f} times as many as bitsandbytes ({theirs:.0f} million)" in page


def test_figures_of_the_patched_iteration_come_from_its_results() -> None:
    line = json.loads((ROOT / "benchmarks" / "results" / "patched_iteration.jsonl").read_text())
    figures = f"takes {line['eager_s']:.2f} seconds of the processor, and patched {line['patched_s']:.2f}"
    page = " ".join(PAGE.read_text().split())
    assert f"{figures}: the median of the ratios is {line['factor']:.2f}." in page


def test_tables_are_rewritten_from_other_results(tables: ModuleType, tmp_path: Path) -> None:
    for name in ("audit", "bench"):
        lines = (ROOT / "benchmarks" / "results" / f"{name}.jsonl").read_text()
        (tmp_path / f"{name}.jsonl").write_text(
            lines.replace('"least_bytes_per_element": 6', '"least_bytes_per_element": 7')
        )
    page = "before\n<!-- table: audit -->\nold\n<!-- end -->\nafter"
    filled = tables.filled(page, tmp_path)
    assert filled.startswith("before\n<!-- table: audit -->\nTriton ")
    assert filled.endswith("|\n<!-- end -->\nafter")
    assert "old" not in filled
    assert "| 7 |" in filled
