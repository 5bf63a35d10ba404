"""One step of AdamW in place, with both moments kept as bytes, for weights that rounding to nearest would not move.

    g = gradient_scale * gradient
    m = beta1 * m + (1 - beta1) * g,    v = beta2 * v + (1 - beta2) * g^2
    change = lr / (1 - beta1^step) * m / (sqrt(v) / sqrt(1 - beta2^step) + eps) + lr * weight_decay * parameter
    parameter = parameter - change      any shape; float32, or bfloat16 rounded as `stochastic_round_` does

A moment is stored as bitsandbytes stores it ("8-bit Optimizers via Block-wise Quantization", Dettmers et al., 2021):
in row-major order, 256 elements share their largest magnitude `absmax`, and an element is map[byte] * absmax. Bytes
and absmax come out as from bitsandbytes 0.50.2 on a CPU. The weights do not: bitsandbytes rounds bfloat16 to nearest,
and its factor 1 - lr * weight_decay, in float32, loses a decay below 3e-8.

The byte of x = element / absmax is not always that of the nearest entry of the map: bitsandbytes, on a CPU, rounds x
to the nearest of 65536 even steps from -1 to 1 first. Hence 0 becomes 2e-5, and nothing smaller exists.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native
from ._arguments import check_draws, check_writable
from ._dispatch import choose, register, unsupported
from ._library import define_in_place
from .stochastic_round import reference as round_reference

_GROUP = 256
_PLACES = 65536
_SINGLE: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}

# ---- format ------------------------------------------------------------------------------------------------


def dynamic_map(signed: bool) -> Tensor:
    """Return what the 256 bytes stand for, ascending: seven decades up to 1, each twice as dense as the one below."""
    decades = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, **_SINGLE)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10 ** (decade - 6))
    negative = [-entries for entries in decades] if signed else []
    return torch.cat([*decades, *negative, torch.tensor([0.0, 1.0], **_SINGLE)]).sort().values


def _bytes_of_places(entries: Tensor) -> Tensor:
    """Return the byte of the nearest entry for each of the even steps from -1 to 1."""
    steps = torch.arange(_PLACES, **_SINGLE) * 2 / (_PLACES - 1) - 1
    return torch.searchsorted((entries[:-1] + entries[1:]) * 0.5, steps).to(torch.uint8)


MAP1, MAP2 = dynamic_map(signed=True), dynamic_map(signed=False)
_TABLE1, _TABLE2 = _bytes_of_places(MAP1), _bytes_of_places(MAP2)


def _layout(parameter: Tensor) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
    """Return dtype and shape of the four tensors of a state."""
    return 2 * ((torch.uint8, tuple(parameter.shape)), (torch.float32, (-(-parameter.numel() // _GROUP),)))


@dataclass(frozen=True)
class Adam8bitState:
    """The moments of a parameter of n elements, as bitsandbytes keeps them (`MAP1` and `MAP2` are its qmap1 and qmap2).

    The tensors are contiguous and on the parameter's device; `adamw_8bit_step_` changes them in place.
    """

    state1: Tensor
    """First moment: uint8, shape of the parameter."""
    absmax1: Tensor
    """Its largest magnitudes: float32, (ceil(n / 256),)."""
    state2: Tensor
    """Second moment: uint8, shape of the parameter."""
    absmax2: Tensor
    """Its largest magnitudes: float32, (ceil(n / 256),)."""

    @classmethod
    def zeros_like(cls, parameter: Tensor) -> Adam8bitState:
        """Return the state before the first step: both moments are zero."""
        return cls(*(parameter.new_zeros(shape, dtype=dtype) for dtype, shape in _layout(parameter)))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return state1, absmax1, state2 and absmax2."""
        return self.state1, self.absmax1, self.state2, self.absmax2


# ---- reference ---------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """What a step multiplies by, each a number of float32."""

    beta1: float
    rest1: float  # 1 - beta1
    beta2: float
    rest2: float  # 1 - beta2
    gradient_scale: float
    rate: float  # lr / (1 - beta1^step)
    root: float  # sqrt(1 - beta2^step)
    eps: float
    decay: float  # lr * weight_decay


