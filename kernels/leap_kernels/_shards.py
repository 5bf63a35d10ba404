"""Ops on tensors that are spread over processes (`torch.distributed.tensor.DTensor`): each process takes its part.

That is right for an op of single elements however a tensor is divided, and for an op of whole samples where no sample
is. Other ops, lists of such tensors, and tensors divided in different ways, are refused by name: nothing is gathered
unasked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

Unit = Literal["element", "sample", "batch"]
"""What an op computes by itself: one element of its result, the results of one sample, or nothing less than all."""


def spread(arguments: tuple[Any, ...]) -> bool:
    """Say whether an argument, or a tensor in a list of them, is a DTensor."""
    kind = _dtensor()
    return kind is not None and (any(isinstance(argument, kind) for argument in arguments) or _listed(kind, arguments))


def on_parts(name: str, unit: Unit, run: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call `run` on this process's part of every tensor, and return its results as parts of tensors spread alike.

    Other tensors hold one number for each sample, and are the same in every process.

    Raises:
        TypeError: where parts alone do not do, tensors are divided in different ways, or lists hold such tensors.
    """
    kind = _dtensor()
    if _listed(kind, arguments):
        raise TypeError(f"{name} takes lists of tensors that one process holds: pass to_local() of each DTensor.")
    first = next(argument for argument in arguments if isinstance(argument, kind))
    mesh, placements = first.device_mesh, first.placements
    for argument in arguments:
        if isinstance(argument, kind) and (argument.device_mesh, argument.placements) != (mesh, placements):
            raise TypeError(
                f"{name} needs tensors divided alike over one mesh, not {placements} and {argument.placements}: "
                "redistribute one of them."
            )
    if not all(_fits(placement, unit) for placement in placements):
        raise TypeError(
            f"{name} cannot compute from parts of tensors divided as {placements}: redistribute them, or pass "
            "full_tensor() or to_local()."
        )
    parts = [argument.to_local() if isinstance(argument, kind) else argument for argument in arguments]
    by_sample = [placement if placement.is_shard(0) else _replicate() for placement in placements]
    for number, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and not isinstance(argument, kind):
            whole = kind.from_local(argument, mesh, [_replicate()] * mesh.ndim, run_check=False)
            parts[number] = whole.redistribute(placements=by_sample).to_local()
    local = next(part for part, argument in zip(parts, arguments, strict=True) if argument is first)

    def joined(result: Tensor) -> Any:
        of_samples = result.shape != local.shape
        shape = first.shape[:1] if of_samples else first.shape
        strides = [shape[dim + 1 :].numel() for dim in range(len(shape))]
        divided = by_sample if of_samples else placements
        return kind.from_local(result, mesh, divided, run_check=False, shape=shape, stride=tuple(strides))

    results = run(*parts)
    if isinstance(results, tuple):
        return tuple(joined(result) for result in results)
    return None if results is None else joined(results)


def _listed(kind: Any, arguments: tuple[Any, ...]) -> bool:
    lists = [argument for argument in arguments if isinstance(argument, list)]
    return any(isinstance(tensor, kind) for tensors in lists for tensor in tensors)


def _fits(placement: Any, unit: Unit) -> bool:
    """Say whether parts can be computed by themselves."""
    if placement.is_replicate():
        return True
    # Of a sum that is not yet added up, nothing can.
    return placement.is_shard() and (unit == "element" or (unit == "sample" and placement.is_shard(0)))


def _dtensor() -> Any:
    # Importing it takes half a second, and where nobody has, there are none.
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def _replicate() -> Any:
    return sys.modules["torch.distributed.tensor"].Replicate()
