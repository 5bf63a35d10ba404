"""Every op's launcher through Triton's runtime and compiler, for GPUs that are not here: only the launch is not made.

For sizes that Triton compiles versions of their own for: of one element, at unaligned addresses, and beyond 2^31
elements, whose tensors have no memory. The first and the last program are walked through: what they read and write is
within the tensors, from the first byte to the last, which it would not be if 32 bits had overflown. GPUs take turns.
"""

from __future__ import annotations

from typing import Any

import pytest
from apart import printed_by
from leap_kernels._catalog import OPS
from leap_kernels.tools.launch_cases import LAUNCHERS

LAUNCH = """
import json
from collections import Counter
from dataclasses import replace
import torch
from leap_kernels._catalog import OPS
from leap_kernels.tools.audit_compile import launched, walked
from leap_kernels.tools.gpus import TARGETS
from leap_kernels.tools.launches import Inputs

SIZES = {
    "one element": (1, 1),
    "2^31 in few samples": (3, (1 << 30) + 1, 3),
    "2^31 in many samples": ((1 << 22) + 1, 1 << 10),
    "2^31 in each sample": (2, 1 << 31),
}

def reach(launch, program, target, spec, count):
    names = [*launch.parameters, *spec.row]
    traffic = walked(launch, program, target, spec, count)
    spans = {}
    for access in traffic.accesses:
        if access.argument is not None and names[access.argument] not in spec.row:
            first, end = spans.get(names[access.argument], (access.first, access.end))
            spans[names[access.argument]] = min(first, access.first), max(end, access.end)
    return spans, traffic.vector_bits

def extent(tensor):  # from the first byte to the last, of a view too
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.itemsize * (last + 1) if tensor.numel() else 0

seen = set()
variants = Counter()
number = 0
for spec in (spec for op in OPS for spec in op.kernels):
    # Other dtypes have the same addresses.
    kind = (id(spec.kernel), tuple(spec.constexprs.items()), "packed" in spec.name, spec.dtypes == (torch.float32,))
    if kind in seen:
        continue
    seen.add(kind)
    # Of a kernel with other constants, every second size.
    variants[spec.kernel] += 1
    sizes = list(SIZES.items()) if variants[spec.kernel] == 1 else list(SIZES.items())[variants[spec.kernel] % 2 :: 2]
    for size, numbers in sizes:
        number += 1
        target = TARGETS[(number + number // 12) % 3]
        inputs = Inputs(*numbers[:2], spec.dtypes[-1], *numbers[2:])
        if spec.row:  # Through a table Triton does not see what divides by 16: it is told.
            aligned = inputs.offset == 0 and inputs.count % 16 == 0
            spec = replace(spec, constexprs={**spec.constexprs, "ALIGNED": aligned})
        launch, _ = launched(spec, inputs, target)
        tensors = {name: v for name, v in launch.arguments.items() if isinstance(v, torch.Tensor)}
        line = {
            "kernel": spec.name,
            "size": size,
            "target": target.name,
            "grid": launch.grid,
            "types": launch.signature,
            "integers": {name: v for name, v in launch.parameters.items() if isinstance(v, int)},
            "num_warps": launch.compiled.metadata.num_warps,
            "fp_fusion": launch.compiled.metadata.enable_fp_fusion,
            "cubin": len(launch.compiled.asm["cubin"]),
            "bytes": {name: extent(tensor) for name, tensor in tensors.items()},
            "whole": [n for n, t in tensors.items() if t.numel() == inputs.count and extent(t) == t.nbytes],
        }
        # One program that takes all samples, or the sums of one, would be walked through for hours.
        if inputs.count < 1 << 20 or (launch.programs > 1 and not spec.sums_only):
            line["first"], line["bits"] = reach(launch, 0, target, spec, inputs.count)
            line["last"], _ = reach(launch, launch.programs - 1, target, spec, inputs.count)
        print(json.dumps(line))
"""
MANY = ("", "/any_offset", "/float32")
UNUSED = {
    "leap_update/no_target": {"uncond_ptr"},
    "combine_gradient_terms/norms": {"out_ptr"},
    "leap_update/backward": {"second_out_ptr"},
    "scale_gradient/backward": {"second_out_ptr"},
    "euler_step": {"uncond_ptr"},
    "euler_step/backward": {"second_out_ptr"},
    **{f"adamw_8bit_step_many_{variant}": {"parameter_ptr", "gradient_ptr"} for variant in MANY},
    "total_norm": {"value_ptr"},
    "gated_residual/backward_of_y": {"y_ptr"},
    "qk_norm_rope/norm_only": {"cos_ptr", "sin_ptr"},
    "qk_norm_rope/backward_frozen": {"partial_ptr"},
}
"""Pointers that a launcher passes and its kernel does not follow; it may follow those in its table."""
SPECS = {spec.name: spec for op in OPS for spec in op.kernels}


def test_every_kernel_has_its_launcher() -> None:
    assert set(LAUNCHERS) == set(SPECS)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return printed_by(LAUNCH, tmp_path_factory.mktemp("cache"))


@pytest.mark.slow
@pytest.mark.triton
def test_every_size_compiles_as_the_catalog_says(lines) -> None:
    assert {(SPECS[line["kernel"]].kernel, line["size"]) for line in lines} == {
        (spec.kernel, line["size"]) for spec in SPECS.values() for line in lines
    }
    assert {(line["size"], line["target"]) for line in lines} == {
        (line["size"], target) for line in lines for target in ("sm_80", "sm_90", "sm_100")
    }
    for line in lines:
        spec, where = SPECS[line["kernel"]], (line["kernel"], line["size"], line["target"])
        assert line["cubin"] > 0, where
        assert line["num_warps"] == spec.num_warps or "BLOCK" in spec.shaped, where
        assert line["fp_fusion"] == spec.fp_fusion, where
        assert line["grid"][0] < 1 << 31, where
        assert line["grid"][1:] == [1, 1], where
        for name, said in spec.arguments.items():
            if name in line["integers"] and said == "i32":
                wide = line["integers"][name] >= 1 << 31
                assert line["types"][name] == ("i64" if wide else "i32"), (*where, name)


@pytest.mark.slow
@pytest.mark.triton
def test_all_of_the_tensors_is_reached_and_nothing_beside_them(lines) -> None:
    skipped = {(line["kernel"], line["size"]) for line in lines if "last" not in line}
    of_sums = ("consistency_weighted_loss", "group_norm_silu/group_moments", "group_norm_silu/group_gradients")
    assert skipped == {(name, line["size"]) for name in of_sums for line in lines if line["size"] != "one element"}
    for line in lines:
        if "last" not in line:
            continue
        where = (line["kernel"], line["size"], line["target"])
        assert line["first"].keys() == line["last"].keys(), where
        if line["size"] != "one element":
            assert set(line["whole"]) - UNUSED.get(line["kernel"], set()) <= line["first"].keys(), where
        for name, (_, end) in line["last"].items():
            first, _ = line["first"][name]
            size = line["bytes"][name]
            assert first >= 0, (*where, name)
            assert end <= size, (*where, name)
            if name in line["whole"]:
                assert (first, end) == (0, size), (*where, name)


@pytest.mark.slow
@pytest.mark.triton
def test_addresses_that_are_not_aligned_get_a_version_of_their_own(lines) -> None:
    for line in lines:
        if line.get("bits") and line["size"] == "2^31 in few samples":
            assert line["bits"] < 128, line["kernel"]
        if line.get("bits") and line["size"] == "2^31 in each sample":
            assert line["bits"] >= 32, line["kernel"]