def reference(
    parameter: Tensor, gradient: Tensor, state: Adam8bitState, factors: Factors, seed: int, offset: int
) -> None:
    """Take the step on contiguous tensors in plain PyTorch."""
    g = gradient.flatten().float() * factors.gradient_scale
    m = _multiply_add(g, factors.rest1, _widened(state.state1, state.absmax1, MAP1) * factors.beta1)
    v = _multiply_add(g * factors.rest2, g, _widened(state.state2, state.absmax2, MAP2) * factors.beta2)
    old = parameter.flatten().float()
    # Rounded from float64: PyTorch's own float32 root may be off by its last bit.
    change = m * factors.rate / (v.double().sqrt().float() / factors.root + factors.eps)
    stepped = (old - (change + old * factors.decay)).view(parameter.shape)
    if parameter.dtype == torch.bfloat16:
        round_reference(parameter, stepped, seed, offset)
    else:
        parameter.copy_(stepped)
    _narrow(m, state.state1, state.absmax1, _TABLE1)
    _narrow(v, state.state2, state.absmax2, _TABLE2)


def _multiply_add(x: Tensor, y: Tensor | float, z: Tensor) -> Tensor:
    """Return x * y + z of float32, rounded once."""
    product = x.double() * (y.double() if isinstance(y, Tensor) else y)  # exact
    total = product + z
    # What float64 has lost (Knuth's sum) must leave its trace in the last bit, or float32 could see a tie.
    of_z = total - product
    lost = (product - (total - of_z)) + (z - of_z)
    traceless = (lost != 0) & (total.view(torch.int64) & 1 == 0) & total.isfinite()
    return torch.where(traceless, total.nextafter(torch.full_like(lost, math.inf).copysign(lost)), total).float()


def _widened(codes: Tensor, absmax: Tensor, entries: Tensor) -> Tensor:
    """Return the elements (n,) that bytes of any shape stand for."""
    values = entries.to(codes.device)[codes.flatten().long()]
    return values * absmax.repeat_interleave(_GROUP)[: len(values)]


def _narrow(values: Tensor, codes: Tensor, absmax: Tensor, table: Tensor) -> None:
    """Write elements (n,) as bytes and largest magnitudes, of which NaN is none; NaN becomes the lowest entry."""
    groups = torch.nn.functional.pad(values, (0, -len(values) % _GROUP)).view(-1, _GROUP)
    absmax.copy_(groups.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(dim=1))
    # 0 / 0 is NaN, too.
    scaled = (groups * (1 / absmax)[:, None]).nan_to_num(nan=-1.0).clamp(-1, 1)
    places = _multiply_add((scaled + 1) * 0.5, _PLACES - 1, torch.full_like(scaled, 0.5)).long()
    codes.copy_(table.to(codes.device)[places].flatten()[: len(values)].view(codes.shape))


# ---- native CPU code ---------------------------------------------------------------------------------------


def native_step(
    parameter: Tensor, gradient: Tensor, state: Adam8bitState, factors: Factors, seed: int, offset: int
) -> None:
    """Take the step on contiguous tensors with native/adamw.cpp; arguments as for `reference`."""
    tensors = (parameter, gradient, *state.tensors(), MAP1, _TABLE1, MAP2, _TABLE2)
    numbers = (*factors, seed, offset, parameter.numel())
    _native.call("leap_adamw_8bit_step", *tensors, *numbers, parameter.dtype, gradient.dtype)


# ---- dispatch ----------------------------------------------------------------------------------------------


def eligible(backend: str, *tensors: Tensor) -> str | None:
    """Say why `backend` cannot take these tensors, or return None if it can."""
    if backend == "triton":
        return "it has no Triton kernel, being for weights in the CPU's memory (bitsandbytes has one for a GPU's)"
    return unsupported(backend, *tensors)


_OP = register("adamw_8bit_step_", eligible)
_STEP = {"native": native_step, "reference": reference}


def _run(
    parameter: Tensor,
    state1: Tensor,
    absmax1: Tensor,
    state2: Tensor,
    absmax2: Tensor,
    gradient: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    gradient_scale: float,
    seed: int,
    offset: int,
) -> None:
    if parameter.numel() == 0:
        return
    rate, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    factors = (beta1, 1 - beta1, beta2, 1 - beta2, gradient_scale, rate, root, eps, lr * weight_decay)
    singles = Factors(*(ctypes.c_float(factor).value for factor in factors))
    state = Adam8bitState(state1, absmax1, state2, absmax2)
    whole = parameter.contiguous()
    take = _STEP[choose(_OP, parameter, gradient, *state.tensors())]
    # The schema's integers are signed: the upper half of the seeds came as negative numbers.
    take(whole, gradient.contiguous(), state, singles, seed % (1 << 64), offset)
    if whole.data_ptr() != parameter.data_ptr():
        parameter.copy_(whole)


