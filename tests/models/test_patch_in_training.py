"""Patched models beside what training does to a model: adapters, recomputing, streaming, compiling, copying."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import torch
from leap_kernels import patch
from patch_cases import CASES, PatchCase, all_in_double, difference, outputs
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from leapalign.memory.checkpointing import checkpoint_blocks, checkpoint_resnets
from leapalign.memory.host_weights import HostWeights

__all__ = ["all_in_double"]

families = pytest.mark.parametrize("family", CASES)
transformers = pytest.mark.parametrize("family", [name for name in CASES if name != "autoencoder"])
pytestmark = pytest.mark.usefixtures("all_in_double")


def unpatched(case: PatchCase) -> dict[str, Tensor]:
    return case.run(case.model())


def patched(case: PatchCase) -> Any:
    model = case.model()
    patch(model)
    return model


def with_adapters(model: nn.Module) -> nn.Module:
    """Beside every linear layer, those that modulate included, and not as if they were not there."""
    model.requires_grad_(False)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=names), model)
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model


@transformers
def test_adapters_before_and_after(family: str) -> None:
    case = CASES[family]
    expected = case.run(with_adapters(case.model()))
    before, after = with_adapters(case.model()), with_adapters(patched(case))
    assert patch(before).replaced == case.ops
    for model in (before, after):
        found = case.run(model)
        assert sum("lora" in name for name in found) > 10
        assert max(difference(found, expected).values()) < 1e-10


@transformers
@pytest.mark.parametrize("keep_attention", [False, True])
def test_recomputing(family: str, keep_attention: bool) -> None:
    case = CASES[family]
    model = patched(case)
    checkpoint_blocks(model, keep_attention)
    assert max(difference(case.run(model), unpatched(case)).values()) < 1e-10


def test_recomputing_after_another_forward() -> None:
    """What blocks share, such as tables, is there when the first of two is recomputed."""
    case = CASES["flux"]
    model, inputs = patched(case), case.drawn(torch.float64)
    checkpoint_blocks(model, keep_attention=True)
    others = inputs | {"img_ids": inputs["img_ids"].flip(0) * 2}
    both = [outputs(model, drawn) for drawn in (inputs, others)]
    together = torch.autograd.grad(both[0].sum() + 2 * both[1].sum(), model.x_embedder.weight)
    alone = [torch.autograd.grad(outputs(model, d).sum(), model.x_embedder.weight)[0] for d in (inputs, others)]
    torch.testing.assert_close(together[0], alone[0] + 2 * alone[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("of_diffusers", [False, True])
def test_recomputing_in_the_autoencoder(of_diffusers: bool) -> None:
    case = CASES["autoencoder"]
    model = patched(case)
    if of_diffusers:
        model.enable_gradient_checkpointing()
    else:
        checkpoint_resnets(model)
    assert max(difference(case.run(model), unpatched(case)).values()) < 1e-10


@transformers
def test_weights_that_stream(family: str) -> None:
    case = CASES[family]
    model = patched(case)
    checkpoint_blocks(model)
    HostWeights(model, torch.device("cpu"), buffers=2)
    assert max(difference(case.run(model), unpatched(case)).values()) < 1e-10


@transformers
def test_compiled_blocks(family: str) -> None:
    """Each kind of block is one graph. One family's goes through the compiler's autograd, too; code for a processor
    would take minutes."""
    case = CASES[family]
    expected, model = unpatched(case), patched(case)
    torch._dynamo.reset()
    kinds = {type(module): module for module in model.modules() if type(module).__name__ in model._no_split_modules}
    for block in kinds.values():
        block.compile(backend="aot_eager" if family == "flux" else "eager", fullgraph=True)
    assert max(difference(case.run(model), expected).values()) < 1e-10


@families
def test_copies_are_patched_and_have_their_own_weights(family: str) -> None:
    case = CASES[family]
    expected, model = unpatched(case), patched(case)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert set(patch(copied).left) == set(case.ops) | set(case.left)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert max(difference(case.run(copied), expected).values()) < 1e-10
        model.load_state_dict(copied.state_dict())


def test_memory_is_freed_with_the_last_reference() -> None:
    model = patched(CASES["flux"])
    block = weakref.ref(model.transformer_blocks[0])
    gc.collect()
    gc.disable()
    try:
        del model
        assert block() is None
    finally:
        gc.enable()
