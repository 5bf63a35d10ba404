"""A model and rewards of the sizes that a configuration names, from configs alone: no weights are read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from leapalign.config import Config
from leapalign.inputs.networks import require_class
from leapalign.inputs.validation import UserError, brief
from leapalign.methods import get_method
from leapalign.models import assembled, family_of, guided, quantize_blocks
from leapalign.models.folder import holds
from leapalign.models.lora import add_adapter, planned_adapter
from leapalign.models.protocol import FlowModel
from leapalign.planning.quantized import made_of_fakes
from leapalign.reward_gradient import RewardTerm
from leapalign.rewards import reward_terms, simulated_reward
from leapalign.storage.embedded import resolve
from leapalign.trainer import Trainer, require_steps

SKELETONS = Path(__file__).parent / "skeletons"
KNOWN_MODELS = {
    "black-forest-labs/FLUX.1-dev": SKELETONS / "flux1_dev",
    "black-forest-labs/FLUX.1-schnell": SKELETONS / "flux1_schnell",
    "black-forest-labs/FLUX.2-dev": SKELETONS / "flux2_dev",
    "black-forest-labs/FLUX.2-klein-4B": SKELETONS / "flux2_klein_4b",
    "black-forest-labs/FLUX.2-klein-base-4B": SKELETONS / "flux2_klein_4b",
    "black-forest-labs/FLUX.2-klein-9B": SKELETONS / "flux2_klein_9b",
    "black-forest-labs/FLUX.2-klein-base-9B": SKELETONS / "flux2_klein_9b",
    "Qwen/Qwen-Image": SKELETONS / "qwen_image",
    "stabilityai/stable-diffusion-3.5-large": SKELETONS / "stable_diffusion_3_5_large",
    "stabilityai/stable-diffusion-3.5-medium": SKELETONS / "stable_diffusion_3_5_medium",
    "Tongyi-MAI/Z-Image": SKELETONS / "z_image",
    "Tongyi-MAI/Z-Image-Turbo": SKELETONS / "z_image",
}
"""By hub id. Those that share a folder have the same networks; Z-Image-Turbo's noise levels are others."""


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model and rewards of the sizes that a configuration names, and prompts."""

    model: FlowModel
    rewards: list[RewardTerm]
    embeddings: Any
    """As `leapalign.models.encode_prompts` returns them."""


def skeleton(config: Config, making: contextlib.AbstractContextManager[Any], rollouts: int = 1) -> Skeleton:
    """Built from the configs alone, weights at random, on the tensors that the (reusable) context ``making`` makes.

    With the prompts of so many ``rollouts``.

    Raises UserError where the model's configs cannot be read.
    """
    folder = Path(KNOWN_MODELS.get(config.model.path, resolve(config.model.path)))
    model = assembled(_Configs(str(folder), getattr(torch, config.model.dtype), making), config.model)
    if config.model.quantization is not None:
        with made_of_fakes():
            quantize_blocks(model, config.model, torch.device("cpu"))
    if config.model.adapted:
        plan = planned_adapter(model.transformer, config.model)
        # Peft moves adapters to the device of their layer. Fake ones are there, and cannot be moved.
        with making, patch.object(nn.Module, "to", lambda module, *_, **__: module):
            add_adapter(model.transformer, plan)
    with making:
        rewards = reward_terms(config, simulated_reward)
        size = rollouts * min(config.rollout.batch_size, config.train.batch_size)
        longest = family_of(str(folder)).text_length.longest
        embeddings = model.blank_embeddings(size, _tokenizer_length(folder, longest))
    return Skeleton(model, rewards, guided(config.model, embeddings, embeddings[:1]))


def skeleton_trainer(config: Config, parts: Skeleton, device: torch.device) -> Trainer:
    """Of iterations of as many images as ``parts`` have prompts. Raises UserError as `require_steps`."""
    size = len(parts.embeddings)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))
    method, prompts = get_method(**config.method), ["a prompt"] * size
    require_steps(config, parts.model, method)
    return Trainer.assembled(config, parts.model, prompts, parts.embeddings, parts.rewards, method, device)


def _tokenizer_length(folder: Path, longest: int) -> int:
    """``longest``, or what the tokenizer of the embeddings allows, where it is there and says less."""
    for name in ("tokenizer_3", "tokenizer_2", "tokenizer"):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            length = json.loads((folder / name / "tokenizer_config.json").read_text()).get("model_max_length")
            return min(int(length or longest), longest)
    return longest


@dataclasses.dataclass
class _Configs:
    """Parts made from their configs alone, networks in ``dtype`` within the context ``making``."""

    path: str
    dtype: torch.dtype
    making: contextlib.AbstractContextManager[Any]

    def holds(self, name: str) -> bool:
        return holds(self.path, name)

    def part(self, kind: Any, name: str) -> Any:
        require_class(kind, self.path, f"the {name}", "model.path", name)
        try:
            settings = kind.load_config(self.path, subfolder=name)
            if not issubclass(kind, nn.Module):
                return kind.from_config(settings)
            with self.making, _default_dtype(self.dtype):
                network = kind.from_config(settings)
                _cast_saved_buffers(network, self.dtype)
        except Exception as error:  # wrong values in a config make the class raise anything
            raise UserError(
                f"cannot read the config of the {name} in '{self.path}' ({brief(error)}); check model.path"
            ) from None
        return network


def _cast_saved_buffers(network: nn.Module, dtype: torch.dtype) -> None:
    """As reading them from a file would: some models make theirs in float32, whatever the default."""
    saved = network.state_dict(keep_vars=True)
    for prefix, module in network.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name in saved and buffer.is_floating_point():
                setattr(module, name.rpartition(".")[2], buffer.to(dtype))


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    # Models on fake tensors cannot be cast: they are built in their dtype.
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
