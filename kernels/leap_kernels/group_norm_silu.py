"""Group norm and SiLU in one op, as residual blocks of an image decoder have them.

    xhat = (x - mean) / sqrt(variance + eps)                  over each group of channels of a sample
    y    = xhat * weight + bias                               per channel
    out  = y * sigmoid(y)

Backward, with d = g sigmoid(y) (1 + y (1 - sigmoid(y))) the gradient at y:

    dx      = (weight d - mean(weight d) - xhat mean(weight d xhat)) / sqrt(variance + eps)
    dweight = sum of d xhat,  dbias = sum of d                over samples and places

The output of the norm is computed again, not saved. Group norm: arXiv:1803.08494.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _native
from ._arguments import FLOATS, compute_dtype
from ._dispatch import choose, current, register, resumed, unsupported
from ._group_norm_launch import triton_backward, triton_forward
from ._library import define

# ---- reference ---------------------------------------------------------------------------------------------


def _per_channel(values: Tensor | None, like: Tensor, missing: float) -> Tensor | float:
    return missing if values is None else values.to(like.dtype).view(-1, *[1] * (like.ndim - 2))


def _per_group(values: Tensor, like: Tensor) -> Tensor:
    """View (B, G) so that it meets x (B, C, ...), by repeating each number for the channels of its group."""
    repeated = values.repeat_interleave(like.shape[1] // values.shape[1], dim=1)
    return repeated.view(*repeated.shape, *[1] * (like.ndim - 2))


def reference_forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the output, laid out as x, and mean and rstd (B, G) in the dtype of the arithmetic."""
    values = x.to(compute_dtype(x))
    grouped = values.reshape(x.shape[0], groups, -1)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0)
    rstd = torch.rsqrt(variance + eps)
    normed = (values - _per_group(mean, x)) * _per_group(rstd, x)
    y = normed * _per_channel(weight, values, 1.0) + _per_channel(bias, values, 0.0)
    return torch.empty_like(x).copy_(y * torch.sigmoid(y)), mean, rstd


