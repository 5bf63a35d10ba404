"""Moments kept as bytes, as bitsandbytes keeps them ("8-bit Optimizers via Block-wise Quantization", Dettmers, 2021).

In row-major order, 256 elements share their largest magnitude `absmax`, and an element is map[byte] * absmax.

The byte of x = element / absmax is not always that of the nearest entry of the map: bitsandbytes, on a CPU, rounds x
to the nearest of 65536 even steps from -1 to 1 first. Hence 0 becomes 2e-5, and nothing smaller exists.

With s = 1 for the signed map and s = 2 for the other, decade d = 0 .. 6 has the n = 2^d s entries
10^(d - 6) (0.1 + 0.9 (i + 1/2) / n), i < n. So the number n + i of an entry has, as a float, the decade in its exponent
and the place within in its mantissa. The Triton code reads both off, and needs neither map nor table in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._triton import fma, jit, tl

GROUP = 256
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
TABLE1, TABLE2 = _bytes_of_places(MAP1), _bytes_of_places(MAP2)


def layout(parameter: Tensor) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
    """Return dtype and shape of the four tensors of a state."""
    return 2 * ((torch.uint8, tuple(parameter.shape)), (torch.float32, (-(-parameter.numel() // GROUP),)))


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
        return cls(*(parameter.new_zeros(shape, dtype=dtype) for dtype, shape in layout(parameter)))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return state1, absmax1, state2 and absmax2."""
        return self.state1, self.absmax1, self.state2, self.absmax2


# So that `torch.load` takes checkpoints with such states in its safe mode.
torch.serialization.add_safe_globals([Adam8bitState])


# ---- reference -----------------------------------------------------------------------------------------------


def multiply_add(x: Tensor, y: Tensor | float, z: Tensor) -> Tensor:
    """Return x * y + z of float32, rounded once."""
    product = x.double() * (y.double() if isinstance(y, Tensor) else y)  # exact
    total = product + z
    # What float64 has lost (Knuth's sum) must leave its trace in the last bit, or float32 could see a tie.
    of_z = total - product
    lost = (product - (total - of_z)) + (z - of_z)
    traceless = (lost != 0) & (total.view(torch.int64) & 1 == 0) & total.isfinite()
    return torch.where(traceless, total.nextafter(torch.full_like(lost, math.inf).copysign(lost)), total).float()


def widened(codes: Tensor, absmax: Tensor, entries: Tensor) -> Tensor:
    """Return the elements (n,) that bytes of any shape stand for."""
    values = entries.to(codes.device)[codes.flatten().long()]
    return values * absmax.repeat_interleave(GROUP)[: len(values)]


def narrow(values: Tensor, codes: Tensor, absmax: Tensor, table: Tensor) -> None:
    """Write elements (n,) as bytes and largest magnitudes, of which NaN is none; NaN becomes the lowest entry."""
    groups = torch.nn.functional.pad(values, (0, -len(values) % GROUP)).view(-1, GROUP)
    absmax.copy_(groups.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(dim=1))
    # 0 / 0 is NaN, too.
    scaled = (groups * (1 / absmax)[:, None]).nan_to_num(nan=-1.0).clamp(-1, 1)
    places = multiply_add((scaled + 1) * 0.5, _PLACES - 1, torch.full_like(scaled, 0.5)).long()
    codes.copy_(table.to(codes.device)[places].flatten()[: len(values)].view(codes.shape))


# ---- Triton ------------------------------------------------------------------------------------------------


@jit
def _edge(share):  # type: ignore[no-untyped-def]
    """Return 0.1 + 0.9 * share to the bit of torch.linspace: from the nearer end, and rounded once."""
    return tl.where(share < 0.5, fma(share, 0.9, 0.1), fma(1.0 - share, -0.9, 1.0))


@jit
def map_entries(SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the map: `MAP1` or `MAP2`."""
    code = tl.arange(0, 256)
    number = (tl.abs(code - 127) if SIGNED else code + 1).to(tl.float32)
    exponent = number.to(tl.uint32, bitcast=True) & 0x7F800000
    entries = exponent.to(tl.float32, bitcast=True)
    share = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    place = number - entries
    decade = (exponent >> 23).to(tl.int32) - (127 if SIGNED else 128)
    unit = tl.full([256], 1.0, tl.float32)
    for below in tl.static_range(6):
        unit = tl.where(decade == below, 10.0 ** (below - 6), unit)
    entry = (_edge(place * share) + _edge((place + 1.0) * share)) * 0.5 * unit
    entry = tl.where(code == 255, 1.0, entry)
    if SIGNED:
        return tl.where(code < 127, -entry, tl.where(code == 127, 0.0, entry))
    return tl.where(code == 0, 0.0, entry)


@jit
def map_bytes(x, SIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the bytes of float32 elements in units of their absmax: what `TABLE1` or `TABLE2` holds, as uint8."""
    FINEST: tl.constexpr = 64 if SIGNED else 128
    # False for NaN.
    x = tl.where(x > -1.0, x, -1.0)
    x = tl.where(x < 1.0, x, 1.0)
    # The nearest of the 65536 steps, rounded as those that the table is made of.
    step = tl.floor(fma(x + 1.0, 32767.5, 0.5)) * (2 / 65535) - 1.0
    size = tl.abs(step)
    # Of the decade above 0.1, and then of those below; the two lowest are nearer to 0 than any step.
    scale = tl.full(x.shape, 1 / 0.9, tl.float32)
    entries = tl.full(x.shape, FINEST, tl.float32)
    for down in tl.static_range(1, 5):
        # Midway between the last entry of this decade and the first of the next.
        below = size < 0.1**down * (1 + 0.9 * 2**down / FINEST)
        scale = tl.where(below, 10**down / 0.9, scale)
        entries = tl.where(below, FINEST / 2**down, entries)
    mantissa = fma(size, scale, 0.8 / 0.9)
    number = (tl.where(mantissa < 2.0, mantissa, 1.9999) * entries).to(tl.int32)
    number = tl.where(size < 1 - 0.225 / FINEST, number, 2 * FINEST)
    if SIGNED:
        # No entry stands for -1.
        return tl.where(step > 0.0, 127 + number, 127 - tl.minimum(number, 127)).to(tl.uint8)
    return tl.where(step > 0.0, number - 1, 0).to(tl.uint8)


@jit
def widened_group(codes, absmax, SIGNED: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the elements that bytes (GROUPS * GROUP,) stand for, given the absmax (GROUPS,) of each group."""
    return tl.gather(map_entries(SIGNED), codes.to(tl.int32), 0) * _spread(absmax, GROUPS, GROUP)


@jit
def narrowed_group(values, SIGNED: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the bytes of elements (GROUPS * GROUP,) and the absmax (GROUPS,) of each group."""
    size = tl.abs(values)
    # False for NaN.
    absmax = tl.max(tl.reshape(tl.where(size >= 0.0, size, 0.0), [GROUPS, GROUP]), axis=1)
    return map_bytes(values * _spread(tl.div_rn(1.0, absmax), GROUPS, GROUP), SIGNED), absmax


@jit
def _spread(per_group, GROUPS: tl.constexpr, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Repeat a number of each group for its elements."""
    return tl.reshape(tl.broadcast_to(per_group[:, None], [GROUPS, GROUP]), [GROUPS * GROUP])
