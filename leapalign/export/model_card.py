"""``README.md`` of exported weights: what they are, how to use them, and the licence they inherit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from leapalign.config import Config
from leapalign.export.base import CARD, TRANSFORMER
from leapalign.models.adapter_files import Adapter
from leapalign.models.folder import read_index
from leapalign.optimizers.weight_average import base_share

_WEIGHTS = {
    "average": "average: the running average (EMA) over iterations",
    "last": "last: those after the last iteration",
    "best": "best: the running average (EMA) where the held-out reward was highest",
}
_LICENCE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Export:
    """What a card tells of."""

    config: Config
    base: Path
    """Folder of the base model on this machine."""
    iterations: int
    weights: str
    """One of `leapalign.runs.checkpoint.WEIGHTS`."""
    layout: str
    adapter: Adapter | None
    file: str
    """The name of the weights' file, where they are in one of the original layout."""


def model_card(export: Export) -> str:
    """Markdown with a YAML front matter, as model hubs read it. No folder of this machine is named."""
    licence = licence_of(export.base)
    settings = ModelCardData(
        base_model=base_name(export),
        pipeline_tag="text-to-image",
        library_name="diffusers" if export.layout == "diffusers" else None,
        tags=["leapalign", *(["lora"] if export.adapter else [])],
        **licence,
    )
    said = (
        "The licence is the base model's, as its card states it."
        if licence
        else f"The licence of `{base_name(export)}` applies to these weights, but could not be read: state it above "
        "before you pass them on."
    )
    return f"---\n{settings.to_yaml()}\n---\n\n{_trained(export)}\n\n## Use\n\n{_use(export)}\n\n## Licence\n\n{said}\n"


def base_name(export: Export) -> str:
    """The hub id, or the name of the folder."""
    path = Path(export.config.model.path)
    return path.resolve().name if path.is_dir() or path.is_absolute() else export.config.model.path


def in_comfyui(adapter: bool) -> str:
    """Where ComfyUI looks for the file, and what loads it."""
    if adapter:
        return "put it in ComfyUI/models/loras and load it with LoraLoaderModelOnly"
    return "put it in ComfyUI/models/diffusion_models and load it with Load Diffusion Model"


def licence_of(base: Path) -> dict[str, Any]:
    """The licence fields in the front matter of the model card of the folder ``base``; none where it states none."""
    try:
        stated = metadata_load(base / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {name: stated[name] for name in _LICENCE_FIELDS if name in stated} if "license" in stated else {}


def _trained(export: Export) -> str:
    config = export.config
    what = (
        f"Adapters of rank {export.adapter.rank} and alpha {export.adapter.alpha:g} beside"
        if export.adapter
        else "All weights of the transformer of"
    )
    method, options = config.method["name"], _listed({k: v for k, v in config.method.items() if k != "name"})
    # What a pipeline of diffusers needs to be told.
    linear = " of sigmas=linspace(1, 1/steps, steps)" if config.rollout.sigmas == "linear" else ""
    rows = {
        "method": f"{method}{f' ({options})' if options else ''}",
        "reward": ", ".join(str(reward["name"]) for reward in config.rewards),
        "iterations": f"{export.iterations} of {config.train.batch_size} images",
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}",
        "sampling": f"{config.rollout.num_steps} steps{linear}, {config.model.width} x {config.model.height} pixels",
        "weights": _weights(export),
        "layout": export.layout,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return (
        f"# {base_name(export)}, aligned with {rows['reward']}\n\n{what} `{base_name(export)}`, trained with leapalign "
        f"on a differentiable reward.\n\n| | |\n| --- | --- |\n{table}"
    )


def _weights(export: Export) -> str:
    """Which they are; of an average, what it is made of."""
    ema = export.config.ema
    if export.weights == "last":
        return _WEIGHTS[export.weights]
    warmup = " with a warm-up" if ema.warmup else ""
    start = f", from iteration {ema.start} on" if ema.start else ""
    interval = f", every {ema.interval} iterations" if ema.interval > 1 else ""
    share = base_share(ema, export.iterations)
    return (
        f"{_WEIGHTS[export.weights]}; decay {ema.decay:g}{warmup}{start}{interval}; {share:.0%} of it is the base model"
    )


def _use(export: Export) -> str:
    """What loads the weights, with ``.`` for the folder of the card."""
    name = base_name(export)
    if export.layout == "comfyui":
        place = in_comfyui(export.adapter is not None)
        return f"`{export.file}` is for ComfyUI: {place}, with text encoders and VAE of `{name}`."
    index = read_index(str(export.base))
    dtype = f"torch_dtype=torch.{export.config.model.dtype}"
    imports = ["DiffusionPipeline"]
    if export.layout == "original":
        imports.append(index[TRANSFORMER][1])
        lines = [
            f"transformer = {imports[1]}.from_single_file(",
            f'    "{export.file}", config="{name}", subfolder="{TRANSFORMER}", {dtype}',
            ")",
            f'pipeline = DiffusionPipeline.from_pretrained("{name}", transformer=transformer, {dtype})',
        ]
    elif export.adapter:
        lines = [
            f'pipeline = DiffusionPipeline.from_pretrained("{name}", {dtype})',
            'pipeline.load_lora_weights(".")',
        ]
    else:
        lines = [f'pipeline = DiffusionPipeline.from_pretrained(".", {dtype})']
    return "\n".join(["```python", "import torch", f"from diffusers import {', '.join(imports)}", "", *lines, "```"])


def _listed(options: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items())
