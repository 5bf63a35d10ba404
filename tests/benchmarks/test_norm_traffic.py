from __future__ import annotations

from pathlib import Path

from benchmarks.norm_traffic import measured

ROOT = Path(__file__).parents[2]


def test_the_page_has_these_figures() -> None:
    found = {line["code"]: line for line in measured()}
    page = " ".join((ROOT / "docs" / "gpu.md").read_text().split())
    theirs, rest, ours = (found[name] for name in ("diffusers", "diffusers, without its norms", "qk_norm_rope"))
    assert ours["saved"] == 0
    assert f"reads and writes {ours['moved']:.1f} bytes an element" in page
    assert f"diffusers' own code take {theirs['moved']:.1f} (" in page
    assert f"turning, which take {rest['moved']:.1f}." in page
