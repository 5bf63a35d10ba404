"""Running out of memory, told as what took it and which setting to change."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from leapalign.inputs.failures import says_full
from leapalign.inputs.validation import UserError, brief
from leapalign.memory.residency import Role, Stage, watched
from leapalign.parallel.sharding import local
from leapalign.planning.fit import change
from leapalign.planning.simulate import gib
from leapalign.trainer import Trainer


@contextlib.contextmanager
def shortage_explained(trainer: Trainer) -> Iterator[None]:
    """Has memory that runs out in the block end in a UserError, with the largest entries and a setting to change."""
    last: list[Stage] = ["setup"]

    def watch(name: Stage) -> contextlib.AbstractContextManager[None]:
        last.append(name)
        return contextlib.nullcontext()

    try:
        with watched(watch):
            yield
    except (MemoryError, RuntimeError) as error:
        if not says_full(error):
            raise
        used = bytes_by_role(trainer)
        entries = ", ".join(f"{role} {gib(size)} GiB" for role, size in [*used.most_common(), *_gaps(trainer)] if size)
        raise UserError(
            f"memory ran out in the {last[-1]} stage of iteration {trainer.iteration + 1}, with {entries} alive "
            f"({brief(error)}); {change(last[-1], used, trainer.config)}; then go on with --resume "
            f"{trainer.config.output}"
        ) from None


def _gaps(trainer: Trainer) -> list[tuple[str, int]]:
    """What the allocator of a GPU holds, and no tensor has."""
    device = trainer.model.device
    if device.type != "cuda":
        return []
    return [("gaps", torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))]


def bytes_by_role(trainer: Trainer) -> Counter[Role]:
    """Bytes on the device of a real run, by whose they are; on a GPU, the rest of what is allocated are activations."""
    model, optimizer = trainer.model, trainer.optimizer
    device = next(model.transformer.parameters()).device
    modules = [term.reward for term in trainer.rewards if isinstance(term.reward, nn.Module)]
    gradients = [p.grad for p in model.transformer.parameters() if p.grad is not None]
    states = [value for state in optimizer.rule.state.values() for value in state.values() if isinstance(value, Tensor)]
    parts: dict[Role, Iterable[Tensor]] = {
        "weights": [*model.transformer.parameters(), *(model.decoder.parameters() if model.decoder else ())],
        "reward": [parameter for module in modules for parameter in module.parameters()],
        "gradients": gradients,
        "optimizer": states,
    }
    found: Counter[Role] = Counter()
    for role, tensors in parts.items():
        storages = [tensor.untyped_storage() for tensor in map(local, tensors) if tensor.device == device]
        found[role] = sum({one._cdata: one.nbytes() for one in storages}.values())
    if device.type == "cuda":
        found["activations"] = torch.cuda.memory_allocated(device) - found.total()
    return found
