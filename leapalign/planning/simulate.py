"""What a configuration needs, found by running it: the real training iteration on tensors without memory.

The model's real classes are built from their configs on fake tensors. The trainer draws samples, is watched, and runs
an iteration of a rollout that finds an earlier one's gradients. The ledger counts every storage on the way. Nothing is
computed, so that peaks of the largest models are known in a minute or two on any machine. What a GPU's allocator would
reserve for these storages follows from its rules; what libraries take is not in it (`leapalign.planning.allowance`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from leapalign.config import Config
from leapalign.memory.checkpointing import prepare_decoder
from leapalign.memory.quantization import scales
from leapalign.memory.repetition import run_by
from leapalign.memory.residency import STAGE, TRAFFIC, Role, Stage, made_for, note_device_work, watched
from leapalign.method_gradient import Objective
from leapalign.models.patching import patch_networks
from leapalign.models.velocity import GuidedEmbeddings
from leapalign.planning.between import between_iterations, count_watch_rewards
from leapalign.planning.caching_allocator import Event, reserved
from leapalign.planning.gpu_norms import NormsCounted
from leapalign.planning.ledger import Peak, StorageLedger
from leapalign.planning.model_skeleton import Skeleton, skeleton, skeleton_trainer
from leapalign.planning.moved import COUNTED_AS, bytes_moved, is_product
from leapalign.probe.climb import ascent
from leapalign.reports.progress import progress
from leapalign.rewards import simulated_reward
from leapalign.trainer import Trainer
from leapalign.watch.watch import held_out_rewards

ITERATION: tuple[Stage, ...] = ("rollout", "reward", "surrogate", "optimizer")
BETWEEN: tuple[Stage, ...] = ("sampling", "watch", "saving")


class Rates(NamedTuple):
    """Of a GPU, by its data sheet."""

    flops: float
    """Dense, bfloat16, a second."""
    transfer: float
    """Bytes a second each way between host and device."""
    memory: float
    """Bytes a second of the device's memory."""


GPUS = {"RTX 4090": Rates(150e12, 25e9, 1.008e12), "H100": Rates(989e12, 50e9, 3.35e12)}
"""To compute times with."""
HOST_BANDWIDTH = 100e9
"""Bytes/s between the host's processor and its memory: an assumption, half of what eight channels of DDR4 give."""


@dataclasses.dataclass(frozen=True)
class Simulation:
    """A run's needs, by stages: those of `ITERATION`, and those of `BETWEEN` that the configuration has.

    device, host: the peak of each stage. reserved: bytes that a GPU's allocator holds in the end, with
    ``expandable_segments``. flops, traffic: of an iteration, by its stages: the simulated rollout's, times
    the configuration's number of them.
    """

    device: dict[Stage, Peak]
    host: dict[Stage, Peak]
    reserved: int
    trainable_parameters: int
    flops: dict[Stage, float]
    traffic: dict[tuple[Stage, str], float]

    @property
    def device_peak(self) -> int:
        return max(peak.total for peak in self.device.values())

    @property
    def host_peak(self) -> int:
        return max((peak.total for peak in self.host.values()), default=0)


