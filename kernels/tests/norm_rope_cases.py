"""Queries and keys that the tests of `qk_norm_rope` share, its formula, and what diffusers computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import tolerances
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from kernel_cases import BACKENDS, HALVES_AND_FLOAT, latents
from leap_kernels import QK, qk_norm_rope
from torch import Tensor

by_backend = pytest.mark.parametrize("backend", BACKENDS)


@dataclass(frozen=True)
class Case:
    """Sizes of q, as many heads of k, tokens before, and what is given."""

    q: tuple[int, int, int, int]
    k_heads: int
    before: int = 0
    layout: str = "interleaved"
    weights: bool = True
    tables: str = "shared"

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Draw float tensors by the names of the arguments, and the gradients at the outputs."""
        batch, tokens, heads, width = self.q
        drawn = {}
        for prefix, count in (("", tokens), ("before_", self.before)):
            if count:
                drawn[f"{prefix}q"] = latents(batch, count, heads, width, dtype=dtype)
                drawn[f"{prefix}k"] = latents(batch, count, self.k_heads, width, dtype=dtype)
                if self.weights:
                    drawn[f"{prefix}q_weight"] = latents(width, dtype=dtype)
                    drawn[f"{prefix}k_weight"] = latents(width, dtype=dtype)
        total = tokens + self.before
        if self.tables != "none":
            shape = (batch, total) if self.tables == "of each sample" else (total,)
            angles = 3 * torch.rand(*shape, width // 2, dtype=torch.float64)
            precise = torch.float64 if dtype == torch.float64 else torch.float32
            drawn |= {"cos": angles.cos().to(precise), "sin": angles.sin().to(precise)}
        grads = (latents(batch, total, count, width, dtype=dtype) for count in (heads, self.k_heads))
        return drawn | dict(zip(("grad_q", "grad_k"), grads, strict=True))


CASES = {
    "one-number": Case((1, 1, 1, 1), 1, tables="none"),
    "one-pair": Case((1, 1, 1, 2), 1),
    "narrow": Case((2, 3, 5, 6), 2),
    "narrow-halves": Case((2, 3, 2, 6), 2, layout="halves"),
    "odd-width": Case((2, 2, 3, 7), 3, tables="none"),
    "no-weights": Case((2, 5, 3, 8), 3, weights=False),
    "norm-only": Case((2, 4, 3, 16), 3, before=3, tables="none"),
    "joint": Case((2, 5, 4, 32), 4, before=3),
    "joint-halves": Case((2, 5, 4, 48), 2, before=1, layout="halves"),
    "tables-of-samples": Case((2, 7, 3, 64), 3, before=2, tables="of each sample"),
    "wide": Case((1, 5, 3, 128), 1),
    "more-tokens-than-a-program": Case((2, 9, 9, 128), 2, before=1),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
by_case_and_dtype = pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CASES),
        *((name, dtype) for name in ("narrow", "joint", "joint-halves", "wide") for dtype in HALVES_AND_FLOAT[1:]),
    ],
    ids=str,
)


