"""What a case of `bench` is: an op's inputs, the plain PyTorch a trainer would write, and the op itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Shape = tuple[int, ...]
ShapeOf = Callable[[Shape], Shape]

DTYPE = torch.bfloat16
SEED = 7


@dataclass(frozen=True)
class Case:
    """One op to measure, on bfloat16 latents.

    `latents` are the inputs (B, ...) with the dtype of each, `per_sample` the inputs (B,) in float32, `beside` others
    whose shapes follow from that of latents, with the dtype of each, and `differentiable` those that get gradients.
    `plain` and `fused` (the op) take the same inputs and return the same outputs; gradients come back from the first
    of them, or the first `sources`. Latents have the shapes in `sizes`, or where they are None, those of a sampler,
    and "quick" is a tiny one. `exact` gives the outputs in float64 where `plain` cannot.
    `forward_bytes` and `backward_bytes` are the least that an element costs, an element being one of the latents, or
    a sample where there are none; without a backward pass the latter is None.
    """

    op: str
    _: KW_ONLY
    variant: str = ""
    latents: dict[str, torch.dtype]
    per_sample: tuple[str, ...] = ()
    beside: Mapping[str, tuple[ShapeOf, torch.dtype]] = field(default_factory=dict)
    plain: Callable[[Inputs], Outputs]
    fused: Callable[[Inputs], Outputs]
    forward_bytes: int
    backward_bytes: int | None = None
    differentiable: tuple[str, ...] = ()
    sources: int = 1
    sizes: Mapping[str, Shape] | None = None
    quick: Shape = (2, 33, 16)
    exact: Callable[[Inputs], Outputs] | None = None

    @property
    def name(self) -> str:
        """The op, with the variant if there are several."""
        return f"{self.op}/{self.variant}" if self.variant else self.op

    def inputs(self, shape: Shape, device: torch.device) -> Inputs:
        """Draw the inputs, the same in every run: latents normal, per-sample values in (0, 1)."""
        generator = torch.Generator().manual_seed(SEED)
        values = {name: torch.randn(shape, generator=generator).to(device, to) for name, to in self.latents.items()}
        values |= {name: torch.rand(shape[:1], generator=generator).to(device) for name in self.per_sample}
        values |= {
            name: torch.randn(of(shape), generator=generator).to(device, to) for name, (of, to) in self.beside.items()
        }
        for name in self.differentiable:
            values[name].requires_grad_()
        return values

    def elements(self, shape: Shape) -> int:
        """Return how many elements latents of `shape` have: those that the bytes are counted by."""
        return torch.Size(shape).numel() if self.latents else shape[0]
