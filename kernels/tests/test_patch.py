"""Patched models of diffusers compute what they did, and remain what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from leap_kernels import _patch_attention, _patch_parts, _patch_rules, patch
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
    """Taken together, and beside what the same model without the patch loses in this dtype."""
    case = CASES[family]
    with monkeypatch.context() as in_double:
        compute_in_double(in_double)
        exact = case.run(case.model(dtype).double())
    model = case.model(dtype)
    losses = []
    for _ in range(2):
        losses.append(sum(difference(case.run(model, dtype), exact).values()) / len(exact))
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


def test_what_was_patched_is_left_alone() -> None:
    model = CASES["flux"].model()
    first = patch(model)
    second = patch(model)
    assert not second.replaced
    assert second.left == dict.fromkeys(first.replaced, "it is patched already")
    second.undo()
    assert patch(model).left == second.left
    first.undo()
    assert patch(model).replaced == first.replaced


def test_an_unknown_source_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that computes something else, or whose processor does."""
    case = CASES["flux"]
    model = case.model()
    expected = case.run(model)
    block, attention = type(model.transformer_blocks[0]), type(model.transformer_blocks[0].attn.processor)
    forward, call = block.forward, attention.__call__

    def other(self: nn.Module, *arguments: object, **options: object) -> object:
        return forward(self, *arguments, **options)

    def other_call(self: object, *arguments: object, **options: object) -> object:
        return call(self, *arguments, **options)

    monkeypatch.setattr(block, "forward", other)
    monkeypatch.setattr(attention, "__call__", other_call)
    done = patch(model)
    for name in ("transformer_blocks.0", "transformer_blocks.0.attn", "single_transformer_blocks.0.attn"):
        assert name not in done.replaced
        assert "source is unknown" in done.left[name]
    assert difference(case.run(model), expected)["output"] < 1e-6


def test_without_a_source_it_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(function: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(_patch_rules.inspect, "getsource", unreadable)
    _patch_rules._digest.cache_clear()
    done = patch(CASES["flux"].model())
    _patch_rules._digest.cache_clear()
    assert not done.replaced
    assert set(done.left.values()) == {"its source cannot be read"}


def test_parts_that_do_not_fit_are_left_alone() -> None:
    model = CASES["flux"].model()
    double, single = model.transformer_blocks[0], model.single_transformer_blocks[0]
    double.norm2 = nn.LayerNorm(24).double()
    double.attn.norm_k.eps = 1e-3
    double.ff.net[0].approximate = "none"
    single.act_mlp.register_forward_hook(lambda *_: None)
    single.norm.forward = type(single.norm).forward.__get__(single.norm)
    assert patch(model).left == {
        "transformer_blocks.0": "its norm2 is no layer norm without weights and hooks",
        "transformer_blocks.0.attn": "its norms have no eps, or several",
        "transformer_blocks.0.ff": "it is more than a GELU in the tanh form and a layer, or hooks are on its parts",
        "transformer_blocks.0.ff.net.0": "its GELU is not in the tanh form",
        "single_transformer_blocks.0": "its act_mlp is no GELU in the tanh form, or has hooks",
        "single_transformer_blocks.0.norm": "another forward was put in place of its class's",
    }


def test_undo_takes_nothing_away_that_others_put_there() -> None:
    model = CASES["flux"].model()
    done = patch(model)
    block = model.transformer_blocks[0]
    ours, block.forward = block.forward, lambda *_, **__: None
    with pytest.raises(RuntimeError, match=r"forward of transformer_blocks\.0 was replaced after patch: undo that"):
        done.undo()
    assert "forward" in model.norm_out.__dict__
    block.forward = ours
    done.undo()


def test_other_models_have_nothing_to_patch() -> None:
    done = patch(nn.Sequential(nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4)))
    assert (done.replaced, done.left) == ({}, {})


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
    for norm in (block.norm2, block.norm1.norm, block.attn.norm_added_k):
        norm.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(case.run(model)["output"], expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 3


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


def test_what_is_no_module_is_told() -> None:
    with pytest.raises(TypeError, match=r"patch takes a module, such as pipeline\.transformer .*, not object"):
        patch(object())


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
