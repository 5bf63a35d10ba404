"""docs/study.md has the tables of the results."""

from __future__ import annotations

from benchmarks.study.__main__ import PAGE, RESULTS, read
from benchmarks.study.plan import Study
from benchmarks.study.tables import filled


def test_the_tables_come_from_the_results() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "### At equal rollouts" in page
    assert filled(page, Study.read(), read(RESULTS)) == page
