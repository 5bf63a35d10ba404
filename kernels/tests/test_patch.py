"""Patched models of diffusers compute what they did, and remain what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from leap_kernels import _patch_attention, _patch_parts, patch
from patch_cases import CASES, all_in_double, compute_in_double, difference, outputs
from tolerances import unit_roundoff
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["all_in_double"]

families = pytest.mark.parametrize("family", CASES)


@families
@pytest.mark.usefixtures("all_in_double")
def test_output_and_gradients_are_equal(family: str) -> None:
    case = CASES[family]
    model = case.model()
    expected, names = case.run(model), list(model.state_dict())
    done = patch(model)
    assert (done.replaced, done.left) == (case.ops, case.left)
    assert list(model.state_dict()) == names
    worst = difference(case.run(model), expected)
    assert max(worst.values()) < 1e-10, worst


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_costs_no_more_than_it_did(family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken together, and beside what the same model without the patch loses in this dtype; but for gradients that are
    zero in exact arithmetic, as that of a key's bias, of which rounding is all there is."""
    case = CASES[family]
    with monkeypatch.context() as in_double:
        compute_in_double(in_double)
        exact = case.run(case.model(dtype).double())
    largest = max(value.norm() for value in exact.values())
    counted = [name for name, value in exact.items() if value.norm() > 1e-12 * largest]
    model = case.model(dtype)
    losses = []
    for _ in range(2):
        found = difference(case.run(model, dtype), exact)
        losses.append(sum(found[name] for name in counted) / len(counted))
        patch(model)
    assert unit_roundoff(dtype) < losses[1] < 1.25 * losses[0]


@families
def test_undone_it_is_what_it_was(family: str) -> None:
    case = CASES[family]
    model = case.model(torch.float32)
    before = case.run(model, torch.float32)
    done = patch(model)
    assert not torch.equal(case.run(model, torch.float32)["output"], before["output"])
    done.undo()
    done.undo()
    after = case.run(model, torch.float32)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all("forward" not in module.__dict__ for module in model.modules())


@families
def test_tensors_without_memory(family: str) -> None:
    case = CASES[family]
    expected = case.run(case.model(torch.float32), torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = case.build()
        patch(model)
        found = case.run(model, torch.float32)
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}


@pytest.mark.parametrize("family", ["flux", "flux2", "stable_diffusion_3"])
def test_a_text_of_no_tokens(family: str) -> None:
    model, inputs = CASES[family].model(), CASES[family].drawn(torch.float64)
    inputs |= {name: inputs[name][..., :0, :] for name in ("encoder_hidden_states", "txt_ids") if name in inputs}
    expected = outputs(model, inputs)
    patch(model)
    torch.testing.assert_close(outputs(model, inputs), expected, rtol=1e-4, atol=1e-4)


class _Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@families
def test_the_ops_run_and_what_they_replace_does_not(family: str) -> None:
    """Where arguments do not fit, a patched module computes as before, and no other test would tell."""
    case = CASES[family]
    model = case.model()
    patch(model)
    with _Called() as called:
        case.run(model)
    ops = {name.removeprefix("leap_kernels::") for name in called.names if name.startswith("leap_kernels::")}
    wanted = {op for of_module in case.ops.values() for op in of_module}
    assert ops == wanted | {f"{op}_backward" for op in wanted}
    assert not called.names & {f"aten::{name}" for name in case.gone}


@pytest.mark.usefixtures("all_in_double")
def test_positions_are_those_of_the_call() -> None:
    """Blocks share tables that are made once."""
    case = CASES["flux"]
    model, inputs = case.model(), case.drawn(torch.float64)
    others = inputs | {"img_ids": inputs["img_ids"].flip(0) * 2}
    expected = [outputs(model, drawn) for drawn in (inputs, others)]
    patch(model)
    for drawn, plain in zip((inputs, others), expected, strict=True):
        torch.testing.assert_close(outputs(model, drawn), plain, rtol=1e-10, atol=1e-10)


