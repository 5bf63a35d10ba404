"""The blocks of a transformer, which hold nearly all of its weights: the members of its module lists."""

from __future__ import annotations

import itertools

from torch import nn


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """All blocks, in the order of their lists."""
    lists = [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks]


def linear_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by its name in ``transformer``, blocks or not."""
    return {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}


def in_lists(network: nn.Module, name: str) -> bool:
    """Whether what is called ``name`` in ``network`` is within a module list, however deep: a text encoder's layer."""
    parents = itertools.accumulate(name.split(".")[:-1], "{}.{}".format)
    return any(isinstance(network.get_submodule(parent), nn.ModuleList) for parent in parents)


def in_blocks(transformer: nn.Module, name: str) -> bool:
    """Whether what is called ``name`` in ``transformer`` is a part of a block."""
    return isinstance(dict(transformer.named_children()).get(name.partition(".")[0]), nn.ModuleList)
