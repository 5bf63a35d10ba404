"""The Triton kernels of `group_norm_silu`, for the catalog: of channels first, and of channels last."""

from __future__ import annotations

from ._group_norm_launch import CHANNELS, SPANS, STEPS, TILE
from ._group_norm_triton import (
    gradient_kernel,
    gradient_sums_kernel,
    group_gradients_kernel,
    group_moments_kernel,
    moments_kernel,
    silu_kernel,
)
from ._specs import KernelSpec

SPAN = TILE * STEPS
"""Elements of a program, where a channel has as many places."""
_PROGRAMS = 3 * 17
"""17 channels of three spans."""
_OF_GROUP = ("mean_ptr", "rstd_ptr")
_AFFINE = ("weight_ptr", "bias_ptr")
_MEANS = ("mean_sum_ptr", "mean_product_ptr")
_SIZES = {"channels": "i32", "places": "i32", "groups": "i32"}
_GIVEN = {"WEIGHT": True, "BIAS": True}


def _tiled(name: str, kernel: object, last: bool, reads: int, writes: int, **arguments: str) -> KernelSpec:
    """Return a kernel whose programs take spans of the tensor `T`; of what has other types, tensors are small."""
    channels = CHANNELS if last else 1
    given = _GIVEN if "weight_ptr" in arguments else {}
    return KernelSpec(
        f"group_norm_silu{name}{'_channels_last' if last else ''}",
        kernel,
        arguments,
        {**given, "CHANNELS": channels, "PLACES": TILE // channels, "STEPS": STEPS, "LAST": last},
        reads=("T",) * reads,
        writes=("T",) * writes,
        elements=SPAN,
        per_group=tuple(argument for argument, kind in arguments.items() if kind == "*fp32"),
        shaped=("CHANNELS", "PLACES", "STEPS"),
        programs=_PROGRAMS,
    )


def _moments(last: bool) -> KernelSpec:
    partial = dict.fromkeys(("mean_ptr", "squares_ptr"), "*fp32")
    return _tiled("/moments", moments_kernel, last, 1, 0, x_ptr="*T", **partial, channels="i32", places="i32")


def _silu(last: bool) -> KernelSpec:
    numbers = dict.fromkeys((*_OF_GROUP, *_AFFINE), "*fp32")
    return _tiled("/silu", silu_kernel, last, 1, 1, x_ptr="*T", **numbers, out_ptr="*T", **_SIZES)


def _gradient_sums(last: bool) -> KernelSpec:
    numbers = dict.fromkeys((*_OF_GROUP, *_AFFINE, "sum_ptr", "product_ptr"), "*fp32")
    return _tiled("/gradient_sums", gradient_sums_kernel, last, 2, 0, grad_ptr="*T", x_ptr="*T", **numbers, **_SIZES)


def _gradient(last: bool) -> KernelSpec:
    numbers = dict.fromkeys((*_OF_GROUP, *_AFFINE, *_MEANS), "*fp32")
    tensors = {"grad_ptr": "*T", "x_ptr": "*T"}
    return _tiled("/gradient", gradient_kernel, last, 2, 1, **tensors, **numbers, out_ptr="*T", **_SIZES)


# Of a group of one channel.
_GROUP_MOMENTS = KernelSpec(
    "group_norm_silu/group_moments",
    group_moments_kernel,
    {
        **dict.fromkeys(("partial_mean_ptr", "partial_squares_ptr", "mean_ptr", "rstd_ptr"), "*fp32"),
        **_SIZES,
        **{"spans": "i32", "eps": "fp32"},
    },
    {"SPAN": SPAN, "CHANNELS": 1, "SPANS": SPANS},
    reads=(),
    writes=(),
    elements=3 * SPAN,
    shaped=("SPAN", "CHANNELS"),
    sums_only=True,
)
_GROUP_GRADIENTS = KernelSpec(
    "group_norm_silu/group_gradients",
    group_gradients_kernel,
    {
        **dict.fromkeys(("partial_sum_ptr", "partial_product_ptr", "weight_ptr", "sum_ptr", "product_ptr"), "*fp32"),
        **dict.fromkeys(_MEANS, "*fp32"),
        **_SIZES,
        "spans": "i32",
    },
    {"WEIGHT": True, "CHANNELS": 1, "SPANS": SPANS},
    reads=(),
    writes=(),
    elements=3 * SPAN,
    shaped=("CHANNELS",),
    sums_only=True,
)
GROUP_NORM_KERNELS = (
    _moments(False),
    _moments(True),
    _GROUP_MOMENTS,
    _silu(False),
    _silu(True),
    _gradient_sums(False),
    _gradient_sums(True),
    _GROUP_GRADIENTS,
    _gradient(False),
    _gradient(True),
)