def test_hooks_that_come_after_patch_are_called() -> None:
    case = CASES["flux"]
    model, seen = case.model(), []
    expected = case.run(model)["output"]
    patch(model)
    block = model.transformer_blocks[0]
    for part in (block.norm2, block.norm1.norm, block.attn.norm_added_k, block.ff.net[0], block.ff_context):
        part.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(case.run(model)["output"], expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 5


def test_a_single_block_s_activation_is_looked_at_in_each_call() -> None:
    case = CASES["flux"]
    model = case.model()
    patch(model)
    inputs = case.drawn(torch.float64)
    before, block = outputs(model, inputs), model.single_transformer_blocks[0]
    block.act_mlp.register_forward_hook(lambda module, given, output: 0 * output)
    hooked = outputs(model, inputs)
    assert not torch.equal(hooked, before)
    block.act_mlp = nn.ReLU()
    assert not torch.equal(outputs(model, inputs), hooked)


def test_an_autoencoder_on_a_cpu_keeps_the_channels_of_a_place_together() -> None:
    case, orders = CASES["autoencoder"], []
    model = case.model(torch.float32)
    patch(model)
    # What comes after an attention lies so without the patch.
    for part in (model.encoder.down_blocks[0], model.decoder.mid_block):
        part.resnets[0].norm1.register_forward_pre_hook(
            lambda norm, given: orders.append(given[0].is_contiguous(memory_format=torch.channels_last))
        )
    assert outputs(model, case.drawn(torch.float32)).is_contiguous()
    assert orders == [True, True]


def test_models_on_meta_and_under_transforms_run() -> None:
    case = CASES["flux"]
    model, inputs = case.model(), case.drawn(torch.float64)
    patch(model)
    values = dict(model.named_parameters())

    def total(values: dict[str, Any]) -> Any:
        return torch.func.functional_call(model, values, kwargs=inputs)[0].sum()

    gradients = torch.func.grad(total)(values)
    expected = torch.autograd.grad(total(values), list(values.values()), allow_unused=True)
    for name, wanted in zip(values, expected, strict=True):
        if wanted is not None:
            torch.testing.assert_close(gradients[name], wanted, rtol=1e-9, atol=1e-9)
    meta = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    assert outputs(model.to("meta"), meta).device.type == "meta"


def test_processors_and_fused_projections_that_come_after_patch_count() -> None:
    case = CASES["flux"]
    model = case.model()
    expected = case.run(model)["output"]
    patch(model)
    model.single_transformer_blocks[0].attn.fuse_projections()
    torch.testing.assert_close(case.run(model)["output"], expected, rtol=1e-5, atol=1e-5)
    attention = model.transformer_blocks[0].attn
    attention.processor = type("Doubled", (type(attention.processor),), {"__call__": _doubled})()
    assert not torch.allclose(case.run(model)["output"], expected, rtol=1e-2)


def _doubled(self: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    image, text = super(type(self), self).__call__(*arguments, **options)
    return 2 * image, 2 * text


def test_blocks_share_tables_as_long_as_they_are_of_the_same() -> None:
    cos, sin, other = (torch.randn(3, 4) for _ in range(3))
    tables = _patch_attention.halved((cos, sin), cos.device)
    assert _patch_attention.halved((cos, sin), cos.device)[0] is tables[0]
    torch.testing.assert_close(_patch_attention.halved((cos, other), cos.device)[1], other[:, ::2], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 6), (2, 1, 6), (2, 5, 6), (1, 6), (1, 1, 6)])
@pytest.mark.parametrize("wide", [False, True])
def test_vectors_of_any_shape_and_dtype(shape: tuple[int, ...], wide: bool) -> None:
    """Those of a sample go to the ops, others are broadcast; results are as wide as PyTorch would have them."""
    norm, dtype = nn.LayerNorm(6, eps=1e-6, elementwise_affine=False), torch.float64 if wide else torch.float32
    x, y = torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    shift, scale = torch.randn(2, *shape, dtype=dtype)
    of_tokens = [vector.unsqueeze(1) if vector.ndim == 2 else vector for vector in (shift, scale)]
    normal = norm(x) * (1 + of_tokens[1])
    for found, expected in (
        (_patch_parts.modulated(norm, x, shift, scale), normal + of_tokens[0]),
        (_patch_parts.modulated(norm, x, None, scale), normal),
        (_patch_parts.with_residual(x, scale, y), x + of_tokens[1] * y),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