_step = define_in_place(
    "adamw_8bit_step_(Tensor(a!) parameter, Tensor(b!) state1, Tensor(c!) absmax1, Tensor(d!) state2, "
    "Tensor(e!) absmax2, Tensor gradient, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "SymInt step, float gradient_scale, SymInt seed, SymInt offset) -> ()",
    _run,
    written=5,
)


@torch.no_grad()
def adamw_8bit_step_(
    parameter: Tensor,
    gradient: Tensor,
    state: Adam8bitState,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    gradient_scale: float = 1.0,
    seed: int,
    offset: int,
) -> Tensor:
    """Take one step of AdamW on `parameter` and its `state`, in place, and return `parameter`.

    Weight, decay and update are combined in float32. A float32 parameter takes the result as it is, a bfloat16 one
    rounds it stochastically, once, with the bits that `stochastic_round_` draws for `seed` and `offset`: on average it
    moves as a float32 one would. Draw from new positions at every step.

    A NaN or infinity in the gradient makes its own weight NaN. In the state it stays within the 256 elements that share
    an `absmax`: NaN is stored as the lowest byte (of the first moment -0.99 absmax, of the second 0), as bitsandbytes
    does, but an infinite `absmax` makes all 256 weights NaN at the next step. Look at the norm first.

    Args:
        parameter: any shape, float32 or bfloat16; any strides under which no two elements share memory.
        gradient: shape and device of `parameter`, float32 or bfloat16, any strides.
        state: `Adam8bitState.zeros_like(parameter)`, or the state after the step before, also one of bitsandbytes.
        lr: learning rate, at least 0.
        beta1: 0 <= beta1 < 1; how much of the first moment stays.
        beta2: 0 <= beta2 < 1; how much of the second moment stays.
        eps: at least 0; added to the root of the second moment, after its bias correction.
        weight_decay: at least 0; decoupled: a step takes lr * weight_decay of the parameter.
        step: number of this step, from 1 on.
        gradient_scale: multiplies the gradient in float32: the coefficient that clips a global norm.
        seed: 0 <= seed < 2^64; for bfloat16.
        offset: position of the first element's bits; 0 <= offset, and offset + elements <= 2^63. For bfloat16.

    Returns:
        `parameter`.

    Raises:
        ValueError: on a wrong dtype, shape or device, overlapping `parameter`, a state that is not contiguous, or a
            number out of range.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    _check(parameter, gradient, state)
    _check_numbers(lr, beta1, beta2, eps, weight_decay, step)
    check_draws("adamw_8bit_step_", seed, offset, parameter.numel())
    numbers = (lr, beta1, beta2, eps, weight_decay, step, gradient_scale)
    _step(parameter, *state.tensors(), gradient, *numbers, seed if seed < 1 << 63 else seed - (1 << 64), offset)
    return parameter


def _check(parameter: Tensor, gradient: Tensor, state: Adam8bitState) -> None:
    for name, tensor in (("parameter", parameter), ("gradient", gradient)):
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"adamw_8bit_step_ takes float32 and bfloat16, but {name} is {tensor.dtype}.")
    check_writable("adamw_8bit_step_", "parameter", parameter, "gradient", gradient)
    for tensor, (dtype, shape) in zip(state.tensors(), _layout(parameter), strict=True):
        if (tensor.dtype, tuple(tensor.shape), tensor.device) != (dtype, shape, parameter.device):
            raise ValueError(
                f"adamw_8bit_step_ needs a state of {dtype} {shape} on {parameter.device}, not {tensor.dtype} "
                f"{tuple(tensor.shape)} on {tensor.device}: start with Adam8bitState.zeros_like(parameter)."
            )
        if not tensor.is_contiguous():
            raise ValueError("adamw_8bit_step_ needs a contiguous state, whose groups of 256 elements are in order.")


def _check_numbers(lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"adamw_8bit_step_ needs {name} of at least 0, not {value}.")
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= value < 1:
            raise ValueError(f"adamw_8bit_step_ needs {name} in [0, 1), not {value}.")
    if step < 1:
        raise ValueError(f"adamw_8bit_step_ counts steps from 1, not {step}.")
