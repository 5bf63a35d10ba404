"""The Euclidean norm of many tensors as one vector: on a GPU one launch, where PyTorch takes one for every tensor.

    sqrt(sum_i sum(tensor_i^2))

Squares are summed in float32 within a tensor, or on a GPU within a block of it, so that the norm is infinite where a
sum of squares is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._arguments import FLOATS
from ._dispatch import choose, register, unsupported
from ._library import define
from ._many import ADDRESSES, Table, address, aligned, grouped, own_row, table
from ._triton import jit, tl

# ---- reference ---------------------------------------------------------------------------------------------


def reference(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of the norms, in plain PyTorch."""
    norms = [torch.linalg.vector_norm(tensor, dtype=_widened(tensor.dtype)) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK = 8192
WORDS = ADDRESSES + 1


@jit
def squares_kernel(  # type: ignore[no-untyped-def]
    # The first tensor says the dtype of all.
    value_ptr,
    rows_ptr,
    row_of_ptr,
    squares_ptr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDRESSES: tl.constexpr,
    WORDS: tl.constexpr,
):
    row_ptr, program, count = own_row(rows_ptr, row_of_ptr, WORDS, ALIGNED)
    at = program * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(address(row_ptr, ADDRESSES, value_ptr.dtype, ALIGNED) + at, mask=at < count, other=0.0)
    value = value.to(tl.float32)
    tl.store(squares_ptr + tl.program_id(0), tl.sum(value * value))


def triton_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of contiguous tensors, with a launch for each dtype; their sums are added up in float64."""
    sums = []
    with torch.cuda.device_of(tensors[0]):
        kinds = [(tensor.dtype, aligned([tensor])) for tensor in tensors]
        for (_, whole), positions in grouped(kinds).items():
            of_kind = [tensors[position] for position in positions]
            squares = launch(of_kind[0], table([(tensor,) for tensor in of_kind], BLOCK), whole)
            sums.append(squares.sum(dtype=torch.float64))
    return torch.stack(sums).sum().sqrt().float()


def launch(first: Tensor, tensors: Table, aligned: bool) -> Tensor:
    """Return the sum of squares of each block of the tensors in a table. A CUDA graph may hold the launch."""
    squares = tensors.row_of.new_empty(tensors.row_of.shape, dtype=torch.float32)
    squares_kernel[(len(squares),)](first, tensors.rows, tensors.row_of, squares, aligned, BLOCK, ADDRESSES, WORDS)
    return squares


# ---- dispatch ----------------------------------------------------------------------------------------------


def _eligible(backend: str, *tensors: Tensor) -> str | None:
    # PyTorch reads each tensor once, too.
    return "PyTorch's own norm is native code" if backend == "native" else unsupported(backend, *tensors)


_OP = register("total_norm", _eligible)


def _run(tensors: list[Tensor]) -> Tensor:
    filled = [tensor.contiguous() for tensor in tensors if tensor.numel()]
    if choose(_OP, *tensors) == "reference" or not filled:
        return reference(tensors)
    return triton_norm(filled)


def _fake(tensors: list[Tensor]) -> Tensor:
    dtypes = [_widened(tensor.dtype) for tensor in tensors]
    return tensors[0].new_empty((), dtype=torch.float64 if torch.float64 in dtypes else torch.float32)


_norm = define("total_norm(Tensor[] tensors) -> Tensor", _run, _fake)


@torch.no_grad()
def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all `tensors` as one vector, computed in float32 or wider; 0 of none.

    PyTorch's `get_total_norm` is of the tensors' dtype: of bfloat16 up to 0.2 % off, and so is what it clips to. Its
    `_foreach_norm` launches a kernel for every few hundred pieces of 65,536 elements, of which a large model has many.

    Args:
        tensors: any shapes and strides, float32, bfloat16, float16 or float64, on one device.

    Returns:
        A scalar on that device: float64 if a tensor is float64, else float32.

    Raises:
        ValueError: on a wrong dtype, or tensors on different devices.
        TypeError: on DTensors.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    for tensor in tensors:
        if tensor.dtype not in FLOATS:
            raise ValueError(f"total_norm takes float32, bfloat16, float16 and float64, not {tensor.dtype}.")
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"total_norm needs tensors on one device, but they are on {tensors[0].device} and {tensor.device}."
            )
    return _norm(list(tensors)) if tensors else torch.zeros(())
