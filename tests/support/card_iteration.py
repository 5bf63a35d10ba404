"""A training iteration on an accelerator that is not there: tensors without memory, and PyTorch's own device checks.

    python tests/support/card_iteration.py CONFIG ...

Fake tensors say "cpu" or "card", and an operation on both is an error, as it is on a GPU; the backward pass runs in a
thread of its own, as a GPU's does. Prints how often each stage waits for the card. A process of its own, because
PyTorch knows a device for good once it has been registered.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration as registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from leapalign.config import load_config
from leapalign.evaluation.generate import generate
from leapalign.memory import host_weights, placement, transfer
from leapalign.memory.residency import STAGE
from leapalign.memory.transfer import Background
from leapalign.planning.model_skeleton import skeleton, skeleton_trainer


class Card(registration._DummyBackendModule):
    """What `torch.get_device_module` returns for it: streams that do nothing."""

    Stream, Event = torch.cpu.Stream, torch.cpu.Event
    stream, current_stream = staticmethod(torch.cpu.stream), staticmethod(torch.cpu.current_stream)


class Waits(TorchDispatchMode):
    """Makes the card's tensors fake, and counts what has the caller wait for it: numbers and copies asked for."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            self._note(args[0].device, torch.device("cpu"))
            return 1.0 if args[0].is_floating_point() else 1
        if getattr(kwargs.get("device"), "type", "cpu") == "card":
            with self.fake:
                result = func(*tree_map_only(torch.Tensor, self._faked, args), **kwargs)
        else:
            result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            self._note(args[0].device, result.device)
        elif func is torch.ops.aten.copy_.default and not (args[2:] and args[2]):
            self._note(args[1].device, args[0].device)
        return result

    def _faked(self, tensor: torch.Tensor) -> FakeTensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor.contiguous())

    def _note(self, source: torch.device, target: torch.device) -> None:
        if source != target:
            self.found[STAGE.get()] += 1


def move(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """What a fake tensor does not do by itself: it follows its data to another device."""
    for tensor in tensors:
        tensor.fake_device = device


def move_module(module: torch.nn.Module, device: torch.device) -> None:
    move((*module.parameters(), *module.buffers()), device)


def point_at(group: Any, flat: torch.Tensor) -> None:
    move(group.parameters, flat.device)


def at_once(threaded: bool) -> Background:
    """Without a thread, since a mode for fake tensors serves one at a time."""
    return Background(threaded=False)


def iteration(path: str) -> dict[str, Any]:
    config, card = load_config(Path(path)), torch.device("card", 0)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    parts = skeleton(config, fake)
    with Waits(fake) as waits:
        trainer = skeleton_trainer(config, parts, card)
        waits.found.clear()
        trainer.train_one()
        found = dict(waits.found)
        saved = {name: value.cpu() for name, value in trainer.optimizer.tensors().items()}
        trainer.optimizer.load(saved, trainer.optimizer.scalars(), trainer.optimizer.average.tensors)
        trainer.train_one()
        images = generate(trainer.model, trainer.embeddings[torch.arange(2)], range(2), 3)
    return {"waits": found, "images": str(images.device)}


if __name__ == "__main__":
    registration._setup_privateuseone_for_python_backend("card", backend_module=Card())
    host_weights._Group.point_at, placement._move, transfer.Background = point_at, move_module, at_once
    print(json.dumps([iteration(path) for path in sys.argv[1:]]))
