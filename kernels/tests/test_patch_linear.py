"""Linear layers that make their input again, or share it, compute what PyTorch's do, and save and add up less."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from leap_kernels import gelu_tanh, use_backend
from leap_kernels._patch_linear import of_gelu, of_modulated, several
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, ROWS, A, X, OUT = 2, 6, 3, 5, 4
NORM = nn.LayerNorm(X, eps=1e-6, elementwise_affine=False)


class Case(NamedTuple):
    """What a function does with a layer and tensors, and the same in plain PyTorch."""

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: dict[str, tuple[int, ...]]
    layers: dict[str, int]
    """Width of each layer's input."""

    def drawn(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for name, shape in self.inputs.items()
        }

    def made(self, dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.ModuleDict:
        torch.manual_seed(1)
        return nn.ModuleDict({n: nn.Linear(width, OUT, bias=bias, dtype=dtype) for n, width in self.layers.items()})


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return functional.layer_norm(x, (X,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


TOKENS, VECTOR = (BATCH, ROWS, X), (BATCH, X)
CASES = {
    "gelu": Case(lambda m, x: of_gelu(m["layer"], x), lambda m, x: m["layer"](_gelu(x)), {"x": TOKENS}, {"layer": X}),
    "gelu beside": Case(
        lambda m, x, a: of_gelu(m["layer"], x, beside=a),
        lambda m, x, a: m["layer"](torch.cat([a, _gelu(x)], dim=-1)),
        {"x": TOKENS, "a": (BATCH, ROWS, A)},
        {"layer": A + X},
    ),
    "modulated": Case(
        lambda m, x, shift, scale: of_modulated(m["layer"], NORM, x, shift, scale),
        lambda m, x, shift, scale: m["layer"](_modulated(x, shift, scale)),
        {"x": TOKENS, "shift": VECTOR, "scale": VECTOR},
        {"layer": X},
    ),
    "several": Case(
        lambda m, x: torch.stack(list(several(x, *m.values()))),
        lambda m, x: torch.stack([layer(x) for layer in m.values()]),
        {"x": TOKENS},
        {"first": X, "second": X, "third": X},
    ),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Called(TorchDispatchMode):
    """Counts operations by name, and those of ours that make an activation again."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        again = func.name().endswith("gelu_tanh_backward") and args[2]
        self.counts[func.name().split("::")[1] + (", again" if again else "")] += 1
        return func(*args, **(kwargs or {}))


@by_case
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", ["", "x", "a shift", "scale", "weight", "bias", "first"])
def test_values_and_gradients_are_those_of_plain_layers(case: Case, bias: bool, frozen: str) -> None:
    layers, inputs = case.made(bias=bias), case.drawn()
    wanted = inputs | dict(layers.named_parameters())
    for name in list(wanted):
        if set(name.split(".")) & set(frozen.split()):
            wanted.pop(name).requires_grad_(False)
    found = []
    for function in (case.ours, case.plain):
        out = function(layers, **inputs)
        at_end = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
        found.append((out, *torch.autograd.grad(out, list(wanted.values()), at_end)))
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def _saved(function: Callable[[], Any], *known: Tensor) -> int:
    """Bytes that are saved beside tensors that are there anyway."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    for tensor in known:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())


@by_case
def test_nothing_is_saved_but_inputs_and_two_numbers_a_row(case: Case) -> None:
    layers, inputs = case.made(torch.float32), case.drawn(torch.float32)
    statistics = 2 * BATCH * ROWS * 4 if "scale" in inputs else 0
    assert _saved(lambda: case.ours(layers, **inputs), *inputs.values(), *layers.parameters()) == statistics


@pytest.mark.parametrize(("frozen", "gelu", "norm"), [(False, 1, 1), (True, 0, 0)])
def test_an_input_is_made_again_only_for_a_weight_s_gradient(frozen: bool, gelu: int, norm: int) -> None:
    for name, op, wanted in (("gelu", "gelu_tanh_backward, again", gelu), ("modulated", "adaln_modulate", norm)):
        layers, inputs = CASES[name].made(), CASES[name].drawn()
        out = CASES[name].ours(layers.requires_grad_(not frozen), **inputs)
        with Called() as called:
            out.sum().backward()
        assert called.counts[op] == wanted


def test_gradients_of_one_input_are_added_up_by_products_and_nothing_is_joined() -> None:
    case = CASES["several"]
    layers, inputs = case.made().requires_grad_(False), case.drawn()
    outs = several(inputs["x"], *layers.values())
    with Called() as called:
        torch.autograd.grad(outs[1:], inputs["x"], [torch.ones_like(out) for out in outs[1:]])
    assert (called.counts["mm"], called.counts["addmm.out"], called.counts["add.Tensor"]) == (1, 1, 0)
    with Called() as called:
        beside = CASES["gelu beside"]
        beside.ours(beside.made(), **beside.drawn()).sum().backward()
    assert called.counts["cat"] == 0


class Other(nn.Linear):
    """Not PyTorch's own, as adapters are not."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _hooked(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda module, given, out: 2 * out)
    return layer


@by_case
@pytest.mark.parametrize("kind", ["another", "inside another", "hooked"])
def test_another_layer_is_called_as_it_is(case: Case, kind: str) -> None:
    layers, inputs = case.made(), case.drawn()
    name, width = next(iter(case.layers.items()))
    layer = Other(width, OUT, dtype=torch.float64)
    layers[name] = {"another": layer, "inside another": nn.Sequential(layer), "hooked": _hooked(layers[name])}[kind]
    torch.testing.assert_close(case.ours(layers, **inputs), case.plain(layers, **inputs), rtol=1e-11, atol=1e-11)


@by_case
def test_autocast_decides_by_itself(case: Case) -> None:
    layers, inputs = case.made(torch.float32), case.drawn(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.ours(layers, **inputs)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(parameter.grad is not None for parameter in layers.parameters())


@by_case
def test_transforms_and_compilers_see_plain_layers(case: Case) -> None:
    layers, inputs = case.made(), case.drawn()
    values = dict(layers.named_parameters())

    def total(values: dict[str, Tensor], function: Callable[..., Tensor]) -> Tensor:
        def run(module: nn.Module) -> Tensor:
            return function(module, **inputs).square().sum()

        with torch.nn.utils.stateless._reparametrize_module(layers, values):
            return run(layers)

    ours, plain = (torch.func.grad(total)(values, function) for function in (case.ours, case.plain))
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-10)
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(layers, **inputs), case.plain(layers, **inputs), rtol=1e-11, atol=1e-11)
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["gelu", "modulated"])
def test_a_backward_pass_in_another_thread_keeps_the_setting(name: str) -> None:
    """Strict Triton cannot take float64: the refusal shows that the setting came along."""
    case = CASES[name]
    layers, inputs = case.made(), case.drawn()
    with use_backend("reference"):
        out = case.ours(layers, **inputs)
    errors: list[Exception] = []

    def run() -> None:
        try:
            with use_backend("triton", strict=True):
                out.sum().backward()
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors
    assert inputs["x"].grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_made_again_is_what_was(dtype: torch.dtype) -> None:
    """The gradient of the weight is that of the activation which the layer took, to the bit."""
    x, layer = torch.randn(2, 9, 64, dtype=dtype), nn.Linear(64, 1, bias=False, dtype=dtype)
    identity = torch.eye(18, dtype=dtype)
    rows = []
    for one in identity.view(18, 2, 9):
        layer.zero_grad()
        of_gelu(layer, x.requires_grad_()).squeeze(-1).backward(one)
        rows.append(layer.weight.grad.clone())
    assert torch.equal(torch.cat(rows).view(2, 9, 64), gelu_tanh(x.detach()))
