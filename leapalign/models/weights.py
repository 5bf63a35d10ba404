"""What is trained of a transformer, all weights or an adapter, as files that diffusers reads."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from leapalign.models.adapter_files import FILE as ADAPTER_FILE
from leapalign.models.adapter_files import read_adapter
from leapalign.models.lora import adapter_alpha, adapter_parameters, has_adapter, save_adapter
from leapalign.parallel.sharding import as_held
from leapalign.storage.modes import save_pretrained


def save_weights(transformer: Any, folder: Path, values: Sequence[Tensor] | None = None) -> None:
    """What is trained, as diffusers reads it: the transformer, or its adapter.

    values: written in place of what the trainable parameters hold, one for each, in their dtypes.
    """
    with _stating(transformer, values) if values is not None else contextlib.nullcontext():
        if has_adapter(transformer):
            save_adapter(transformer, folder)
        else:
            save_pretrained(transformer, folder)


@contextlib.contextmanager
def _stating(transformer: Any, values: Sequence[Tensor]) -> Iterator[None]:
    """Within the block the state of ``transformer`` has these values."""
    trained = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    instead = dict(zip(trained, values, strict=True))

    def put(module: Any, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
        state.update(instead)

    hook = transformer.register_state_dict_post_hook(put)
    try:
        yield
    finally:
        hook.remove()


def load_weights(transformer: Any, folder: Path) -> None:
    """Sets what is trained to what `save_weights` wrote. Raises RuntimeError for weights of another model."""
    values = read_weights(folder)
    missing, unexpected = transformer.load_state_dict(as_held(transformer, values), strict=not has_adapter(transformer))
    lost = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad} & set(missing)
    if lost or unexpected:
        raise RuntimeError(
            f"its adapter has {sorted([*unexpected, *lost])[0]}, the model has not, or the other way round"
        )
    if has_adapter(transformer) and (alpha := read_adapter(folder).alpha) != adapter_alpha(transformer):
        raise RuntimeError(f"its adapter has alpha {alpha:g}, the model {adapter_alpha(transformer):g}")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the safetensors files in ``folder``, by the names of the transformer's parameters."""
    if (folder / ADAPTER_FILE).exists():
        return adapter_parameters(read_adapter(folder))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no safetensors in {folder}")
    return {name: value for file in files for name, value in load_file(file).items()}
