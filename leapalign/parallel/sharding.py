"""Weights that processes share: PyTorch's FSDP2 gathers those of a block while it computes.

A weight is divided by its first dimension into equal parts of whole blocks of the 8-bit optimizer, so that moments,
random bits and checkpoints are the same for any number of processes. All processes hold the few that cannot be: biases
and scales.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from leapalign.inputs.validation import UserError
from leapalign.parallel.processes import count, rank

BLOCK = 256
"""Elements that have one scale in 8-bit moments."""
_LEAST = 0.9
"""Share of the weights that has to be divided: else cards would be bought in vain."""


class Part(nn.Parameter):
    """One of ``count()`` equal parts of a parameter, by its first dimension: that of this process."""


def shard(transformer: nn.Module, blocks: Sequence[nn.Module], device: torch.device, whole_after: bool) -> None:
    """Leaves on ``device`` this process's part of the weights of ``transformer``, gathered ``blocks`` by block.

    whole_after: a forward leaves them gathered, up to a backward or `forget_gathered`. Gradients add up over processes,
    in float32. Nothing happens to the model of one process alone. Raises UserError where the weights cannot be divided
    evenly.
    """
    if count() == 1:
        return
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise UserError("this PyTorch cannot add up gradients over processes; install the one of constraints.txt")
    parameters = list(transformer.parameters())
    whole = {parameter for parameter in parameters if not divides(parameter)}
    sizes = [sum(one.numel() for one in some) for some in (whole, parameters)]
    if sizes[0] > (1 - _LEAST) * sizes[1]:
        raise UserError(
            f"{count()} processes cannot share the weights of this model evenly, of which {sizes[0] / sizes[1]:.0%} "
            "cannot be divided so; start 2, 4 or 8"
        )
    # It warns whoever would change a block's output in place; gradients are held to those of one process.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module", category=UserWarning)
    mesh = init_device_mesh(device.type, (count(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    name = type(transformer).__name__
    for module in (*blocks, transformer):
        # Said of the root, too, which FSDP would leave gathered.
        sharded = fully_shard(
            module, mesh=mesh, reshard_after_forward=not whole_after, mp_policy=policy, ignored_params=whole
        )
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    # Diffusers writes it into a checkpoint's config, and FSDP has given the class another.
    type(transformer).__name__ = name


def forget_gathered(transformer: nn.Module) -> None:
    """Has weights gathered anew where the parts were changed."""
    for module in transformer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def divides(parameter: Tensor) -> bool:
    """Whether each process can have an equal part of ``parameter``, of whole blocks."""
    return parameter.dim() > 0 and parameter.shape[0] % count() == 0 and parameter.numel() % (count() * BLOCK) == 0


def local(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``, in the same memory."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def part_of(whole: Tensor) -> Tensor:
    """A copy of this process's part of a tensor that is divided."""
    return whole.chunk(count())[rank()].clone()


def as_held(transformer: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``values`` of parameters by name, of those that are divided this process's part, for ``load_state_dict``."""
    held: dict[str, Tensor] = dict(transformer.named_parameters())

    def own(name: str, value: Tensor) -> Tensor:
        parameter = held.get(name)
        if not isinstance(parameter, DTensor) or parameter.shape != value.shape:
            return value  # one of another model is told by who loads it
        here = part_of(value).to(local(parameter).device)
        return DTensor.from_local(here, parameter.device_mesh, parameter.placements, run_check=False)

    return {name: own(name, value) for name, value in values.items()}


def positions(parameters: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each one's first element stands among the elements of all, and how many these are.

    A `Part` stands where it does in the whole: what counts by positions is the same for any number of processes.
    """
    found, total = [], 0
    for parameter in parameters:
        divided = isinstance(parameter, Part)
        found.append(total + rank() * parameter.numel() if divided else total)
        total += parameter.numel() * (count() if divided else 1)
    return found, total


class Held:
    """What this process holds of ``parameters``: ``own``, ordinary tensors, a `Part` where one is divided."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self.own = [Part(local(one)) if isinstance(one, DTensor) else one for one in parameters]

    def take_gradients(self) -> None:
        """Has the gradients of all processes' images in the ``.grad`` of ``own``."""
        if count() == 1:
            return
        alike: list[Tensor] = []
        for parameter, own in zip(self._parameters, self.own, strict=True):
            if isinstance(own, Part):
                own.grad = None if parameter.grad is None else local(parameter.grad)
                parameter.grad = None
            elif own.grad is not None:
                alike.append(own.grad)
        if alike:
            # Small ones, and many: one message for all.
            added = torch.cat([gradient.flatten().float() for gradient in alike])
            dist.all_reduce(added)
            for gradient, values in zip(alike, added.split([one.numel() for one in alike]), strict=True):
                gradient.copy_(values.view_as(gradient))

    def bytes_of_all(self, number: int, tensor: Tensor) -> int:
        """Bytes of what `whole` makes of ``tensor``."""
        return tensor.nbytes * (count() if self._divided(number, tensor) else 1)

    def whole(self, number: int, tensor: Tensor) -> Tensor:
        """What all processes hold of a tensor of the parameter ``number``, in the first one's host memory.

        The others keep what they hold.
        """
        if not self._divided(number, tensor):
            return tensor
        tensor = tensor.detach().contiguous()
        parts = [torch.empty_like(tensor) for _ in range(count())] if rank() == 0 else None
        dist.gather(tensor, parts, dst=0)
        return torch.cat([part.cpu() for part in parts]) if parts else tensor

    def part(self, number: int, whole: Tensor) -> Tensor:
        """What this process holds of a tensor of the parameter ``number``."""
        return part_of(whole) if self._divided(number, whole) else whole

    def _divided(self, number: int, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and isinstance(self.own[number], Part)
