"""SwiGLU: the activation of feed-forwards with a gate, which keeps nothing but its inputs.

    y = silu(gate) * up,    silu(z) = z * sigmoid(z)         gate, up (..., C), or both packed as (..., 2 C)

Backward, with g the gradient at y and s = sigmoid(gate): gate gets g * up * (s + gate * s * (1 - s)), and up
g * silu(gate), recomputed. The gradient of a packed tensor is one packed tensor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native
from ._arguments import FLOATS, compute_dtype
from ._dispatch import choose, current, register, resumed, unsupported
from ._first_order import define_gradient
from ._library import define
from ._modulation import nothing
from ._triton import jit, tl, triton


def row_stride(x: Tensor) -> int | None:
    """Return how far rows of `x` (..., C) are from each other, or None where one number does not say."""
    if x.is_contiguous():
        return x.shape[-1]
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return None
    stride = reach = None
    for size, step in zip(x.shape[-2::-1], x.stride()[-2::-1], strict=True):
        if size == 1:
            continue
        if reach is not None and step != reach:
            return None
        stride = step if stride is None else stride
        reach = step * size
    return x.shape[-1] if stride is None else stride


def _in_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return `x` and how far its rows are from each other, copied only where it takes more than a number to say."""
    stride = row_stride(x)
    return (x.contiguous(), x.shape[-1]) if stride is None else (x, stride)


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return gate and up, which may be packed: silu takes the first half."""
    if up is not None:
        return gate, up
    first, second = gate.chunk(2, dim=-1)
    return first, second


def _output(gate: Tensor, up: Tensor | None) -> Tensor:
    if up is not None:
        return torch.empty_like(gate, memory_format=torch.contiguous_format)
    return gate.new_empty((*gate.shape[:-1], gate.shape[-1] // 2))


# ---- reference ---------------------------------------------------------------------------------------------


def reference_forward(gate: Tensor, up: Tensor | None) -> Tensor:
    """Compute y in plain PyTorch; without `up`, `gate` holds both."""
    dtype = compute_dtype(gate)
    first, second = (half.to(dtype) for half in _halves(gate, up))
    return (first * first.sigmoid() * second).to(gate.dtype).contiguous()


def reference_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the gradients at gate and up; packed in the first if they were, and the second empty."""
    dtype = compute_dtype(gate)
    first, second = (half.to(dtype) for half in _halves(gate, up))
    wide, s = grad.to(dtype), first.sigmoid()
    grads = wide * second * (s + first * s * (1 - s)), wide * first * s
    if up is None:
        return torch.cat(grads, dim=-1).to(gate.dtype), nothing(gate)
    grad_gate, grad_up = (value.to(gate.dtype).contiguous() for value in grads)
    return grad_gate, grad_up


# ---- Triton ------------------------------------------------------------------------------------------------

BLOCK = 1024


