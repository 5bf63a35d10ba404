"""What a configuration needs, found by running it: the real training iteration on tensors without memory.

The model's real classes are built from their configs on fake tensors, and the trainer runs an iteration of two
rollouts: the second finds the first one's gradients. The ledger counts every storage on the way. Nothing is computed,
so that peaks of the largest models are known in a minute or two on any machine; what a GPU's allocator and libraries
take beyond tensors is not in them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from leapalign import reward_gradient, surrogate
from leapalign.config import Config
from leapalign.embedded import resolve
from leapalign.memory.ledger import Peak, StorageLedger
from leapalign.memory.residency import STAGE, TRAFFIC, Role, Stage, made_for
from leapalign.methods import get_method
from leapalign.models import assembled
from leapalign.models.folder import read_index
from leapalign.models.lora import add_adapter
from leapalign.models.protocol import FlowModel
from leapalign.models.velocity import GuidedEmbeddings
from leapalign.networks import require_class
from leapalign.reward_gradient import RewardTerm
from leapalign.rewards import reward_terms, simulated_reward
from leapalign.trainer import Trainer
from leapalign.validation import UserError, brief

SKELETONS = Path(__file__).parent / "skeletons"
KNOWN_MODELS = {
    "black-forest-labs/FLUX.1-dev": SKELETONS / "flux1_dev",
    "Qwen/Qwen-Image": SKELETONS / "qwen_image",
    "stabilityai/stable-diffusion-3.5-large": SKELETONS / "stable_diffusion_3_5_large",
    "black-forest-labs/FLUX.2-klein-base-9B": SKELETONS / "flux2_klein_base_9b",
    "Tongyi-MAI/Z-Image": SKELETONS / "z_image",
}
TEXT_TOKENS = 512
"""FLUX.1's length of a prompt; a model folder's tokenizer may say less."""
STAGES: tuple[Stage, ...] = ("rollout", "reward", "surrogate", "optimizer")

GPUS = {"RTX 4090": (150e12, 25e9), "H100": (989e12, 50e9)}
"""Dense bfloat16 FLOP/s and bytes/s each way between host and device, to compute times with."""


@dataclasses.dataclass(frozen=True)
class Simulation:
    """An iteration's needs. Stages: ``rollout``, ``reward``, ``surrogate``, ``optimizer``.

    device, host: the peak of each stage. flops, traffic: of the simulated rollout, times the configuration's number
    of them.
    """

    device: dict[Stage, Peak]
    host: dict[Stage, Peak]
    trainable_parameters: int
    flops: dict[Stage, float]
    traffic: dict[tuple[Stage, str], float]

    @property
    def device_peak(self) -> int:
        return max(peak.total for peak in self.device.values())

    @property
    def host_peak(self) -> int:
        return max((peak.total for peak in self.host.values()), default=0)


_COUNTED_AS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}
"""Operations that PyTorch has no count of FLOPs for, and those that compute the same."""


class _Spectator(TorchDispatchMode):
    """Counts FLOPs by stage, and lets code that asks a fake tensor for its value go on with 1."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[Stage] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        count = flop_registry.get(_COUNTED_AS.get(packet, packet))
        if count is not None:
            self.flops[STAGE.get()] += count(*args, **(kwargs or {}), out_val=result)
        return result


class _Replay:
    """Runs a function once on tensors of given shapes, and from then on only repeats what it returned and cost."""

    def __init__(
        self, run: Callable[..., Any], mode: FakeTensorMode, ledger: StorageLedger, flops: Counter[Stage]
    ) -> None:
        self._run, self._mode, self._ledger, self._flops = run, mode, ledger, flops
        self._seen: dict[Any, tuple[Any, dict[Role, int], Counter[Any], Counter[Any]]] = {}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        shapes = tuple(argument.shape for argument in arguments if isinstance(argument, Tensor))
        key = (shapes, options.get("needs_input"))
        if key in self._seen:
            made, more, flops, traffic = self._seen[key]
            self._flops.update(flops)
            TRAFFIC.update(traffic)
            self._ledger.reach(more)
            with self._mode:
                return tree_map_only(partial, lambda make: make(), made)
        flops, traffic = self._flops.copy(), TRAFFIC.copy()
        result, more = self._ledger.peak_of(lambda: self._run(*arguments, **options))
        made = tree_map_only(Tensor, lambda t: partial(torch.empty, t.shape, dtype=t.dtype), result)
        self._seen[key] = (made, more, self._flops - flops, TRAFFIC - traffic)
        return result


