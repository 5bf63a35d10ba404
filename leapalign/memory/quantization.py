"""Frozen weights of few bits, as beside the adapters of QLoRA (arXiv 2305.14314), by bitsandbytes.

Of a block's linear layers the matrices are quantized, modulation included; embeddings, norms, biases and what comes
after the blocks stay as they are. A matrix ``W (out, in)`` is widened to the model's dtype for each product with it,
``y = x W^T + b``, forwards and backwards: gradients are those of a model that has the widened weights. So it is with
``int8``, too: bitsandbytes' own layer of eight bits rounds its inputs as well, and keeps them beside the graph, where
recomputing blocks would free nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from leapalign.inputs.validation import UserError, brief
from leapalign.memory.blocks import linear_layers

BLOCK = 64
"""Weights that share a scale. Rows that are not of whole blocks stay as they are: on a CPU bitsandbytes widens them
wrongly, and on a GPU slowly."""


def require_quantizer(kind: str | None, dtype: torch.dtype, device: torch.device, setting: str) -> None:
    """Raises UserError, naming ``setting``, where bitsandbytes as it is installed cannot do ``kind`` on ``device``."""
    if kind is None:
        return
    try:
        layer = KINDS[kind](nn.Linear(BLOCK, 2, dtype=dtype), device).to(device)
        layer(torch.ones(1, BLOCK, dtype=dtype, device=device))
    except Exception as error:  # of the import, or of a library that is built for other devices
        raise UserError(
            f"{setting} {kind} needs bitsandbytes for {device.type}, which does not work here ({brief(error)}); "
            f"install it with pip install bitsandbytes, or do without {setting}"
        ) from None


def quantize(network: nn.Module, kind: str, device: torch.device, inside: Callable[[str], bool], setting: str) -> None:
    """Quantizes the frozen ``network`` as ``kind`` says, matrix by matrix, on ``device``, where they stay.

    inside: whether a linear layer of that name is quantized, if its rows are of whole blocks. The same weights on the
    same kind of device give the same bits. Raises UserError, naming ``setting``, where there is none.
    """
    found = [
        (name, layer)
        for name, layer in linear_layers(network).items()
        if inside(name) and layer.in_features % BLOCK == 0
    ]
    if not found:
        raise UserError(
            f"no block of {type(network).__name__} has a matrix whose rows are multiples of {BLOCK} weights; do "
            f"without {setting}"
        )
    for name, layer in found:
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, KINDS[kind](layer, device).train(layer.training))


def scales(network: nn.Module) -> Iterator[Tensor]:
    """What bitsandbytes' layers in ``network`` hold beside their parameters and buffers."""
    for layer in linear_layers(network).values():
        state = getattr(layer.weight, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def _nf4(layer: nn.Linear, device: torch.device) -> nn.Linear:
    """``layer`` with four bits a weight on ``device``, the 16 values of NF4; its bias is as and where it was.

    Scales are in bytes themselves, 256 of which share one: 4.13 bits a weight in all.
    """
    library: Any = import_module("bitsandbytes.nn")
    made: nn.Linear = library.Linear4bit(
        *(layer.in_features, layer.out_features, False),
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    weight = library.Params4bit(layer.weight.detach(), blocksize=BLOCK, quant_type="nf4", module=made)
    made.weight, made.bias = weight.to(device), layer.bias
    # On some processors it would pack weights anew at the first forward without gradient, and have none from then on.
    made.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return made


def _int8(layer: nn.Linear, device: torch.device) -> nn.Linear:
    """``layer`` with eight bits a weight on ``device``, evenly spaced; its bias is as and where it was.

    With the scales, in float32, 8.5 bits a weight.
    """
    return _EightBits(layer, device)


KINDS: Mapping[str, Callable[[nn.Linear, torch.device], nn.Linear]] = {"nf4": _nf4, "int8": _int8}
"""By name: makes a layer of one."""


class _EightBits(nn.Linear):
    """``weight``: bytes, unsigned; an element is ``code[byte]`` times the scale of its block."""

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        library: Any = import_module("bitsandbytes.functional")
        steps = torch.linspace(-1, 1, 255, device=device)
        code = torch.cat([steps[:127], steps.new_zeros(1), steps[127:]])  # bitsandbytes' own linear map of 256
        weight, state = library.quantize_blockwise(layer.weight.detach().to(device), code=code, blocksize=BLOCK)
        # Seen as int8: of weights of any other dtype T5 takes the dtype for its activations.
        self.weight, self.bias = nn.Parameter(weight.view(torch.int8), requires_grad=False), layer.bias
        self.register_buffer("scale", state.absmax)
        self.register_buffer("code", state.code)
        self._dtype = layer.weight.dtype

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _Product.apply(input, self.bias, self._dtype, self.weight, self.scale, self.code)
        return product


class _Product(torch.autograd.Function):
    """``x W^T + b``, whose graph holds bytes: W is widened once more for the gradient ``g W`` of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, dtype: torch.dtype, weight: Tensor, scale: Tensor, code: Tensor
    ) -> Tensor:
        ctx.dtype = dtype
        ctx.save_for_backward(weight, scale, code)
        return nn.functional.linear(x, _widened(dtype, weight, scale, code), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0] @ _widened(ctx.dtype, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
        return gradient, *(None,) * 5


def _widened(dtype: torch.dtype, weight: Tensor, scale: Tensor, code: Tensor) -> Tensor:
    widened: Tensor = torch.ops.bitsandbytes.dequantize_blockwise(weight.view(torch.uint8), scale, code, BLOCK, dtype)
    return widened
