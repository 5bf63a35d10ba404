"""benchmarks/block_traffic.py counts what can be counted by hand, and the page has its figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from leap_kernels import gelu_tanh
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from benchmarks.block_traffic import Counting, Sizes, eager, launched
from benchmarks.fused_traffic import DEVICES, fused

SMALL = Sizes(image=40, text=24, heads=2, head=16, axes=(4, 6, 6))
TOKENS = SMALL.image + SMALL.text
STREAM = TOKENS * SMALL.width * 2
"""Bytes of a row for each token."""
SCALES = TOKENS * SMALL.heads * 4
"""Bytes of a number for each head of each token."""


DOUBLE = {"norms": 3 * 2, "queries and keys": 2 + 2, "attention": 1 + 1 + 1, "feed-forward": 4 + 4 + 1}
SINGLE = {"norms": 3, "queries and keys": 2 + 2, "attention": 1 + 1, "feed-forward": 4 + 5 + 1}
AFTER_DOUBLE = {"norms": 2 + 1, "queries and keys": 2 + 2, "attention": 1 + 1 + 1, "feed-forward": 4 + 1}
AFTER_SINGLE = {"norms": 2, "queries and keys": 2 + 2, "attention": 1 + 1, "feed-forward": 4 + 1}
"""Streams that are saved: of a norm its input, itself and what is made of it. FLUX's feed-forwards are four wide. After
`patch`, what is made of a norm before a feed-forward, and of its GELU, is made again."""


@pytest.mark.parametrize(
    ("kind", "before_patch", "after_patch"),
    [
        ("double", sum(DOUBLE.values()), sum(AFTER_DOUBLE.values())),
        ("single", sum(SINGLE.values()), sum(AFTER_SINGLE.values())),
    ],
)
def test_a_block_by_hand(kind: str, before_patch: int, after_patch: int) -> None:
    before, after = (eager(kind, SMALL, patched) for patched in (False, True))
    for way in ("forward", "backward"):
        assert after[way]["rest"] < 0.6 * before[way]["rest"]
    assert after["backward"]["operations"]["gelu_tanh_backward"] == 4 * 4 * STREAM
    # Of text and image, joined or not: two residuals, or a residual and what a norm gives beside the attention.
    assert after["backward"]["operations"]["add"] == pytest.approx(2 * 3 * STREAM, rel=0.05)
    # Beside the streams: a number or two for each row or head, and vectors.
    assert before["saved"] == pytest.approx(before_patch * STREAM + 3 * SCALES, rel=0.03)
    assert after["saved"] == pytest.approx(after_patch * STREAM + SCALES + 2 * 2 * TOKENS * 4, rel=0.03)
    gelu = 2 * 4 * STREAM
    assert before["forward"]["operations"]["gelu"] == after["forward"]["operations"]["gelu_tanh"] == gelu
    cats = {"double": 3 * 2 * STREAM, "single": 2 * STREAM + 2 * 5 * STREAM}[kind]
    assert before["forward"]["operations"]["cat"] == cats
    assert after["forward"]["operations"]["cat"] == 2 * STREAM, "values of a double block, streams of a single one"


def test_partial_sums_of_a_launch_by_hand() -> None:
    """The gradient at a gate: programs of 16 rows leave a row of float32, which PyTorch reads, sums and rounds."""
    rows, width = 64, 32
    with FakeTensorMode():
        grad, y = (torch.empty(1, rows, width, dtype=torch.bfloat16) for _ in range(2))
        gate = torch.empty(1, width, dtype=torch.bfloat16)
        moved = launched("gated_residual_backward", (grad, gate, y, torch.bfloat16))
    one, vector, partial = rows * width * 2, width * 2, rows // 16 * width * 4
    kernel = 3 * one + vector + partial
    assert moved == kernel + partial + width * 4 + width * 4 + vector


def test_a_copy_that_a_launcher_makes_counts() -> None:
    with FakeTensorMode():
        wide = torch.empty(8, 64, dtype=torch.bfloat16)
        assert launched("gelu_tanh", (wide,)) == 2 * wide.nbytes
        assert launched("gelu_tanh", (wide[:, :32],)) == 2 * wide.nbytes
        with Counting() as counting:
            gelu_tanh(wide[:, :32])
        assert counting.traffic.rest == {"gelu_tanh": 2 * wide.nbytes}


class _Two(nn.Module):
    """Two steps that fuse, and a product between them and another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor]:
        return (self.linear(functional.silu(x) * scale).exp(),)


@pytest.mark.parametrize("device", DEVICES)
def test_what_inductor_fuses_by_hand(device: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, scale = torch.empty(128, 64, requires_grad=True), torch.empty(64)
        found: Any = fused(_Two(), [x], [scale], device)
    one = x.nbytes
    assert found.forward["rest"] == 2 * one + scale.nbytes + 2 * one
    assert found.forward["products"] == 2 * one + 64 * 64 * 4
    # Of exp its result, of the product its argument, of silu its argument, each as large as x.
    assert found.backward["rest"] == 3 * one + 3 * one + scale.nbytes
    assert found.saved == 3 * one
