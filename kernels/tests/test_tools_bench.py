from __future__ import annotations

import itertools
import json

import pytest
import torch
from leap_kernels import stochastic_round_
from leap_kernels.tools import bench, main
from leap_kernels.tools.bench_cases import CASES
from leap_kernels.tools.bench_measures import Clock, peak_bytes, relative_error
from leap_kernels.tools.bench_runs import BACKWARD, FORWARD, Bench, Variant
from tolerances import unit_roundoff

CPU = torch.device("cpu")
SHAPE = (2, 33, 16)
CASE = {case.name: case for case in CASES}
OF_BLOCKS = {case.name for case in CASES if case.sizes}


@pytest.mark.parametrize("name", CASE)
def test_op_and_plain_function_compute_the_same(name: str) -> None:
    case = CASE[name]
    run = Bench(case, case.quick, CPU)
    for variant in (Variant("eager", case.plain), Variant("reference", case.fused, "reference")):
        for key, observed in run.observe(variant).items():
            # One rounding to bfloat16, twice as much when it is a random one, beside float32's own; plain functions
            # may round a product before they add, and those of blocks after every layer.
            roundings = 8 if name in OF_BLOCKS and variant.name == "eager" else 2.1
            assert observed["error"] <= roundings * unit_roundoff(torch.bfloat16), key
            assert observed["peak_bytes"] >= 0


@pytest.mark.parametrize("name", CASE)
def test_least_bytes_are_each_tensor_once(name: str) -> None:
    case = CASE[name]
    inputs = case.inputs(case.quick, CPU)
    outputs = case.fused(inputs)
    if case.latents:
        # The rounding's destination is only written.
        read = sum(dtype.itemsize for of, dtype in case.latents.items() if of != "dst")
        written = sum(output.element_size() for output in outputs if output.shape == case.quick)
        assert case.forward_bytes == read + written
    if name in OF_BLOCKS:
        # The gradients at outputs and the latents are read, those at latents written, but for x, whose is the output's.
        passed_on = name == "gated_residual"
        assert case.backward_bytes == 2 * case.sources + 4 * (len(case.latents) - passed_on)
    elif case.differentiable and case.latents:
        # The gradient at x is the one that came in, except for the op that scales it.
        free = 0 if case.op == "scale_gradient" else 1
        assert case.backward_bytes == 2 + 2 * (len(case.differentiable) - free)
    assert (case.backward_bytes is None) == (not case.differentiable)


def test_plain_rounding_is_random_like_the_op() -> None:
    src = torch.full((1, 4096), 1 + 2.0**-9)
    dst = torch.empty(1, 4096, dtype=torch.bfloat16)
    (plain,) = CASE["stochastic_round_"].plain({"src": src, "dst": dst})
    share = (plain > 1).float().mean().item()
    assert share == pytest.approx((stochastic_round_(dst, src, 1, 0) > 1).float().mean().item(), abs=0.05)
    assert share == pytest.approx(0.25, abs=0.05)


@pytest.mark.native
def test_prints_a_line_for_each_variant_and_pass(capsys) -> None:
    threads = torch.get_num_threads()
    assert main(["bench", "--quick", "--json", "--threads", "1", "--op", "leap_update"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert torch.get_num_threads() == threads
    found = {(line["variant"], line["pass"]): line for line in lines}
    assert set(found) == {
        *((variant, direction) for variant in ("eager", "native") for direction in (FORWARD, BACKWARD)),
        ("copy", "copy"),
        ("clone", "clone"),
    }
    native = found["native", FORWARD]
    elements = torch.Size(SHAPE).numel()
    assert native["least_bytes"] == 8 * elements
    assert found["native", BACKWARD]["least_bytes"] == 4 * elements
    low, median, high = native["milliseconds"]
    assert 0 < low <= median <= high
    assert native["gigabytes_per_second"] == pytest.approx(8 * elements / median / 1e6)
    assert native["times_faster_than"].keys() == {"eager"}
    assert {"revision", "python", "torch", "triton", "device", "threads", "repeats"} <= native.keys()
    assert native["threads"] == 1
    assert main(["bench", "--quick", "--op", "leap_update"]) == 0
    assert "native" in capsys.readouterr().out
    assert main(["bench", "--threads", "0"]) == 2


def test_speeds_are_compared_within_a_repeat() -> None:
    # The machine halves its speed in every second repeat, and ours is twice as fast throughout.
    seconds = {("ours", FORWARD): [1.0, 2.0, 1.0], ("eager", FORWARD): [2.0, 4.0, 2.0]}
    seconds |= {(copy, copy): [0.5, 1.0, 0.5] for copy in ("copy", "clone")}
    speed = bench._speed(("ours", FORWARD), seconds, {FORWARD: 800, "copy": 400, "clone": 400})
    assert speed["times_faster_than"] == {"eager": 2.0}
    # 800 bytes in 1 s against 400 bytes in 0.5 s.
    assert speed["share_of_copy_rate"] == 1.0
    assert speed["share_of_clone_rate"] == 1.0
    assert speed["milliseconds"][1] == 1000.0
    assert speed["gigabytes_per_second"] == 800 / 1e9


def test_variants_take_turns_and_warm_up_is_left_out() -> None:
    order = []

    def noting(name: str):
        def run(inputs):
            order.append(name)
            return CASE["leap_distances"].plain(inputs)

        return Variant(name, run)

    run = Bench(CASE["leap_distances"], SHAPE, CPU)
    seconds = run.take_turns([noting("a"), noting("b")], repeats=3)
    turns = "".join(name for name, _ in itertools.groupby(order))
    assert turns == "ababab", "ab, ba, ab, ba, ab: a turn next to its like"
    assert order.count("a") == order.count("b") > 10, "a turn is several calls"
    assert {key: len(times) for key, times in seconds.items()} == dict.fromkeys(
        [("a", FORWARD), ("b", FORWARD), ("copy", "copy"), ("clone", "clone")], 3
    )


@pytest.mark.slow
def test_compiled_variant_runs_forward_and_backward() -> None:
    lines = bench.measure(CASE["euler_step"], "quick", SHAPE)
    compiled = [line for line in lines if line["variant"] == "compile"]
    assert [line["pass"] for line in compiled] == [FORWARD, BACKWARD]
    assert all(line["error"] <= 2.1 * unit_roundoff(torch.bfloat16) for line in compiled)


def test_peak_counts_what_is_held_at_a_time() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        doubled = x + x
        tripled = doubled + x
        del doubled
        return tripled + x

    # Two of three results at a time, and not what they are made of.
    assert peak_bytes(lambda: torch.ones(1000), call, CPU) == 8000


def test_relative_error_takes_the_worst_output() -> None:
    exact = torch.tensor([2.0, -4.0])
    assert relative_error([exact, exact], [exact, exact]) == 0
    assert relative_error([exact, exact + torch.tensor([1.0, 0.0])], [exact, exact]) == 0.25


def test_clock_returns_the_result() -> None:
    seconds, result = Clock(CPU).seconds(lambda: 42)
    assert seconds >= 0
    assert result == 42