@jit
def row_and_columns(width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return this program's row, its columns and their mask."""
    blocks = tl.cdiv(width, BLOCK)
    # 64 bits: a tensor may exceed 2^31 elements.
    row = (tl.program_id(0) // blocks).to(tl.int64)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return row, columns, columns < width


@jit
def swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_ptr, up_ptr, out_ptr, width, gate_stride, up_stride, BLOCK: tl.constexpr
):
    row, columns, inside = row_and_columns(width, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    out = gate / (1 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * width + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    width,
    gate_stride,
    up_stride,
    out_stride,
    BLOCK: tl.constexpr,
):
    row, columns, inside = row_and_columns(width, BLOCK)
    grad = tl.load(grad_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    power = tl.exp(-gate)
    s = 1 / (1 + power)
    # power * s is 1 - s without its loss; an infinite power times zero would be no number.
    grad_gate = grad * up * (s + gate * s * (tl.minimum(power, 3.0e38) * s))
    at = row * out_stride + columns
    tl.store(grad_gate_ptr + at, grad_gate.to(grad_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_up_ptr + at, (grad * gate * s).to(grad_up_ptr.dtype.element_ty), mask=inside)


def triton_forward(gate: Tensor, up: Tensor | None) -> Tensor:
    """Compute with Triton; arguments and results as for `reference_forward`."""
    (first, first_stride), (second, second_stride) = (_in_rows(half) for half in _halves(gate, up))
    out = _output(gate, up)
    width, block = out.shape[-1], _block(out.shape[-1])
    with torch.cuda.device_of(gate):
        swiglu_kernel[(out.numel() // width * triton.cdiv(width, block),)](
            first, second, out, width, first_stride, second_stride, block
        )
    return out


def triton_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute with Triton; arguments and results as for `reference_backward`."""
    grad = grad.contiguous()
    (first, first_stride), (second, second_stride) = (_in_rows(half) for half in _halves(gate, up))
    grads = _gradients_like(gate, up)
    grad_gate, grad_up = _halves(grads[0], None if up is None else grads[1])
    width, block = grad.shape[-1], _block(grad.shape[-1])
    with torch.cuda.device_of(gate):
        swiglu_backward_kernel[(grad.numel() // width * triton.cdiv(width, block),)](
            *(grad, first, second, grad_gate, grad_up),
            *(width, first_stride, second_stride, grads[0].shape[-1], block),
        )
    return grads


def _block(width: int) -> int:
    return int(min(BLOCK, max(128, triton.next_power_of_2(width))))


# ---- native CPU code ---------------------------------------------------------------------------------------


def _strided(gate: Tensor, up: Tensor | None) -> tuple[Tensor, int, Tensor | int, int]:
    """Return gate and up, each followed by its row stride; of a packed tensor, up is an address: a view costs more."""
    first, stride = _in_rows(gate)
    if up is None:
        return first, stride, first.data_ptr() + first.shape[-1] // 2 * first.element_size(), stride
    return first, stride, *_in_rows(up)


def native_forward(gate: Tensor, up: Tensor | None) -> Tensor:
    """Compute with native/activations.cpp; arguments and results as for `reference_forward`."""
    out = _output(gate, up)
    width = out.shape[-1]
    _native.call("leap_swiglu", *_strided(gate, up), out, out.numel() // width, width, out.dtype)
    return out


def native_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute with native/activations.cpp; arguments and results as for `reference_backward`."""
    grad = grad.contiguous()
    grads = _gradients_like(gate, up)
    width = grad.shape[-1]
    to_gate, stride, to_up, _ = _strided(grads[0], None if up is None else grads[1])
    _native.call(
        *("leap_swiglu_backward", grad, *_strided(gate, up), to_gate, to_up, stride),
        *(grad.numel() // width, width, grad.dtype),
    )
    return grads


# ---- dispatch and autograd ---------------------------------------------------------------------------------

_OP = register("swiglu", unsupported)
_FORWARD = {"triton": triton_forward, "native": native_forward, "reference": reference_forward}
_BACKWARD = {"triton": triton_backward, "native": native_backward, "reference": reference_backward}


def _gradients_like(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if up is None:
        return grad_gate, nothing(gate)
    return grad_gate, torch.empty_like(up, memory_format=torch.contiguous_format)


def _run(gate: Tensor, up: Tensor | None) -> Tensor:
    return _FORWARD[choose(_OP, gate) if up is None else choose(_OP, gate, up)](gate, up)


def _fake(gate: Tensor, up: Tensor | None) -> Tensor:
    return _output(gate, up)


def _run_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return _BACKWARD[choose(_OP, grad, gate) if up is None else choose(_OP, grad, gate, up)](grad, gate, up)


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    return _gradients_like(gate, up)


_gradients = define_gradient(
    "swiglu_backward(Tensor grad, Tensor gate, Tensor? up) -> (Tensor, Tensor)", _run_backward, _fake_backward
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.setting = current()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    gate, up = ctx.saved_tensors
    grad_gate, grad_up = resumed(ctx.setting, _gradients, grad, gate, up)
    return grad_gate, None if up is None else grad_up


_swiglu = define(
    "swiglu(Tensor gate, Tensor? up) -> Tensor", _run, _fake, _setup_context, _backward, native=native_forward
)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Compute `silu(gate) * up`, with one rounding at the end.

    Gradients reach both, once: not their own gradients. Saved for them are the inputs. Arithmetic is float32 (float64
    for float64). Any strides are taken; the last dimension may be a chunk of a wider one, and is not copied then.

    Args:
        gate: (..., C), float32, bfloat16, float16 or float64. Without `up`: (..., 2 C), gate first and up behind it.
        up: shape and dtype of `gate`.

    Returns:
        (..., C), contiguous and of the dtype of `gate`.

    Raises:
        ValueError: on a wrong shape, dtype or device, or no element.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    if gate.dtype not in FLOATS or gate.ndim == 0 or gate.numel() == 0:
        raise ValueError(
            f"swiglu takes float32, bfloat16, float16 and float64 of shape (..., C) with at least one element, not "
            f"{gate.dtype} of shape {tuple(gate.shape)}."
        )
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"swiglu of one tensor needs an even last dimension, not {tuple(gate.shape)}.")
    elif up.shape != gate.shape or up.dtype is not gate.dtype or up.device != gate.device:
        raise ValueError(
            f"swiglu needs gate and up alike, but gate is {gate.dtype} {tuple(gate.shape)} on {gate.device} and up is "
            f"{up.dtype} {tuple(up.shape)} on {up.device}."
        )
    result: Tensor = _swiglu(gate, up)
    return result