def simulate(config: Config, iterate: Callable[[Trainer], Any] = Trainer.train_one) -> Simulation:
    """Runs an iteration of ``config`` on fake tensors. Raises UserError where the model's configs cannot be read.

    It has one rollout, and gradients from rollouts before it: all but the first add to what is there.

    iterate: runs it; another's to compare with.
    """
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, attention="native"))
    ledger, spectator = StorageLedger(), _Spectator()
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with ledger, spectator:
        parts = skeleton(config, mode)
        _count_parts(ledger, parts)
        trainer = skeleton_trainer(config, parts, torch.device("cpu"))
        parameters = [p for p in trainer.model.transformer.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: _count_gradient(ledger, p))
        if trainer.optimizer.gradient_sink is None:
            with made_for("gradients"):
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
        before = TRAFFIC.copy()
        with _replayed(trainer.model, mode, ledger, spectator.flops):
            iterate(trainer)
    rollouts = config.train.batch_size / min(config.rollout.batch_size, config.train.batch_size)
    scale = {name: 1.0 if name == "optimizer" else rollouts for name in STAGES}
    return Simulation(
        device={name: ledger.device.peaks[name] for name in STAGES if name in ledger.device.peaks},
        host={name: ledger.host.peaks[name] for name in STAGES if name in ledger.host.peaks},
        trainable_parameters=sum(parameter.numel() for parameter in parameters),
        flops={name: scale[name] * spectator.flops[name] for name in STAGES},
        traffic={(name, way): scale[name] * size for (name, way), size in (TRAFFIC - before).items() if name in scale},
    )


@contextlib.contextmanager
def _replayed(model: Any, mode: FakeTensorMode, ledger: StorageLedger, flops: Counter[Stage]) -> Iterator[None]:
    """Within the block, what an iteration does over and over runs once."""
    velocity, vjp, chunk = model.velocity, surrogate._velocity_vjp, reward_gradient._chunk_gradient
    rollout = _Replay(velocity, mode, ledger, flops)
    model.velocity = lambda *arguments: (velocity if torch.is_grad_enabled() else rollout)(*arguments)
    surrogate._velocity_vjp = _Replay(vjp, mode, ledger, flops)
    reward_gradient._chunk_gradient = _Replay(chunk, mode, ledger, flops)
    try:
        yield
    finally:
        model.velocity, surrogate._velocity_vjp, reward_gradient._chunk_gradient = velocity, vjp, chunk


def _count_gradient(ledger: StorageLedger, parameter: Tensor) -> None:
    if parameter.grad is not None:
        ledger.count(parameter.grad, role="gradients")


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
    if config.model.lora_rank:
        # Peft moves adapters to the device of their layer. Fake ones are there, and cannot be moved.
        with making, patch.object(nn.Module, "to", lambda module, *_, **__: module):
            add_adapter(model.transformer, config.model)
    with making:
        rewards = reward_terms(config, simulated_reward)
        size = rollouts * min(config.rollout.batch_size, config.train.batch_size)
        embeddings: Any = model.blank_embeddings(size, _longest_prompt(folder))
    if config.model.true_cfg_scale != 1:
        scale, batched = config.model.true_cfg_scale, config.model.true_cfg_batched
        embeddings = GuidedEmbeddings(embeddings, embeddings[:1], scale, batched)
    return Skeleton(model, rewards, embeddings)


def skeleton_trainer(config: Config, parts: Skeleton, device: torch.device) -> Trainer:
    """Of iterations of as many images as ``parts`` have prompts."""
    size = len(parts.embeddings)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size))
    method, prompts = get_method(**config.method), ["a prompt"] * size
    return Trainer.assembled(config, parts.model, prompts, parts.embeddings, parts.rewards, method, device)


def _count_parts(ledger: StorageLedger, parts: Skeleton) -> None:
    transformer, frozen = parts.model.transformer, [parts.model.decoder, *(term.reward for term in parts.rewards)]
    ledger.count(*transformer.parameters(), *transformer.buffers(), role="weights")
    for module in frozen:
        if isinstance(module, nn.Module):
            ledger.count(*module.parameters(), *module.buffers(), role="reward")
    embeddings = parts.embeddings
    ledger.exclude(*(embeddings.prompts if isinstance(embeddings, GuidedEmbeddings) else embeddings).tensors())


def _longest_prompt(folder: Path) -> int | None:
    """What the tokenizer of the embeddings allows; None where it does not say, or lies elsewhere."""
    for name in ("tokenizer_3", "tokenizer_2", "tokenizer"):
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            length = json.loads((folder / name / "tokenizer_config.json").read_text()).get("model_max_length")
            return int(length) if length and length < TEXT_TOKENS else None
    return None


@dataclasses.dataclass
class _Configs:
    """Parts made from their configs alone, networks in ``dtype`` within the context ``making``."""

    path: str
    dtype: torch.dtype
    making: contextlib.AbstractContextManager[Any]

    def holds(self, name: str) -> bool:
        return bool(read_index(self.path).get(name, [None])[0])

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


def step_seconds(found: Simulation, gpu: str) -> dict[Stage, dict[str, float]]:
    """Seconds that each stage would compute, and move bytes, on a GPU used to its full rate: computed, not measured."""
    rate, bandwidth = GPUS[gpu]
    return {
        name: {
            "compute": found.flops[name] / rate,
            "transfer": max(found.traffic.get((name, way), 0.0) for way in ("to_device", "to_host")) / bandwidth,
        }
        for name in STAGES
    }


def gib(size: float) -> float:
    """Bytes in GiB, rounded up to a hundredth."""
    return math.ceil(size / 2**30 * 100) / 100
