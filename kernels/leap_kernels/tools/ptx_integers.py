"""Integer PTX instructions, evaluated for all threads of a program at once: what addresses are made of.

A value is a uint64 array, one entry a thread, with the bits above the register's width zero; a predicate is a
boolean array; None is a value that depends on data. Instructions that this module does not know give None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[Any]
Value = Lanes | None

_COMPARISONS: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_BITWISE: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def width(type_name: str) -> int:
    """Return the bits of a PTX type such as `u32`."""
    return int(type_name.lstrip("abcdefghijklmnopqrstuvwxyz"))


def truncate(value: Lanes, bits: int) -> Lanes:
    """Keep the low `bits` of every lane."""
    return value.astype(np.uint64) & np.uint64((1 << bits) - 1)


def number(value: Lanes, type_name: str) -> Lanes:
    """Read the lanes as numbers of a PTX type: int64 for a signed one, else uint64."""
    unsigned = truncate(value, width(type_name))
    if not type_name.startswith("s"):
        return unsigned
    unused = np.int64(64 - width(type_name))
    return (unsigned.view(np.int64) << unused) >> unused


def evaluate(opcode: str, operands: Sequence[Value]) -> Value:
    """Return the result of an instruction such as `mad.wide.s32`, or None if it depends on data."""
    name, *modifiers = opcode.split(".")
    known = [operand for operand in operands if operand is not None]
    if len(known) < len(operands) or not modifiers:
        return None
    type_name = modifiers[-1]
    if type_name == "pred":
        return _on_predicates(name, [value.astype(np.bool_) for value in known])
    if type_name[0] not in "sub" or not type_name[1:].isdigit():
        return None
    bits = width(type_name)
    if name == "setp":
        return _compare(modifiers, known)
    if name == "selp":
        return np.where(known[2].astype(np.bool_), truncate(known[0], bits), truncate(known[1], bits))
    if name == "cvt":
        # From the last type to the one before; a floating-point one on either side reads or makes data.
        whole = modifiers[-2][0] in "sub" and modifiers[-2][1:].isdigit()
        return truncate(number(known[0], type_name), width(modifiers[-2])) if whole else None
    if name in ("mul", "mad"):
        return _multiply(modifiers, known)
    result = _ON_NUMBERS[name](*(number(value, type_name) for value in known)) if name in _ON_NUMBERS else None
    return None if result is None else truncate(result, bits)


def _on_predicates(name: str, flags: list[Lanes]) -> Value:
    if name in _BITWISE:
        return _BITWISE[name](flags[0], flags[1])
    return {"not": ~flags[0], "mov": flags[0]}.get(name)


def _compare(modifiers: list[str], known: list[Lanes]) -> Value:
    comparison, type_name = _COMPARISONS.get(modifiers[0]), modifiers[-1]
    if comparison is None:
        return None
    result = comparison(number(known[0], type_name), number(known[1], type_name))
    combine = next((modifier for modifier in modifiers[1:-1] if modifier in _BITWISE), None)
    return result if combine is None else _BITWISE[combine](result, known[2].astype(np.bool_))


def _multiply(modifiers: list[str], known: list[Lanes]) -> Value:
    """Evaluate `mul` and `mad`; products are exact for types up to 32 bits, and modulo 2^64 beyond."""
    type_name, bits = modifiers[-1], width(modifiers[-1])
    product = number(known[0], type_name) * number(known[1], type_name)
    if "hi" in modifiers:
        if bits > 32:
            return None
        product = product >> product.dtype.type(bits)
    elif "wide" in modifiers:
        bits *= 2
    total = product.view(np.uint64)
    for addend in known[2:]:
        total = total + addend.astype(np.uint64)
    return truncate(total, bits)


def _divide(first: Lanes, second: Lanes) -> Lanes:
    """Divide towards zero, as PTX does and NumPy does not."""
    quotient = np.abs(first) // np.abs(second)
    return np.where((first < 0) != (second < 0), -quotient, quotient)


def _shift(shift: Callable[[Lanes, Lanes], Lanes], value: Lanes, by: Lanes) -> Lanes:
    # One lane of a warp never shifts by more than the others in address arithmetic, nor by the width.
    return shift(value, by.astype(value.dtype))


def _extract(value: Lanes, position: Lanes, length: Lanes) -> Lanes:
    """Return bits from the middle of a number; those of a signed one are a signed number."""
    one, length = np.uint64(1), length.view(np.uint64)
    bits = (value.view(np.uint64) >> position.view(np.uint64)) & ((one << length) - one)
    sign = np.uint64(value.dtype == np.int64) << (length - one)
    return (bits ^ sign) - sign


_ON_NUMBERS: dict[str, Callable[..., Lanes]] = {
    **_BITWISE,
    "mov": lambda value: value,
    "cvta": lambda value: value,
    "not": np.bitwise_not,
    "add": np.add,
    "sub": np.subtract,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "bfe": _extract,
    "div": _divide,
    "rem": lambda first, second: first - _divide(first, second) * second,
    "shl": lambda value, by: _shift(np.left_shift, value, by),
    "shr": lambda value, by: _shift(np.right_shift, value, by),
}
