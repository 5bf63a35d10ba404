from __future__ import annotations

import pytest
import torch

from benchmarks.activation_memory import measure
from leapalign.memory.residency import host_memory
from leapalign.planning.ledger import StorageLedger


def test_ledger_counts_what_backward_keeps() -> None:
    """By hand, in units of a 100 x 100 float32 matrix (40,000 bytes)."""
    matrix = 40_000
    x, weight = torch.randn(100, 100), torch.randn(100, 100, requires_grad=True)
    with StorageLedger() as ledger:
        ledger.exclude(x, weight)
        hidden = (x @ weight).relu()  # the product is freed: relu keeps its result
        assert ledger.live == matrix
        assert ledger.peak == 2 * matrix
        view = hidden.view(-1)  # shares storage
        assert ledger.live == matrix
        loss = view.square().sum()
        loss.backward()
        del hidden, view, loss
        assert ledger.live == matrix, "the weight's gradient stays"


def test_what_is_excluded_later_is_taken_out() -> None:
    """From where it was counted, device or host, once; a peak that it was part of stays."""
    matrix = 40_000
    with StorageLedger() as ledger:
        on_device = torch.zeros(100, 100)
        with host_memory("gradients"):
            on_host = torch.zeros(100, 100)
        ledger.exclude(on_device, on_host, on_device.view(-1))
        assert (ledger.live, ledger.host.total) == (0, 0)
        assert ledger.peak == matrix
        doubled = 2 * on_device
        assert ledger.live == ledger.peak == matrix
        del on_device, on_host
        assert ledger.live == matrix, "they are gone once"
        ledger.count(doubled, role="weights")
        assert ledger.device.live["weights"] == ledger.live == matrix


def test_staged_backward_needs_at_most_0_6_of_the_inline_graph() -> None:
    """On the tiny FLUX; the two gradients are the same. Its decoder keeps more than its transformer, and is freed."""
    figures = measure(batch_size=16)
    assert figures["ratio"] <= 0.85
    assert figures["ratio_decoding_one_at_a_time"] <= 0.4
    assert figures["ratio_without_reward"] <= 0.6
    assert figures["sampler_to_step_ratio"] <= 1.1, "exact backpropagation through 25 steps, a step's graph at a time"
    assert figures["gradient_difference"] <= 1e-5


@pytest.mark.slow
def test_ledger_peak_scales_with_the_batch() -> None:
    small, large = measure(batch_size=4), measure(batch_size=8)
    assert large["staged_bytes"] == pytest.approx(2 * small["staged_bytes"], rel=0.1)
