"""kernels/docs/trainers.md keeps its word: both steps have the same gradients, and bytes are those of the results."""

from __future__ import annotations

import json
from collections.abc import Callable

import leap_kernels
import pytest
from pages import ROOT, blocks, text_of

from benchmarks.dropped_in import measured

PAGE = "kernels/docs/trainers.md"
CODE = compile("\n".join(blocks(PAGE, "python")), PAGE, "exec", dont_inherit=True)
RESULTS = ROOT / "benchmarks" / "results" / "dropped_in.jsonl"


def test_both_steps_have_the_same_gradients_and_weights() -> None:
    exec(CODE, {})


def half_a_step(step: Callable[..., object]) -> Callable[..., object]:
    return lambda x, v, sigma, sigma_next: step(x, v, sigma, (sigma + sigma_next) / 2)


def half_the_rate(step: Callable[..., object]) -> Callable[..., object]:
    return lambda *tensors, lr, **numbers: step(*tensors, lr=lr / 2, **numbers)


def weights_changed(patch: Callable[..., object]) -> Callable[..., object]:
    def changed(model: object) -> object:
        next(model.parameters()).data.mul_(1.001)
        return patch(model)

    return changed


@pytest.mark.parametrize(
    ("op", "wrong"), [("euler_step", half_a_step), ("adamw_8bit_step_", half_the_rate), ("patch", weights_changed)]
)
def test_the_page_fails_when_an_op_is_wrong(op: str, wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leap_kernels, op, wrong(getattr(leap_kernels, op)))
    with pytest.raises(AssertionError):
        exec(CODE, {})


ROWS = {
    "nothing": "nothing",
    "transformer": "the transformer's blocks",
    "both": "these, and the decoder's",
}


def test_figures_come_from_the_results() -> None:
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert [line["recomputed"] for line in lines] == list(ROWS)
    for line in lines:
        before, after = (line[f"{when}_bytes"] / 1e9 for when in ("before", "after"))
        row = f"| {ROWS[line['recomputed']]} | {before:.1f} | {after:.1f} | {line['ratio']:.2f} |"
        assert row in text_of(PAGE).splitlines()


@pytest.mark.parametrize("recomputed", ["nothing", "both"])
def test_the_patched_step_holds_less(recomputed: str) -> None:
    """At widths of FLUX.1-dev, of two blocks, on a small image."""
    line = measured(recomputed, side=64, num_layers=1, num_single_layers=1)
    assert line["after_bytes"] < line["before_bytes"]
