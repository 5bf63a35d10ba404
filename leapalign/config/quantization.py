"""What frozen weights of few bits go with."""

from __future__ import annotations

from typing import Protocol


class _Model(Protocol):
    @property
    def quantization(self) -> str | None: ...
    @property
    def adapted(self) -> bool: ...
    @property
    def compile(self) -> bool: ...


class _Memory(Protocol):
    @property
    def weights(self) -> str: ...


def refuse_quantization(model: _Model, memory: _Memory) -> None:
    """Raises ValueError where ``model.quantization`` does not go with another key."""
    if model.quantization is None:
        return
    if not model.adapted:
        raise ValueError(
            "model.quantization rounds weights that stay frozen; train adapters (model.lora_rank), or set it to null"
        )
    if memory.weights == "streamed":
        raise ValueError("quantized weights are not streamed; set memory.weights to resident")
