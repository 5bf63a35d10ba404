from __future__ import annotations

import pytest
import torch
from kernel_cases import WORDS, latents
from leap_kernels import QK, qk_norm_rope, use_backend
from norm_rope_cases import (
    CASES,
    Case,
    by_backend,
    by_case,
    call,
    differentiated,
    formula,
    heads_first,
    in_double,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


@by_backend
def test_what_needs_no_gradient_gets_none(backend: str) -> None:
    inputs = CASES["joint"].inputs(torch.float32)
    complete = differentiated(call, inputs, "interleaved")
    for wanted in ("q", "k_weight", "before_k", "before_q_weight"):
        leaves = {name: value.clone().requires_grad_(name == wanted) for name, value in inputs.items()}
        with use_backend(backend, strict=True):
            torch.autograd.backward(call(leaves, "interleaved"), (inputs["grad_q"], inputs["grad_k"]))
        assert [name for name, leaf in leaves.items() if leaf.grad is not None] == [wanted]
        torch.testing.assert_close(leaves[wanted].grad, complete[f"at {wanted}"], rtol=1e-5, atol=1e-5)


@by_backend
def test_saves_its_arguments_only(backend: str) -> None:
    inputs = CASES["joint"].inputs(torch.bfloat16)
    leaves = {
        name: value.requires_grad_(value.dtype == torch.bfloat16)
        for name, value in inputs.items()
        if not name.startswith("grad")
    }
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with use_backend(backend, strict=True), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(leaves, "interleaved")
    assert saved == {value.data_ptr(): value.nbytes for value in leaves.values()}


@pytest.mark.native
@by_case
def test_native_bits_do_not_depend_on_threads(case: Case) -> None:
    batch, tokens, heads, width = case.q
    large = Case((batch, tokens * 9, heads * 4, width), case.k_heads, case.before, case.layout, True, case.tables)
    inputs = large.inputs(torch.bfloat16)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with use_backend("native", strict=True):
            results.append(differentiated(call, inputs, case.layout))
    torch.set_num_threads(1)
    for other in results[1:]:
        for name, value in other.items():
            assert torch.equal(value.view(WORDS[value.dtype]), results[0][name].view(WORDS[value.dtype])), name


@pytest.mark.interpreter
def test_triton_gives_the_same_bits_each_time() -> None:
    case = CASES["more-tokens-than-a-program"]
    inputs = case.inputs(torch.float32)
    with use_backend("triton", strict=True):
        first, second = (differentiated(call, inputs, case.layout) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@by_case
def test_fake_tensors_have_the_shapes_of_real_ones(case: Case) -> None:
    inputs = heads_first(case.inputs(torch.bfloat16))
    with FakeTensorMode() as mode:
        fakes = differentiated(call, {name: mode.from_tensor(value) for name, value in inputs.items()}, case.layout)
    for name, real in differentiated(call, inputs, case.layout).items():
        fake = fakes[name]
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride()), name


def test_compiles_to_one_graph() -> None:
    inputs = CASES["joint"].inputs(torch.float32)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    want = differentiated(call, inputs, "interleaved")
    for name, value in differentiated(compiled, inputs, "interleaved").items():
        assert torch.equal(value, want[name]), name
    torch.compiler.reset()


def test_weights_may_be_wider() -> None:
    case = CASES["joint"]
    inputs = {n: v.float() if "weight" in n else v for n, v in case.inputs(torch.bfloat16).items()}
    results = differentiated(call, inputs, case.layout)
    assert results["out q"].dtype == torch.bfloat16
    assert results["at q_weight"].dtype == torch.float32
    exacts = differentiated(formula, in_double(inputs), case.layout)
    torch.testing.assert_close(results["at q_weight"].double(), exacts["at q_weight"], rtol=1e-5, atol=1e-5)


def test_gradients_have_no_derivative() -> None:
    q = latents(1, 2, 1, 4).requires_grad_()
    (grad,) = torch.autograd.grad(qk_norm_rope(q, q)[0].square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_wrong_arguments_are_named() -> None:
    q, table = torch.zeros(2, 3, 4, 6), torch.zeros(3, 3)
    for arguments, message in (
        ({"q": torch.zeros(2, 3, 24)}, "queries"),
        ({"q": q.long()}, "int64"),
        ({"k": torch.zeros(2, 2, 4, 6)}, "keys"),
        ({"k": q.double()}, "float64"),
        ({"q_weight": torch.zeros(5)}, "q_weight"),
        ({"cos": table}, "both"),
        ({"cos": table, "sin": torch.zeros(3, 6)}, "sin"),
        ({"cos": table, "sin": table.expand(2, 3, 3)}, "one shape"),
        ({"layout": "pairs"}, "layout"),
        ({"before": QK(torch.zeros(1, 2, 4, 6), torch.zeros(1, 2, 4, 6))}, "queries"),
        ({"before": QK(q, torch.zeros(2, 3, 2, 6))}, "keys"),
    ):
        with pytest.raises(ValueError, match=message):
            qk_norm_rope(**{"q": q, "k": q, **arguments})  # type: ignore[arg-type]
