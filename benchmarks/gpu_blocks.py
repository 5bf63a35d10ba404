"""What the GPU report measures of blocks: as PyTorch runs them, compiled, and patched to the ops of leap_kernels."""

from __future__ import annotations

import copy
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from leap_kernels import patch
from leap_kernels.tools.bench_measures import Clock
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.tables import markdown
from leapalign.config import load_config
from leapalign.models.velocity import prompted_velocity
from leapalign.planning.model_skeleton import KNOWN_MODELS, skeleton
from leapalign.planning.simulate import Spectator

MODELS = {
    "flux1": "black-forest-labs/FLUX.1-dev",
    "flux2": "black-forest-labs/FLUX.2-klein-base-4B",
    "stable_diffusion_3": "stabilityai/stable-diffusion-3.5-medium",
    "qwen_image": "Qwen/Qwen-Image",
    "z_image": "Tongyi-MAI/Z-Image",
}
"""The smallest of each family."""
FEW_LAYERS = {"num_layers": 2, "num_single_layers": 1, "n_layers": 1, "dual_attention_layers": [0]}
"""Of two, as the last block of Stable Diffusion 3.5 is not like the others."""
HEADS = 2
"""Of a block in a dry run."""
COLUMNS = ("eager", "compile", "patched")
PASSES = {"forward": "forward", "forward_backward": "forward and backward"}
WARM_UP, TURNS = 3, 20


def measured_blocks(name: str, device: torch.device, dry: bool = False) -> list[dict[str, Any]]:
    """A line for each kind of block of a model of `MODELS`: milliseconds of each pass, in each column.

    Sizes and dtype are the published ones, for two images of 720 x 720. In a ``dry`` run widths and images are tiny,
    and the compiler makes no code.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = _few_layers(KNOWN_MODELS[MODELS[name]], Path(folder), dry)
        transformer, calls = _called(folder, 64 if dry else 720)
    real = _built(type(transformer), settings, device)
    return [_measured(real.get_submodule(block), *given, device, dry) for block, given in calls.items()]


def block_table(lines: list[dict[str, Any]]) -> str:
    """What `measured_blocks` returns, in Markdown."""
    rows = [
        [line["block"], shown, *(f"{line['milliseconds'][column][name]:.3f}" for column in COLUMNS)]
        for line in lines
        for name, shown in PASSES.items()
    ]
    return markdown(["block", "pass", *(f"{column}, ms" for column in COLUMNS)], rows)


def _few_layers(source: Path, folder: Path, dry: bool) -> dict[str, Any]:
    """Copy the configs of a model into ``folder``, with few blocks of each kind, and return the transformer's."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    path = folder / "transformer" / "config.json"
    settings = json.loads(path.read_text())
    settings |= {key: value for key, value in FEW_LAYERS.items() if key in settings}
    if dry:
        width = HEADS * sum(settings.get("axes_dims", [settings.get("attention_head_dim")]))
        narrow = dict.fromkeys(("num_attention_heads", "n_heads", "n_kv_heads"), HEADS)
        narrow |= dict.fromkeys(("dim", "caption_projection_dim"), width)
        settings |= {key: value for key, value in narrow.items() if key in settings}
    path.write_text(json.dumps(settings))
    return settings


def _called(folder: str, side: int) -> tuple[nn.Module, dict[str, tuple[Any, Any]]]:
    """The transformer on tensors without memory, and what it calls a block of each kind with, by name."""
    sizes = (f"model.height={side}", f"model.width={side}", "model.dtype=bfloat16", "rollout.batch_size=2")
    config = load_config(Path("tiny"), (f"model.path={folder}", *sizes))
    calls: dict[str, tuple[Any, Any]] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    parts = skeleton(config, mode)
    transformer = parts.model.transformer
    kinds = {type(module): name for name, module in transformer.named_modules() if _is_first(transformer, name)}

    def note(name: str) -> Callable[..., None]:
        return lambda _, arguments, options: calls.update({name: (arguments, options)})

    for name in kinds.values():
        transformer.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True)
    with Spectator(), mode, torch.no_grad():
        latents = parts.model.draw_noise(range(2))
        prompted_velocity(parts.model, parts.embeddings)(latents, torch.full((2,), 0.5))
    return transformer, calls


def _is_first(transformer: nn.Module, name: str) -> bool:
    """Of a list of blocks. Of lists with the same kind, the last is the trunk."""
    parent, _, number = name.rpartition(".")
    return number == "0" and isinstance(dict(transformer.named_children()).get(parent), nn.ModuleList)


def _built(kind: Any, settings: dict[str, Any], device: torch.device) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return kind.from_config(settings)
    finally:
        torch.set_default_dtype(before)


def _measured(block: nn.Module, arguments: Any, options: Any, device: torch.device, dry: bool) -> dict[str, Any]:
    given = tree_map_only(Tensor, lambda like: _drawn(like, device), (arguments, options))
    compiled, patched = copy.deepcopy(block), copy.deepcopy(block)
    torch._dynamo.reset()
    compiled.compile(backend="aot_eager" if dry else "inductor", fullgraph=True)
    done = patch(patched)
    columns = dict(zip(COLUMNS, (block, compiled, patched), strict=True))
    passes = dict(zip(PASSES, (_forward, _forward_backward), strict=True))
    clock, seconds = Clock(device), {column: {name: [] for name in PASSES} for column in COLUMNS}
    for turn in range(1 if dry else WARM_UP + TURNS):
        for column, module in columns.items():
            for name, run in passes.items():
                taken, _ = clock.seconds(partial(run, module, *given))
                if dry or turn >= WARM_UP:
                    seconds[column][name].append(taken)
    return {
        "block": type(block).__name__,
        "milliseconds": {
            column: {name: 1e3 * statistics.median(turns) for name, turns in one.items()}
            for column, one in seconds.items()
        },
        "ops": sorted({op for ops in done.replaced.values() for op in ops}),
    }


def _drawn(like: Tensor, device: torch.device) -> Tensor:
    """Of a fake tensor's shape and dtype: random numbers, with a gradient in bfloat16, or masks that hide nothing."""
    if not (like.is_floating_point() or like.is_complex()):
        return torch.ones(like.shape, dtype=like.dtype, device=device)
    drawn = torch.randn(like.shape, dtype=like.dtype, device=device)
    return drawn.requires_grad_(like.dtype == torch.bfloat16)


@torch.no_grad()
def _forward(block: nn.Module, arguments: Any, options: Any) -> None:
    block(*arguments, **options)


def _forward_backward(block: nn.Module, arguments: Any, options: Any) -> None:
    outputs = [out for out in tree_leaves(block(*arguments, **options)) if isinstance(out, Tensor)]
    given = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    starts = [torch.ones_like(out) for out in outputs]
    torch.autograd.grad(outputs, [*given, *block.parameters()], starts, allow_unused=True)
