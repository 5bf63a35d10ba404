"""The ops of transformer blocks, each with the formula that models compute in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import tolerances
import torch
from leap_kernels.adaln_modulate import adaln_modulate
from leap_kernels.gated_residual import gated_residual
from leap_kernels.gelu_tanh import gelu_tanh
from leap_kernels.swiglu import swiglu
from torch import Tensor
from torch.nn import functional

HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)
# Batch, rows and width: the least ones, and those that fill no step, block or strip.
SHAPES = ((1, 1, 1), (3, 1, 3), (2, 5, 3), (2, 37, 129), (1, 17, 1100))


@dataclass(frozen=True)
class BlockCase:
    """An op and its formula, which take tensors of these names.

    Those in `vectors` are chunks of a wider tensor, (B, C) or (B, 1, C), the others are (B, S, C), or (B, S, 2 C) if
    `packed`. `saved` counts what the backward pass keeps, in tensors (B, S, C), if all inputs need gradients.
    """

    op: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    rows: tuple[str, ...]
    vectors: tuple[str, ...] = ()
    packed: bool = False
    saved: int = 1

    def inputs(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        vector_dtype: torch.dtype | None = None,
        ones: bool = True,
    ) -> dict[str, Tensor]:
        """Draw inputs, and the gradient of the output."""
        batch, rows, width = shape
        wide = 2 * width if self.packed else width
        drawn = {name: torch.randn(batch, rows, wide, dtype=torch.float64).to(dtype) for name in self.rows}
        chunks = torch.randn(batch, 6 * width, dtype=torch.float64).to(vector_dtype or dtype).chunk(6, dim=-1)
        for name, chunk in zip(self.vectors, chunks[1:], strict=False):
            drawn[name] = chunk.unsqueeze(1) if ones else chunk
        return drawn | {"grad": torch.randn(batch, rows, width, dtype=torch.float64).to(dtype)}

    def run(self, inputs: dict[str, Tensor], formula: bool = False) -> tuple[Tensor, ...]:
        """Return the output of the op (or of its formula) and the gradients at every input."""
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items() if name != "grad"}
        output = (self.formula if formula else self.op)(**leaves)
        gradients = torch.autograd.grad(output, list(leaves.values()), inputs["grad"].to(output.dtype))
        return output.detach(), *gradients


def _of_rows(vector: Tensor) -> Tensor:
    return vector if vector.ndim == 3 else vector[:, None]


def _modulated(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    normal = functional.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + _of_rows(scale))
    return normal if shift is None else normal + _of_rows(shift)


def _packed(gate: Tensor) -> Tensor:
    half = gate.shape[-1] // 2
    return functional.silu(gate[..., :half]) * gate[..., half:]


BLOCK_CASES = {
    "adaln_modulate": BlockCase(
        lambda x, scale, shift: adaln_modulate(x, shift, scale), _modulated, ("x",), ("scale", "shift")
    ),
    "adaln_modulate/no_shift": BlockCase(
        lambda x, scale: adaln_modulate(x, None, scale), _modulated, ("x",), ("scale",)
    ),
    "gated_residual": BlockCase(
        lambda x, y, gate: gated_residual(x, gate, y), lambda x, y, gate: x + _of_rows(gate) * y, ("x", "y"), ("gate",)
    ),
    "gelu_tanh": BlockCase(gelu_tanh, lambda x: functional.gelu(x, approximate="tanh"), ("x",)),
    "swiglu": BlockCase(swiglu, lambda gate, up: functional.silu(gate) * up, ("gate", "up"), saved=2),
    "swiglu/packed": BlockCase(swiglu, _packed, ("gate",), packed=True, saved=2),
}
by_block_case = pytest.mark.parametrize("case", BLOCK_CASES.values(), ids=BLOCK_CASES)


def assert_accurate(case: BlockCase, inputs: dict[str, Tensor], results: tuple[Tensor, ...], cut: bool = False) -> None:
    """Check errors against float64: within the arithmetic's and one rounding, and at most twice those of PyTorch.

    `cut` allows bfloat16 that was cut off, not rounded. Inputs and results are on the CPU.
    """
    exacts = case.run({name: value.double() for name, value in inputs.items()}, formula=True)
    eager = case.run(inputs, formula=True)
    dtypes = [inputs[case.rows[0]].dtype, *(value.dtype for name, value in inputs.items() if name != "grad")]
    for result, exact, plain, dtype in zip(results, exacts, eager, dtypes, strict=True):
        assert result.dtype == dtype
        assert result.shape == exact.shape
        error, at_eager = ((value.double() - exact).abs().max().item() for value in (result, plain.to(dtype)))
        largest = exact.abs().max().item()
        arithmetic = 40 * tolerances.unit_roundoff(torch.float32) * (1 + largest)
        storage = tolerances.unit_roundoff(dtype) * largest + torch.finfo(dtype).tiny
        assert error <= arithmetic + (2 if cut else 1) * storage
        assert error <= 2 * at_eager + arithmetic + (storage if cut else 0)


def samples(dtype: torch.dtype) -> dict[str, list[tuple[object, ...]]]:
    """Return arguments for every op of a block in `torch.ops.leap_kernels`, as `torch.library.opcheck` takes them."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    x, y = drawn(2, 3, 6).requires_grad_(), drawn(2, 3, 6).requires_grad_()
    shift, scale = drawn(2, 12).requires_grad_().chunk(2, dim=-1)
    grad, fixed, vector = drawn(2, 3, 6), drawn(2, 3, 6), drawn(2, 6)
    statistics = torch.rand(2, 2, 3)
    return {
        "adaln_modulate": [(x, shift, scale, 1e-6), (x, None, vector, 1e-6)],
        "adaln_modulate_backward": [(grad, fixed, vector, statistics, dtype, sums) for sums in (False, True)],
        "gated_residual": [(x, scale, y), (x, vector, y)],
        "gated_residual_backward": [
            (grad, vector, fixed, dtype),
            (grad, vector, None, dtype),
            (grad, vector, fixed, None),
        ],
        "gelu_tanh": [(x,)],
        "gelu_tanh_backward": [(grad, fixed, again) for again in (False, True)],
        "swiglu": [(x, y), (x, None)],
        "swiglu_backward": [(grad, fixed, fixed.clone()), (drawn(2, 3, 3), fixed, None)],
    }
