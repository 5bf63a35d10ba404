"""What a training step holds for its backward pass at FLUX.1-dev's sizes, as a trainer has it and patched: bytes.

    python benchmarks/dropped_in.py > benchmarks/results/dropped_in.jsonl

Runs the code of kernels/docs/trainers.md on tensors without memory, one image of 720 x 720 in bfloat16, with gradient
through the last step; all weights are trained. Counted are activations alive when the loss is there: nothing of
weights, of gradients or of a reward. ``recomputed``: with ``enable_gradient_checkpointing`` of diffusers, in the
transformer, or in the transformer and the decoder.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from leap_kernels import patch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from leapalign.planning.ledger import StorageLedger
from leapalign.planning.model_skeleton import KNOWN_MODELS

PAGE = Path(__file__).parents[1] / "kernels" / "docs" / "trainers.md"
FLUX = KNOWN_MODELS["black-forest-labs/FLUX.1-dev"]
RECOMPUTED = {"nothing": (), "transformer": ("transformer",), "both": ("transformer", "vae")}
STEPS = {"steps": 2, "gradient_steps": 1}


def page_code() -> dict[str, Any]:
    """The functions of the page, before and after; not its example."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)[:2]:
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)
    return names


def models(sizes: dict[str, Any]) -> dict[str, Any]:
    """On fake tensors, within their mode; ``sizes``: of the transformer, otherwise than FLUX.1-dev's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        transformer = FluxTransformer2DModel.from_config(
            {**FluxTransformer2DModel.load_config(FLUX, subfolder="transformer"), **sizes}
        )
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(FLUX, subfolder="vae"))
    finally:
        torch.set_default_dtype(before)
    return {"transformer": transformer.train(), "vae": vae.train().requires_grad_(False)}


class Scheduler(FlowMatchEulerDiscreteScheduler):
    """Its noise levels are real numbers, among fake tensors, too."""

    def __init__(self) -> None:
        with unset_fake_temporarily():
            super().__init__(shift=3.0)

    def set_timesteps(self, *arguments: Any, **options: Any) -> None:
        with unset_fake_temporarily():
            super().set_timesteps(*arguments, **options)


def held(loss_of: Callable[..., Any], parts: dict[str, Any], side: int) -> int:
    """Bytes that the graph of the loss of one image of ``side`` pixels holds."""
    tokens = (side // 16) ** 2
    conditions = {
        "encoder_hidden_states": torch.empty(1, 512, 4096, dtype=torch.bfloat16),
        "pooled_projections": torch.empty(1, 768, dtype=torch.bfloat16),
        "guidance": torch.empty(1),
        "img_ids": torch.empty(tokens, 3),
        "txt_ids": torch.empty(512, 3),
    }
    noise = torch.empty(1, tokens, 64, dtype=torch.bfloat16)
    with StorageLedger() as ledger:
        for module in parts.values():
            ledger.exclude(*module.parameters(), *module.buffers())
        ledger.exclude(noise, *conditions.values())
        loss = loss_of(**parts, scheduler=Scheduler(), reward=_reward, noise=noise, conditions=conditions, **STEPS)
        assert loss.requires_grad
        return ledger.live


def _reward(images: torch.Tensor) -> torch.Tensor:
    return images.mean(dim=(1, 2, 3))


def measured(recomputed: str, side: int = 720, **sizes: Any) -> dict[str, Any]:
    """The line of one way to recompute."""
    code, found = page_code(), {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        parts = models(sizes)
        for name in RECOMPUTED[recomputed]:
            parts[name].enable_gradient_checkpointing()
        found["before_bytes"] = held(code["loss_before"], parts, side)
        for module in parts.values():
            assert not patch(module).left
        found["after_bytes"] = held(code["loss_after"], parts, side)
    return {"recomputed": recomputed, "side": side, **found, "ratio": found["after_bytes"] / found["before_bytes"]}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for recomputed in RECOMPUTED:
        print(json.dumps(measured(recomputed)), flush=True)