def reference_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient at x, laid out as x, and those at weight and bias in the dtype of the arithmetic."""
    values, scale = x.to(mean.dtype), _per_group(rstd, x)
    normed = (values - _per_group(mean, x)) * scale
    factor = _per_channel(weight, values, 1.0)
    y = normed * factor + _per_channel(bias, values, 0.0)
    sigmoid = torch.sigmoid(y)
    at_y = grad.to(mean.dtype) * sigmoid * (1 + y * (1 - sigmoid))
    means = [
        _per_group(term.reshape(*mean.shape, -1).mean(dim=2), x) for term in (at_y * factor, at_y * factor * normed)
    ]
    at_x = scale * (at_y * factor - means[0] - normed * means[1])
    over = [0, *range(2, x.ndim)]
    return torch.empty_like(x).copy_(at_x), (at_y * normed).sum(dim=over), at_y.sum(dim=over)


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute with native/group_norm.cpp; arguments as for `reference_forward`, in float32."""
    out, mean = torch.empty_like(x), x.new_empty(x.shape[0], groups, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    _native.call("leap_group_norm_silu", x, weight, bias, out, mean, rstd, *_sizes(x), groups, eps, last, x.dtype)
    return out, mean, rstd


def native_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, last: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute with native/group_norm.cpp; arguments as for `reference_backward`, in float32."""
    out, at_weight, at_bias = torch.empty_like(x), mean.new_empty(x.shape[1]), mean.new_empty(x.shape[1])
    _native.call(
        "leap_group_norm_silu_backward",
        *(grad, x, mean, rstd, weight, bias, out, at_weight, at_bias, *_sizes(x), mean.shape[1], last, x.dtype),
    )
    return out, at_weight, at_bias


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Return samples, channels, and places of a channel."""
    batch, channels, *_ = x.shape
    return batch, channels, x.numel() // (batch * channels)


# ---- dispatch and autograd ---------------------------------------------------------------------------------


_OP = register("group_norm_silu", unsupported)
_FORWARD = {"triton": triton_forward, "native": native_forward, "reference": reference_forward}
_BACKWARD = {"triton": triton_backward, "native": native_backward, "reference": reference_backward}


def _format(x: Tensor) -> torch.memory_format | None:
    """Return how x lies in memory, None if in neither of the orders that the kernels take."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else None


def _arithmetic(values: Tensor | None, x: Tensor) -> Tensor | None:
    return None if values is None else values.to(compute_dtype(x)).contiguous()


def _run(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    forward = _FORWARD[choose(_OP, *(tensor for tensor in (x, weight, bias) if tensor is not None))]
    last = _format(x) is torch.channels_last
    return forward(x, groups, _arithmetic(weight, x), _arithmetic(bias, x), eps, last)


def _run_plain(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return native_forward(x, groups, _arithmetic(weight, x), _arithmetic(bias, x), eps, not x.is_contiguous())


def _fake(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0], groups, dtype=compute_dtype(x))
    return torch.empty_like(x), mean, torch.empty_like(mean)


def _run_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: list[bool],
) -> list[Tensor]:
    backward = _BACKWARD[choose(_OP, *(t for t in (x, grad, weight, bias) if t is not None))]
    layout = _format(x)
    assert layout is not None
    grad = grad.contiguous(memory_format=layout)
    last = layout is torch.channels_last
    gradients = backward(grad, x, mean, rstd, _arithmetic(weight, x), _arithmetic(bias, x), last)
    found = zip(gradients, (x, weight, bias), wanted, strict=True)
    return [value.to(like.dtype) for value, like, asked in found if asked and like is not None]


def _fake_backward(grad: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    _, _, weight, bias, wanted = rest
    return [torch.empty_like(like) for like, asked in zip((x, weight, bias), wanted, strict=True) if asked]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, weight, bias, _ = inputs
    ctx.save_for_backward(x, *output[1:], weight, bias)
    ctx.mark_non_differentiable(*output[1:])
    ctx.setting = current()


@once_differentiable
def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    wanted = [needed[0], needed[2], needed[3]]
    found = iter(resumed(ctx.setting, _gradients, grad, *ctx.saved_tensors, wanted))
    at_x, at_weight, at_bias = (next(found) if asked else None for asked in wanted)
    return at_x, None, at_weight, at_bias, None


_gradients = define(
    "group_norm_silu_backward(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, "
    "bool[] wanted) -> Tensor[]",
    _run_backward,
    _fake_backward,
)
_norm_silu = define(
    "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _setup_context,
    _backward,
    native=_run_plain,
)


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """Return `silu(group_norm(x, num_groups, weight, bias, eps))`.

    Arithmetic is float32 (float64 for float64 `x`), rounded once. Images are taken as they lie, channels first or
    last; other strides cost a copy. The backward pass saves the arguments, and mean and rstd of each group. Gradients
    reach `x`, `weight` and `bias`, once: they have no derivative of their own.

    Args:
        x: (B, C, ...), such as images (B, C, H, W), float32, bfloat16, float16 or float64.
        num_groups: groups of C / num_groups channels each.
        weight: (C,), of any of these dtypes, or None for 1.
        bias: (C,), likewise, or None for 0.
        eps: what the norm adds to the variance.

    Returns:
        A tensor of the shape, dtype and memory format of `x`.

    Raises:
        ValueError: on a wrong shape, dtype or device, or where `num_groups` does not divide C.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    if x.ndim < 2 or x.numel() == 0 or x.dtype not in FLOATS:
        raise ValueError(
            "group_norm_silu needs x (B, C, ...) with at least one element, of float32, bfloat16, float16 or float64, "
            f"not {tuple(x.shape)} of {x.dtype}."
        )
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"group_norm_silu needs num_groups to divide the {channels} channels, not {num_groups}.")
    for name, values in (("weight", weight), ("bias", bias)):
        if values is not None and (values.shape != (channels,) or values.device != x.device):
            raise ValueError(
                f"group_norm_silu needs {name} of shape ({channels},) on {x.device}, not {tuple(values.shape)} on "
                f"{values.device}."
            )
    result: Tensor = _norm_silu(x if _format(x) else x.contiguous(), num_groups, weight, bias, float(eps))[0]
    return result
