"""What attention does to queries and keys before it compares them: a norm over each head, then a rotation.

    n   = x * weight / sqrt(mean(x^2) + eps)                  over each head, of width D
    out = (n_a cos - n_b sin, n_b cos + n_a sin)              for each pair (n_a, n_b)

Pairs are neighbours (2i, 2i + 1) where the layout is "interleaved", and (i, i + D/2) where it is "halves". The two
kinds of tokens of a joint attention, with weights of their own, go into one output: nothing concatenates them.

Backward, with g the gradient at `out`, d that at n and r = 1 / sqrt(mean(x^2) + eps), which is computed again:

    d  = (g_a cos + g_b sin, g_b cos - g_a sin)
    dx = r (weight d - x r^2 mean(weight d x))
    dweight = sum of d x r over batch, tokens and heads

Root mean square norm: arXiv:1910.07467. Rotary embedding: arXiv:2104.09864.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._arguments import FLOATS
from ._dispatch import choose, current, register, resumed, unsupported
from ._library import define
from ._norm_rope import WIDEST, Rotation, native_backward, native_forward, reference_backward, reference_forward
from ._norm_rope_triton import triton_backward, triton_forward


class QK(NamedTuple):
    """Queries and keys of a kind of tokens, (B, S, H, D), and the weights (D,) of their norms."""

    q: Tensor
    k: Tensor
    q_weight: Tensor | None = None
    k_weight: Tensor | None = None


# ---- dispatch and autograd ---------------------------------------------------------------------------------


def _unsupported(backend: str, *tensors: Tensor) -> str | None:
    reason = unsupported(backend, *tensors)
    if reason is None and backend == "native" and tensors[0].shape[-1] > WIDEST:
        return f"heads of more than {WIDEST} elements are computed by the reference"
    return reason


_OP = register("qk_norm_rope", _unsupported)
_FORWARD = {"triton": triton_forward, "native": native_forward, "reference": reference_forward}
_BACKWARD = {"triton": triton_backward, "native": native_backward, "reference": reference_backward}


class _Run(NamedTuple):
    """A tensor of queries or keys whose tokens become tokens `first` to `end` of an output."""

    x: Tensor
    weight: Tensor | None
    number: int
    """Of x among the arguments; that of its weight is two more."""
    output: int
    first: int
    end: int


def _runs(arguments: Sequence[Any]) -> Iterator[_Run]:
    """Yield those of the arguments of the op: q, k, their weights, then q, k and weights of what comes before."""
    for number in (0, 1):
        x, before = arguments[number], arguments[number + 4]
        first = 0 if before is None else before.shape[1]
        if before is not None:
            yield _Run(before, arguments[number + 6], number + 4, number, 0, first)
        yield _Run(x, arguments[number + 2], number, number, first, first + x.shape[1])


def _fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    q, k = (run for run in _runs(arguments) if run.number < 2)
    batch, _, heads, width = q.x.shape
    return q.x.new_empty(batch, q.end, heads, width), k.x.new_empty(batch, k.end, k.x.shape[2], width)


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    forward = _FORWARD[choose(_OP, *(a for a in arguments if isinstance(a, Tensor)))]
    outputs, rotation = _fake(*arguments), Rotation(*arguments[8:])
    for run in _runs(arguments):
        out = outputs[run.output]
        part = out if run.x.shape[1] == out.shape[1] else out[:, run.first : run.end]
        forward(run.x, run.weight, rotation.part(run.first, run.end), part)
    return outputs


def _run_backward(grad_q: Tensor, grad_k: Tensor, *rest: Any) -> list[Tensor]:
    *arguments, wanted = rest
    backward = _BACKWARD[choose(_OP, grad_q, grad_k, *(a for a in arguments if isinstance(a, Tensor)))]
    rotation, grads = Rotation(*arguments[8:]), (grad_q, grad_k)
    found: dict[int, Tensor | None] = {}
    for run in _runs(arguments):
        if wanted[run.number] or wanted[run.number + 2]:
            found[run.number], found[run.number + 2] = backward(
                grads[run.output][:, run.first : run.end],
                run.x,
                run.weight,
                rotation.part(run.first, run.end),
                wanted[run.number + 2],
            )
    gradients = [found[number] for number, asked in enumerate(wanted) if asked]
    return [gradient for gradient in gradients if gradient is not None]


def _fake_backward(grad_q: Tensor, grad_k: Tensor, *rest: Any) -> list[Tensor]:
    *arguments, wanted = rest
    return [
        torch.empty_like(argument, memory_format=torch.contiguous_format)
        for argument, asked in zip(arguments, wanted, strict=False)
        if asked
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.eps, ctx.halves, ctx.setting = *inputs[10:], current()


@once_differentiable
def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    arguments = (*ctx.saved_tensors, ctx.eps, ctx.halves)
    wanted = list(ctx.needs_input_grad[:8])
    found = iter(resumed(ctx.setting, _gradients, grad_q, grad_k, *arguments, wanted))
    return *(next(found) if asked else None for asked in wanted), None, None, None, None


_TENSORS = (
    "Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? q_before, Tensor? k_before, "
    "Tensor? q_before_weight, Tensor? k_before_weight, Tensor? cos, Tensor? sin, float eps, bool halves"
)
_gradients = define(
    f"qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, {_TENSORS}, bool[] wanted) -> Tensor[]",
    _run_backward,
    _fake_backward,
)
_norm_rope = define(f"qk_norm_rope({_TENSORS}) -> (Tensor, Tensor)", _run, _fake, _setup_context, _backward)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    eps: float = 1e-6,
    layout: Literal["interleaved", "halves"] = "interleaved",
    before: QK | None = None,
) -> tuple[Tensor, Tensor]:
    """Return queries and keys with each head normed and rotated: `rotate(x * weight / sqrt(mean(x^2) + eps))`.

    Arithmetic is float32 (float64 for float64 `q`), rounded once, to the dtype of `q` and `k`, also where weights are
    wider. Slices of a wider projection are read where they lie; a copy is made only where the elements of a head are
    not neighbours. The backward pass saves the arguments and nothing else. Gradients reach queries, keys and weights,
    once: they have no derivative of their own. cos and sin are constants.

    The tables have one number for each pair. A caller with tables (S, D) that hold each number twice, as diffusers'
    `FluxPosEmbed` gives them, passes `cos[:, ::2].contiguous()`, and one with complex ones `freqs.real.contiguous()`
    and `freqs.imag.contiguous()`: once for all blocks.

    Args:
        q: (B, S, H, D), float32, bfloat16, float16 or float64.
        k: (B, S, H', D), of the same dtype.
        q_weight: (D,), of any of these dtypes, or None for 1; `k_weight` likewise.
        k_weight: weight of the norm of keys.
        cos: (T, D/2) or (B, T, D/2) for T tokens (those `before` and S), or None for no rotation; `sin` likewise.
        sin: as `cos`.
        eps: what the norm adds to the mean square.
        layout: "interleaved" turns pairs of elements (2i, 2i + 1), "halves" pairs (i, i + D/2).
        before: queries (B, S', H, D) and keys (B, S', H', D) of tokens that come before these, such as those of a
            text before an image, and their weights.

    Returns:
        Queries (B, T, H, D) and keys (B, T, H', D), contiguous, with T = S, or S' + S with `before`.

    Raises:
        ValueError: on a wrong shape, dtype, device or layout.
        BackendUnavailable: in strict mode, if the backend asked for cannot run.
    """
    own = QK(q, k, q_weight, k_weight)
    _check(own, cos, sin, layout, before)
    first = (None,) * 4 if before is None else tuple(before)
    outputs: tuple[Tensor, Tensor] = _norm_rope(*own, *first, cos, sin, float(eps), layout == "halves")
    return outputs


def _check(own: QK, cos: Tensor | None, sin: Tensor | None, layout: str, before: QK | None) -> None:
    q, kinds = own.q, (own,) if before is None else (own, before)
    if layout not in ("interleaved", "halves"):
        raise ValueError(f'qk_norm_rope needs the layout "interleaved" or "halves", not {layout!r}.')
    if q.ndim != 4 or q.numel() == 0 or q.dtype not in FLOATS:
        raise ValueError(
            "qk_norm_rope needs queries (B, S, H, D) with at least one element, of float32, bfloat16, float16 or "
            f"float64, not {tuple(q.shape)} of {q.dtype}."
        )
    batch, _, heads, width = q.shape
    for kind in kinds:
        for name, x, count in (("queries", kind.q, heads), ("keys", kind.k, own.k.shape[2] if own.k.ndim == 4 else 0)):
            if x.shape != (batch, kind.q.shape[1], count, width) or x.numel() == 0:
                raise ValueError(
                    f"qk_norm_rope needs {name} of shape ({batch}, {kind.q.shape[1]}, heads, {width}) with as many "
                    f"heads as the others have, not {tuple(x.shape)}."
                )
            if x.dtype != q.dtype or x.device != q.device:
                raise ValueError(
                    f"qk_norm_rope needs {name} in {q.dtype} on {q.device}, as q is, not in {x.dtype} on {x.device}."
                )
        for name, weight in (("q_weight", kind.q_weight), ("k_weight", kind.k_weight)):
            if weight is not None and (weight.shape != (width,) or weight.device != q.device):
                raise ValueError(
                    f"qk_norm_rope needs {name} of shape ({width},) on {q.device}, not {tuple(weight.shape)} on "
                    f"{weight.device}."
                )
    tokens = sum(kind.q.shape[1] for kind in kinds)
    if (cos is None) != (sin is None):
        raise ValueError("qk_norm_rope needs both cos and sin, or neither.")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is None:
            continue
        shapes = ((tokens, width // 2), (batch, tokens, width // 2))
        # One by one: a compiler asks its sizes when they are compared, not when they are looked for.
        known = table.shape == shapes[0] or table.shape == shapes[1]
        if width % 2 or not known or table.device != q.device:
            raise ValueError(
                f"qk_norm_rope needs {name} of shape {shapes[0]} or {shapes[1]} on {q.device}, one number for each "
                f"pair of an even width, not {tuple(table.shape)} on {table.device}."
            )
    if cos is not None and sin is not None and cos.ndim != sin.ndim:
        raise ValueError("qk_norm_rope needs cos and sin of one shape.")