def call(inputs: dict[str, Tensor], layout: str, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    own = {name: value for name, value in inputs.items() if not name.startswith(("before_", "grad_"))}
    before = None
    if "before_q" in inputs:
        before = QK(*(inputs.get(f"before_{name}") for name in QK._fields))  # type: ignore[arg-type]
    return qk_norm_rope(**own, eps=eps, layout=layout, before=before)  # type: ignore[arg-type]


def formula(inputs: dict[str, Tensor], layout: str, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, with rotations as products of complex numbers, in the dtype of the inputs."""

    def normed(name: str) -> Tensor:
        x = inputs[name]
        x = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
        return x * inputs[f"{name}_weight"] if f"{name}_weight" in inputs else x

    def rotated(x: Tensor) -> Tensor:
        if "cos" not in inputs:
            return x
        turn = torch.complex(inputs["cos"], inputs["sin"]).unsqueeze(-2)
        if layout == "halves":
            turned = torch.complex(*x.chunk(2, -1)) * turn
            return torch.cat([turned.real, turned.imag], -1)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    def joint(name: str) -> Tensor:
        parts = [normed(f"before_{name}")] if "before_q" in inputs else []
        return rotated(torch.cat([*parts, normed(name)], dim=1))

    return joint("q"), joint("k")


def diffusers_path(inputs: dict[str, Tensor], layout: str) -> tuple[Tensor, Tensor]:
    """What blocks of diffusers do, layer by layer, in the dtype of the inputs."""

    def normed(name: str) -> Tensor:
        weight = inputs.get(f"{name}_weight")
        norm = RMSNorm(inputs[name].shape[-1], 1e-6, elementwise_affine=weight is not None)
        if weight is not None:
            del norm.weight
            norm.weight = weight
        return norm(inputs[name])

    def joint(name: str) -> Tensor:
        parts = [normed(f"before_{name}")] if "before_q" in inputs else []
        x = torch.cat([*parts, normed(name)], dim=1)
        if "cos" not in inputs:
            return x
        doubled = [
            torch.cat([inputs[name]] * 2, -1) if layout == "halves" else inputs[name].repeat_interleave(2, -1)
            for name in ("cos", "sin")
        ]
        dim = -2 if layout == "halves" else -1
        # A sample at a time, as its tables are for one.
        samples = zip(x.split(1), *(table.expand(len(x), *table.shape[-2:]) for table in doubled), strict=True)
        return torch.cat(
            [apply_rotary_emb(one, tables, use_real_unbind_dim=dim, sequence_dim=1) for one, *tables in samples]
        )

    return joint("q"), joint("k")


def differentiated(function: Any, inputs: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Return outputs and gradients by name."""
    constants = ("cos", "sin", "grad_q", "grad_k")
    leaves = {name: value.detach().requires_grad_(name not in constants) for name, value in inputs.items()}
    outputs = function(leaves, layout)
    named = [name for name in inputs if name not in constants]
    grads = torch.autograd.grad(outputs, [leaves[n] for n in named], (inputs["grad_q"], inputs["grad_k"]))
    return {
        **{f"out {name}": value.detach() for name, value in zip("qk", outputs, strict=True)},
        **{f"at {name}": value for name, value in zip(named, grads, strict=True)},
    }


def heads_first(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same numbers, heads before tokens in memory, as attention gives its gradients."""
    return {n: x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x for n, x in inputs.items()}


def in_double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in inputs.items()}


def assert_accurate(case: Case, inputs: dict[str, Tensor], results: dict[str, Tensor], cut: bool = False) -> None:
    """Check errors against float64; `cut` allows bfloat16 that was cut off, not rounded. All is on the CPU."""
    dtype = inputs["q"].dtype
    exacts = differentiated(formula, in_double(inputs), case.layout)
    largest = {name: value.abs().max().item() for name, value in inputs.items()}
    factor = max([value for name, value in largest.items() if "weight" in name], default=1.0)
    grad = max(largest["grad_q"], largest["grad_k"])
    rstd = max(
        (value.double().square().mean(-1) + 1e-6).rsqrt().max().item()
        for name, value in inputs.items()
        if name in ("q", "k", "before_q", "before_k")
    )
    x = max(value for name, value in largest.items() if name in ("q", "k", "before_q", "before_k"))
    for name, exact in exacts.items():
        result = results[name]
        assert (result.dtype, result.shape) == (dtype, exact.shape), name
        assert result.is_contiguous(), name
        # The largest value on the way: of a head, of the gradient at it, of a term of the gradient at a weight.
        magnitude = 2 * x * rstd * factor if name.startswith("out") else 2 * rstd * grad * factor
        terms = case.q[3]
        if "weight" in name:
            magnitude, terms = 2 * x * rstd * grad, case.q[0] * (case.q[1] + case.before) * case.q[2]
            magnitude *= terms**0.5
        arithmetic, storage = tolerances.largest(exact, magnitude, terms, dtype, dtype)
        error = (result.double() - exact).abs().max().item()
        assert error <= arithmetic + (2 if cut else 1) * storage, name
