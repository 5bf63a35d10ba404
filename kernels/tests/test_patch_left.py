"""What `patch` leaves alone, and what it says of that."""

from __future__ import annotations

import pytest
from leap_kernels import _patch_rules, patch
from patch_cases import CASES, difference
from torch import nn


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
    double.ff_context.net[1].p = 0.5
    single.act_mlp.register_forward_hook(lambda *_: None)
    single.norm.forward = type(single.norm).forward.__get__(single.norm)
    forward = "it is more than a GELU in the tanh form and a layer, or hooks are on its parts"
    assert patch(model).left == {
        "transformer_blocks.0": "its norm2 is no layer norm without weights and hooks",
        "transformer_blocks.0.attn": "its norms have no eps, or several",
        "transformer_blocks.0.ff": forward,
        "transformer_blocks.0.ff_context": forward,
        "transformer_blocks.0.ff.net.0": "its GELU is not in the tanh form",
        "single_transformer_blocks.0": "its act_mlp is no GELU in the tanh form, or has hooks",
        "single_transformer_blocks.0.norm": "another forward was put in place of its class's",
    }


def test_the_reason_is_the_part_that_is_missing_not_the_source_that_it_changes() -> None:
    """Stable Diffusion 3.0 does not norm queries and keys."""
    model = CASES["stable_diffusion_3"].model()
    for module in (model.transformer_blocks[0].attn, model.transformer_blocks[1].attn):
        module.norm_q = module.norm_k = module.norm_added_q = module.norm_added_k = None
    flux = CASES["flux"].model()
    flux.transformer_blocks[0].attn.fuse_projections()
    left = patch(model).left | patch(flux).left
    normless = dict.fromkeys(("transformer_blocks.0.attn", "transformer_blocks.1.attn"))
    assert left == dict.fromkeys(normless, "its queries and keys are not normed") | {
        "transformer_blocks.0.attn": "its projections are fused"
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


def test_what_is_no_module_is_told() -> None:
    with pytest.raises(TypeError, match=r"patch takes a module, such as pipeline\.transformer .*, not object"):
        patch(object())