class Spectator(StorageLedger):
    """Counts FLOPs by stage, too, and bytes that other operations move on the device, and lets code that asks a fake
    tensor for its value go on with 1."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[Stage] = Counter()
        self.norms = NormsCounted(note_device_work)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # makes nothing, and is more than half of all calls
            return func(*args)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if is_product(func):
            packet = func._overloadpacket
            count = flop_registry[COUNTED_AS.get(packet, packet)]
            self.flops[STAGE.get()] += count(*args, **(kwargs or {}), out_val=result)
        elif not self.norms.inside:
            size = bytes_moved(func, args, kwargs or {}, result)
            if size and self._on_device(result, *args):
                note_device_work(size)
        return result

    def _on_device(self, *values: Any) -> bool:
        """Whether the first tensor of an operation is."""
        for value in values:
            first = value[0] if isinstance(value, (tuple, list)) and value else value
            if isinstance(first, Tensor):
                return not self.in_host_memory(first)
        return False


class _Replay:
    """Runs each function once on tensors of given shapes, and from then on only repeats what it returned and cost."""

    def __init__(self, mode: FakeTensorMode, ledger: Spectator) -> None:
        self._mode, self._ledger, self._flops = mode, ledger, ledger.flops
        self._seen: dict[Any, tuple[Any, dict[Role, int], Counter[Any], Counter[Any], list[Event]]] = {}

    def __call__(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        shapes = tuple(argument.shape for argument in arguments if isinstance(argument, Tensor))
        # Of velocities the kind decides what runs: which of them carry gradient.
        kinds = tuple(map(type, arguments))
        key = (function, shapes, kinds, options.get("needs_input"), options.get("only_input"))
        if key in self._seen:
            made, more, flops, traffic, events = self._seen[key]
            self._flops.update(flops)
            TRAFFIC.update(traffic)
            self._ledger.reach(more)
            self._ledger.happen_again(events)
            with self._mode:
                return tree_map_only(partial, lambda make: make(), made)
        flops, traffic, began = self._flops.copy(), TRAFFIC.copy(), len(self._ledger.events)
        result, more = self._ledger.peak_of(lambda: function(*arguments, **options))
        made = tree_map_only(Tensor, lambda t: partial(torch.empty, t.shape, dtype=t.dtype), result)
        events = self._ledger.events[began:]
        self._seen[key] = (made, more, self._flops - flops, TRAFFIC - traffic, events)
        return result


def simulate(config: Config, iterate: Callable[[Trainer], Any] = Trainer.train_one) -> Simulation:
    """Runs ``config`` on fake tensors. Raises UserError where the model's configs cannot be read.

    First what comes between iterations, then an iteration. This has one rollout, and gradients from rollouts before it:
    all but the first add to what is there.

    iterate: runs the iteration; another's to compare with.
    """
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, attention="native"))
    ledger, mode = Spectator(), FakeTensorMode(allow_non_fake_inputs=True)
    with (
        progress("simulate, model", len(ITERATION), "stage") as bar,
        watched(_shown_on(bar)),
        ledger,
        ledger.norms.counted(),
    ):
        parts = skeleton(config, mode)
        _count_parts(ledger, parts)
        with mode:
            held_out = held_out_rewards(config, simulated_reward) if config.watch.every else {}
        count_watch_rewards(ledger, held_out, host=True)
        trainer = skeleton_trainer(config, parts, torch.device("cpu"))
        # Until here weights were on their way to their place.
        ledger.begin_events()
        # By itself: what is repeated counts for the stage that it ran in first, which is not the iteration's.
        with run_by(_Replay(mode, ledger)):
            between_iterations(trainer, ledger, held_out)
        parameters = [p for p in trainer.model.transformer.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(ledger.count_gradient)
        if trainer.optimizer.gradient_sink is None:
            with made_for("gradients"):
                for parameter in parameters:
                    parameter.grad = torch.empty_like(parameter)
        before = TRAFFIC.copy()
        with run_by(_Replay(mode, ledger)):
            iterate(trainer)
    rollouts = config.train.batch_size / min(config.rollout.batch_size, config.train.batch_size)
    scale = {name: 1.0 if name == "optimizer" else rollouts for name in ITERATION}
    device, host = ledger.device.peaks, ledger.host.peaks
    return Simulation(
        device={name: device[name] for name in (*ITERATION, *BETWEEN) if name in device},
        host={name: host[name] for name in (*ITERATION, *BETWEEN) if name in host},
        reserved=reserved(ledger.events),
        trainable_parameters=sum(parameter.numel() for parameter in parameters),
        flops={name: scale[name] * ledger.flops[name] for name in ITERATION},
        traffic={(name, way): scale[name] * size for (name, way), size in (TRAFFIC - before).items() if name in scale},
    )


def simulate_probe(config: Config) -> Peak:
    """The device's peak in a step of `leapalign.probe`, by role: the decoder, the rewards, what they keep; without the
    model. Raises UserError where the model's configs cannot be read."""
    ledger, mode = Spectator(), FakeTensorMode(allow_non_fake_inputs=True)
    with progress("simulate, probe", 1, "stage"):
        parts = skeleton(config, mode)
        with ledger, run_by(_Replay(mode, ledger)):
            _count_frozen(ledger, parts)
            patch_networks(parts.model, config.kernels)
            prepare_decoder(parts.model.decoder, config.memory)
            objective = Objective.of(config, parts.model.decode, parts.rewards)
            size = min(config.rollout.batch_size, len(parts.embeddings))
            latents = parts.model.draw_noise(range(size))
            ascent(objective, latents, ["a prompt"] * size, torch.ones(size))
    return ledger.device.peaks["reward"]


def _shown_on(bar: Any) -> Callable[[Stage], contextlib.AbstractContextManager[None]]:
    """Has ``bar`` say which stage is running."""

    def show(name: Stage) -> contextlib.AbstractContextManager[None]:
        bar.n = ITERATION.index(name) if name in ITERATION else 0
        bar.set_description(f"simulate, {name}")
        return contextlib.nullcontext()

    return show


def _count_parts(ledger: StorageLedger, parts: Skeleton) -> None:
    transformer = parts.model.transformer
    ledger.count(*transformer.parameters(), *transformer.buffers(), *scales(transformer), role="weights")
    _count_frozen(ledger, parts)
    embeddings = parts.embeddings
    ledger.exclude(*(embeddings.prompts if isinstance(embeddings, GuidedEmbeddings) else embeddings).tensors())


def _count_frozen(ledger: StorageLedger, parts: Skeleton) -> None:
    for module in (parts.model.decoder, *(term.reward for term in parts.rewards)):
        if isinstance(module, nn.Module):
            ledger.count(*module.parameters(), *module.buffers(), role="reward")


def step_seconds(found: Simulation, gpu: str) -> dict[Stage, dict[str, float]]:
    """Seconds that each stage takes on a GPU used to its full rates: computed, not measured.

    compute: FLOPs of matrix products, convolutions and attention. memory: bytes that all other operations read and
    write in the device's memory, each argument and result of each once. Kernels run one after the other, so the stage
    takes both. transfer: bytes between host and device, which may go beside them. host: bytes of the host's own work,
    at `HOST_BANDWIDTH`.
    """
    rates = GPUS[gpu]
    return {
        name: {
            "compute": found.flops[name] / rates.flops,
            "memory": found.traffic.get((name, "on_device"), 0.0) / rates.memory,
            "transfer": max(found.traffic.get((name, way), 0.0) for way in ("to_device", "to_host")) / rates.transfer,
            "host": found.traffic.get((name, "on_host"), 0.0) / HOST_BANDWIDTH,
        }
        for name in ITERATION
    }


def run_hours(found: Simulation, gpu: str, iterations: int) -> float:
    """Hours of ``iterations`` by `step_seconds`: of each stage what takes longest, kernels, transfers or the host."""
    seconds = [max(s["compute"] + s["memory"], s["transfer"], s["host"]) for s in step_seconds(found, gpu).values()]
    return iterations * sum(seconds) / 3600


def gib(size: float) -> float:
    """Bytes in GiB, rounded up to a hundredth."""
    return math.ceil(size / 2**30 * 100) / 100
