"""PyTorch's norm by a root mean square as a GPU computes it: one operation each way, where a CPU runs several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

_LIBRARY = torch.library.Library("leapalign", "FRAGMENT")
_LIBRARY.define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
_LIBRARY.define("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)")


@torch.library.register_fake("leapalign::rms_norm", lib=_LIBRARY)
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


@torch.library.register_fake("leapalign::rms_norm_backward", lib=_LIBRARY)
def _backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


class _Norm(torch.autograd.Function):
    """Saves what PyTorch's `_fused_rms_norm` does: its arguments, and a number a row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rstd = torch.ops.leapalign.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        at_x, at_weight = torch.ops.leapalign.rms_norm_backward(grad, *ctx.saved_tensors)
        return at_x, at_weight, None


@contextlib.contextmanager
def norms_as_on_a_gpu() -> Iterator[None]:
    """Within the block `rms_norm` of fake tensors is one operation, where it is one on a GPU: with a weight of the
    dtype of its input."""
    on_a_cpu = functional.rms_norm

    def norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if not _fused(x, shape, weight, eps):
            return on_a_cpu(x, shape, weight, eps)
        result: Tensor = _Norm.apply(x, weight, eps)
        return result

    with patch.object(functional, "rms_norm", norm):
        yield


class NormsCounted:
    """Tells which operations a GPU would not run by themselves, as they are parts of a norm, and notes the norm."""

    def __init__(self, note: Callable[[int], None]) -> None:
        self._note = note
        self._inside = False

    @property
    def inside(self) -> bool:
        """Whether a part of a norm runs, forward or backward."""
        if self._inside or torch.is_grad_enabled():
            return self._inside
        # Sums of gradients between two nodes count as the first one's.
        node: Any = torch._C._current_autograd_node()
        return node is not None and _MARK in node.metadata

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Within the block norms run as on a CPU, and keep what they keep there, and are noted as on a GPU."""
        on_a_cpu = functional.rms_norm

        def norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
            if not _fused(x, shape, weight, eps):
                return on_a_cpu(x, shape, weight, eps)
            self._note(2 * x.nbytes + 4 * (x.numel() // x.shape[-1]))
            self._inside = True
            try:
                out = on_a_cpu(x, shape, weight, eps)
            finally:
                self._inside = False
            if weight is not None and out.grad_fn is not None:
                self._watch(out.grad_fn, x, weight)
            return out

        with patch.object(functional, "rms_norm", norm):
            yield

    def _watch(self, last: Any, x: Tensor, weight: Tensor) -> None:
        """Has the gradients of a norm be noted as the ``last`` of its nodes begins, and marks all that are its own."""
        size = 3 * x.nbytes + 4 * (x.numel() // x.shape[-1])
        last.register_prehook(lambda _: self._note(size))
        nodes, seen = [last], {x.grad_fn, weight.grad_fn, None}
        while nodes:
            node = nodes.pop()
            if node in seen or node.name() == _LEAF:
                continue
            seen.add(node)
            node.metadata[_MARK] = True
            nodes += [before for before, _ in node.next_functions]


_MARK = "part of a norm"
_LEAF = "torch::autograd::AccumulateGrad"


def _fused(x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None) -> bool:
    """Whether a GPU has one operation for this norm."""
    return weight is not None and weight.dtype == x.dtype and len(shape) == 1 and eps is not None
