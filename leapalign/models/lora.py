"""Low-rank adapters (arXiv 2106.09685) by peft: the model stays as it is, and small matrices beside it are trained."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from leapalign.config import ModelConfig
from leapalign.inputs.validation import UserError, shortened
from leapalign.memory.blocks import in_blocks, linear_layers
from leapalign.models.adapter_files import Adapter, published_adapter, write_adapter
from leapalign.streams import ADAPTER_STREAM, seed_of

ADAPTER = "default"


@dataclasses.dataclass(frozen=True)
class AdapterPlan:
    """Adapters of ``rank`` and ``alpha`` for the linear layers called ``modules``; start: what they begin as, or None
    for what changes nothing."""

    rank: int
    alpha: float
    modules: list[str]
    start: Adapter | None


def planned_adapter(transformer: Any, config: ModelConfig) -> AdapterPlan:
    """What ``config`` asks for beside ``transformer``.

    Without ``lora_targets`` every linear layer of the blocks is adapted, but for modulation. What ``lora_path`` names
    says rank, alpha and layers. Raises UserError where no layer matches, or the two do not fit together.
    """
    linear = linear_layers(transformer)
    if config.lora_path is not None:
        start = published_adapter(config.lora_path)
        _require_fit(start, config, linear)
        return AdapterPlan(start.rank, start.alpha, start.modules, start)
    rank = config.lora_rank
    alpha = float(rank) if config.lora_alpha is None else config.lora_alpha
    return AdapterPlan(rank, alpha, _targets(transformer, config, linear), None)


def add_adapter(transformer: Any, plan: AdapterPlan) -> None:
    """Freezes ``transformer`` and adds the matrices of ``plan``, in float32, of values that change nothing.

    Their product is scaled by ``alpha / rank``.
    """
    transformer.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(0, ADAPTER_STREAM, plan.rank))
        # Peft divides the alpha as it is; its type says int.
        alpha: Any = plan.alpha
        adapter = LoraConfig(r=plan.rank, lora_alpha=alpha, target_modules=plan.modules)
        inject_adapter_in_model(adapter, transformer, ADAPTER)
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def start_adapter(transformer: Any, plan: AdapterPlan) -> None:
    """Sets the matrices of `add_adapter` to those that ``plan`` starts from, if any."""
    if plan.start is not None:
        transformer.load_state_dict(adapter_parameters(plan.start), strict=False)


def has_adapter(transformer: Any) -> bool:
    return bool(getattr(transformer, "peft_config", None))


@contextlib.contextmanager
def without_adapter(transformer: Any) -> Iterator[None]:
    """Within the block ``transformer`` is what it was before adapters were added."""
    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapter_alpha(transformer: Any) -> float:
    """Of the adapters that ``transformer`` has."""
    return float(transformer.peft_config[ADAPTER].lora_alpha)


def save_adapter(transformer: Any, folder: Path) -> None:
    """Writes the adapters of ``transformer`` to ``folder``, in diffusers' layout."""
    state = transformer.state_dict()
    matrices = {
        name.replace(f".{ADAPTER}.", "."): state[name].detach().to("cpu").contiguous()
        for name, parameter in transformer.named_parameters()
        if parameter.requires_grad
    }
    write_adapter(Adapter(transformer.peft_config[ADAPTER].r, adapter_alpha(transformer), matrices), folder)


def adapter_parameters(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Its matrices by the names of the transformer's parameters."""
    return {name.replace(".weight", f".{ADAPTER}.weight"): value for name, value in adapter.matrices.items()}


def _targets(transformer: Any, config: ModelConfig, linear: Mapping[str, nn.Linear]) -> list[str]:
    if config.lora_targets:
        targets = [name for name in linear if name.endswith(config.lora_targets)]
    else:
        targets = [name for name in linear if in_blocks(transformer, name) and not _modulates(name)]
    if not targets:
        raise UserError(
            f"no linear layer of the transformer ends with {' or '.join(config.lora_targets)}; correct "
            f"model.lora_targets, such as to_q"
        )
    return targets


def _modulates(name: str) -> bool:
    return any(part.startswith("norm") or "mod" in part for part in name.split("."))


def _require_fit(start: Adapter, config: ModelConfig, linear: Mapping[str, nn.Linear]) -> None:
    """Raises UserError where the adapter of ``lora_path`` is for other layers, or other keys disagree with it."""
    where = f"the adapter in model.lora_path '{config.lora_path}'"
    for key, asked, found in (
        ("lora_rank", config.lora_rank or None, start.rank),
        ("lora_alpha", config.lora_alpha, start.alpha),
    ):
        if asked is not None and asked != found:
            raise UserError(f"model.{key} is {asked:g}, and {where} has {found:g}; leave model.{key} out")
    for module in start.modules:
        matrices = [start.matrices[f"{module}.lora_{side}.weight"] for side in ("A", "B")]
        layer = linear.get(module)
        widths = (layer.in_features, layer.out_features) if layer is not None else None
        if widths != (matrices[0].shape[-1], matrices[1].shape[0]):
            why = "no such linear layer" if widths is None else f"one of {widths[0]} inputs and {widths[1]} outputs"
            raise UserError(
                f"{where} does not fit '{config.path}': it adapts {shortened(module)}, and the model has {why}; choose "
                "an adapter of this model"
            )
    targets = {name for name in linear if name.endswith(config.lora_targets)} if config.lora_targets else None
    other = sorted(targets ^ set(start.modules)) if targets is not None else []
    if other:
        raise UserError(f"model.lora_targets and {where} disagree about {other[0]}; leave model.lora_targets out")
