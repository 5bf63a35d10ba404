"""The counting of bytes, on small kernels written by hand, so that a wrong count shows."""

from __future__ import annotations

import numpy as np
import pytest
from leap_kernels.tools.ptx import Traffic, address_of, count_traffic
from leap_kernels.tools.ptx_integers import evaluate
from leap_kernels.tools.ptx_parse import Uncountable, parse

THREADS = 128
# %rd1 and %rd2 point to what this thread of this program would access at 16 bytes a thread; %r1 is the thread.
PROLOGUE = """
// A comment with a brace }
.version 8.7
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1,
	.param .u32 kernel_param_2
)
.reqntid 128
{
	.reg .b32 	%r<107>;
	.loc	1 49 0                          // kernel.py:49:0
$L__func_begin0:
	ld.param.b64 	%rd3, [kernel_param_0];
	ld.param.b64 	%rd4, [kernel_param_1];
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, %ctaid.x;
	mad.lo.s32 	%r3, %r2, 128, %r1;
	mul.wide.u32 	%rd5, %r3, 16;
	add.s64 	%rd1, %rd3, %rd5;
	add.s64 	%rd2, %rd4, %rd5;
"""
EPILOGUE = """
	ret;
}
	.section	.debug_abbrev
	{
.b8 1
	}
"""
LOAD = "ld.global.v4.b32 { %r10, %r11, %r12, %r13 }, [ %rd1 + 0 ];"
STORE = "st.global.v4.b32 [ %rd2 + 0 ], { %r10, %r11, %r12, %r13 };"


def count(body: str, size: int = 1 << 20, program: int = 3, first: bytes | None = None) -> Traffic:
    return count_traffic(PROLOGUE + body + EPILOGUE, [first, None, size], THREADS, program, programs=8)


def test_a_mask_is_known_from_packed_registers() -> None:
    """As compilers pair what they compute two at a time."""
    packed = "mov.b64 %rd8, {%r2, %r1};\nmov.b64 {%r20, %r21}, %rd8;\nsetp.lt.s32 %p1, %r21, 32;\n@%p1 "
    (access,) = count(packed + LOAD).accesses
    assert access.requested == 16 * 32
    assert (access.first, access.end) == (3 * 16 * THREADS, 3 * 16 * THREADS + 16 * 32)


def test_copy_moves_each_byte_once_each_way() -> None:
    traffic = count(LOAD + STORE)
    assert traffic.bytes_moved == 2 * 16 * THREADS
    assert traffic.vector_bits == 128
    assert [(a.stores, a.argument, a.requested, a.scalar) for a in traffic.accesses] == [
        (False, 0, 16 * THREADS, False),
        (True, 1, 16 * THREADS, False),
    ]


def test_inline_assembly_and_masks_as_triton_writes_them() -> None:
    traffic = count(f"""
	setp.lt.s32 	%p1, %r1, 5;
	// begin inline asm
	mov.u32 %r10, 0x0;
	@%p1 {LOAD}
	// end inline asm
	{{
	.reg .pred %tmp;
	@!%p1 {STORE}
	}}
""")
    assert [access.requested for access in traffic.accesses] == [16 * 5, 16 * (THREADS - 5)]


def test_second_read_of_a_tensor_counts_again() -> None:
    assert count(LOAD + LOAD + STORE).bytes_moved == 3 * 16 * THREADS


@pytest.mark.slow
def test_loop_counts_as_often_as_it_runs() -> None:
    loop = f"""
	ld.param.b32 	%r20, [kernel_param_2];
	mov.b32 	%r21, 0;
$L__BB0_1:
	{LOAD}
	add.s64 	%rd1, %rd1, 2048;
	add.s32 	%r21, %r21, 1;
	setp.lt.s32 	%p2, %r21, %r20;
	@%p2 bra 	$L__BB0_1;
"""
    assert count(loop, size=7).bytes_moved == 7 * 16 * THREADS
    with pytest.raises(Uncountable, match="more than"):
        count(loop, size=1 << 30)


def test_scattered_access_costs_whole_sectors() -> None:
    scattered = "mul.wide.u32 %rd6, %r1, 64; add.s64 %rd7, %rd3, %rd6; ld.global.b16 %rs1, [%rd7];"
    traffic = count(scattered)
    assert traffic.accesses[0].requested == 2 * THREADS
    assert traffic.bytes_moved == 32 * THREADS
    assert traffic.vector_bits == 16


def test_two_halves_of_a_sector_are_not_two_sectors() -> None:
    halves = """
	mul.wide.u32 %rd6, %r1, 32;
	add.s64 %rd7, %rd3, %rd6;
	ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd7];
	ld.global.v4.f32 {%f5, %f6, %f7, %f8}, [%rd7+16];
"""
    assert count(halves).bytes_moved == 32 * THREADS


@pytest.mark.parametrize("mask", ["", "setp.eq.s32 %p1, %r1, 0; @%p1"])
def test_scalar_costs_its_bytes_alone_and_sets_no_width(mask: str) -> None:
    traffic = count(f"{LOAD} {mask} st.global.b32 [%rd4], {{ %r10 }};")
    assert traffic.bytes_moved == 16 * THREADS + 4
    assert traffic.accesses[1].scalar
    assert traffic.vector_bits == 128


def test_same_addresses_in_several_threads_count_once() -> None:
    redundant = "and.b32 %r4, %r1, 63; mul.wide.u32 %rd6, %r4, 16; add.s64 %rd7, %rd3, %rd6;"
    assert count(redundant + "ld.global.v2.b64 {%rd8, %rd9}, [%rd7];").bytes_moved == 16 * 64


def test_access_that_no_thread_executes_moves_nothing() -> None:
    traffic = count(f"setp.gt.u32 %p1, %r1, 500; @%p1 {LOAD} {STORE}")
    assert traffic.bytes_moved == 16 * THREADS
    assert traffic.vector_bits == 128


def test_cache_hints_and_asynchronous_copies_and_atomics() -> None:
    traffic = count("""
	ld.global.nc.L1::evict_first.L2::128B.v2.b32 {%r5, %r6}, [%rd1];
	cp.async.cg.shared.global [ %r7 + 0 ], [ %rd2 + 0 ], 0x10, 0x10;
	red.global.add.f32 [%rd4], %f1;
	atom.global.add.f32 %f2, [%rd4], %f1;
""")
    assert [(a.bits, a.stores) for a in traffic.accesses] == [(64, False), (128, False), (32, True), (32, True)]
    assert traffic.atomics == 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("ld.global.b64 %rd6, [%rd3]; ld.global.b32 %r5, [%rd6];", "address"),
        ("ld.global.b32 %r5, [%rd3]; setp.gt.s32 %p1, %r5, 0; @%p1 bra $L__end; $L__end: ret;", "depends on data"),
        ("setp.lt.s32 %p1, %r1, 5; @%p1 bra $L__end; $L__end: ret;", "parts the threads"),
        ("ld.volatile.b32 %r5, [%rd3];", "cannot count"),
        ("call.uni (%r5), helper, (%r6);", "cannot count"),
        ("cp.async.bulk.shared.global [%r1], [%rd1], 64, [%r2];", "cannot count"),
    ],
)
def test_what_cannot_be_known_is_refused(body: str, reason: str) -> None:
    with pytest.raises(Uncountable, match=reason):
        count(body)
    with pytest.raises(Uncountable, match="no kernel"):
        parse(".version 8.7")


def test_addresses_come_out_of_a_table_that_is_given() -> None:
    """Of two numbers the second is the address of what parameter 5 would point to."""
    through = """
	ld.global.b64 %rd6, [%rd3+8];
	mul.wide.u32 %rd7, %r1, 8;
	add.s64 %rd8, %rd6, %rd7;
	ld.global.b64 %rd9, [%rd8];
"""
    given = (7).to_bytes(8, "little") + address_of(5).to_bytes(8, "little")
    traffic = count(through, first=given)
    assert [(a.argument, a.scalar, a.requested) for a in traffic.accesses] == [(0, True, 8), (5, False, 8 * THREADS)]
    # What is loaded from there is data again, and so is all that is not given.
    for body, table in ((through + "ld.global.b64 %rd10, [%rd9];", given), (through, None)):
        with pytest.raises(Uncountable, match=r"address of ld\.global"):
            count(body, first=table)


def test_memory_on_the_chip_is_not_counted() -> None:
    body = """
	st.shared.b32 [ %r6 + 0 ], %r5;
	bar.sync 0;
	ld.shared.v2.b32 {%r5, %r6}, [%r7];
	redux.sync.add.s32 %r1, %r5, -1;
	shfl.sync.bfly.b32 %r8, %r5, 16, 31, -1;
"""
    assert count(body).accesses == ()
    # What a warp sums depends on data, and what is added to it.
    with pytest.raises(Uncountable, match="address"):
        count(body + "mul.wide.u32 %rd6, %r1, 16; add.s64 %rd7, %rd3, %rd6; ld.global.b32 %r9, [%rd7];")


def test_mask_that_depends_on_data_counts_every_thread() -> None:
    masked = "ld.global.b32 %r5, [%rd3]; setp.gt.s32 %p1, %r5, 0; @%p1 " + STORE
    assert count(masked).bytes_moved == 4 + 16 * THREADS


def test_guarded_assignment_keeps_the_other_threads_values() -> None:
    body = f"setp.lt.s32 %p1, %r1, 64; @%p1 add.s64 %rd1, %rd1, 1048576; {LOAD}"
    below, above = 16 * THREADS * 3, 16 * THREADS * 3 + 1048576
    sectors = count(body).accesses[0].sectors
    base = 1 << 40
    assert sectors == {
        (base + start + offset) // 32
        for start, offsets in ((above, range(0, 1024, 32)), (below, range(1024, 2048, 32)))
        for offset in offsets
    }


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("add.s32", (0xFFFFFFFF, 2), 1),
        ("sub.s64", (1, 2), 2**64 - 1),
        ("mul.wide.s32", (0xFFFFFFFF, 4), 2**64 - 4),
        ("mul.wide.u32", (0xFFFFFFFF, 4), 0xFFFFFFFF * 4),
        ("mul.lo.s32", (0xFFFFFFFF, 3), 0xFFFFFFFD),
        ("mul.hi.u32", (0xD2511F53, 0xFFFFFFFF), 0xD2511F52),
        ("mul.hi.s32", (0xFFFFFFFF, 5), 0xFFFFFFFF),
        ("mad.wide.s32", (0xFFFFFFFE, 3, 10), 4),
        ("mad.lo.s32", (3, 4, 5), 17),
        ("div.s32", (0xFFFFFFF9, 2), 0xFFFFFFFD),
        ("rem.s32", (0xFFFFFFF9, 2), 0xFFFFFFFF),
        ("div.u32", (0xFFFFFFF9, 2), 0x7FFFFFFC),
        ("bfe.u32", (0xABCD, 4, 8), 0xBC),
        ("bfe.s32", (0xABCD, 4, 8), 0xFFFFFFBC),
        ("shl.b32", (0x80000001, 1), 2),
        ("shr.s32", (0x80000000, 31), 0xFFFFFFFF),
        ("shr.u32", (0x80000000, 31), 1),
        ("and.b32", (0b1100, 0b1010), 0b1000),
        ("or.b64", (0b1100, 0b1010), 0b1110),
        ("xor.b32", (0b1100, 0b1010), 0b0110),
        ("not.b32", (0,), 0xFFFFFFFF),
        ("neg.s32", (1,), 0xFFFFFFFF),
        ("abs.s32", (0xFFFFFFFF,), 1),
        ("min.s32", (0xFFFFFFFF, 1), 0xFFFFFFFF),
        ("max.u32", (0xFFFFFFFF, 1), 0xFFFFFFFF),
        ("cvt.s64.s32", (0x80000000,), 0xFFFFFFFF80000000),
        ("cvt.u64.u32", (0x80000000,), 0x80000000),
        ("setp.lt.s32", (0xFFFFFFFF, 0), True),
        ("setp.lt.u32", (0xFFFFFFFF, 0), False),
        ("setp.ge.and.s32", (1, 0, 0), False),
        ("selp.b32", (7, 9, 0), 9),
        ("and.pred", (1, 0), False),
        ("not.pred", (0,), True),
        ("cvt.rn.f32.s32", (1,), None),
        ("add.f32", (1, 1), None),
        ("mul.hi.s64", (1, 1), None),
        ("popc.b32", (1,), None),
    ],
)
def test_integer_instructions(opcode: str, operands: tuple[int, ...], expected: int | bool | None) -> None:
    result = evaluate(opcode, [np.full(2, operand, dtype=np.uint64) for operand in operands])
    if expected is None:
        assert result is None
    else:
        assert result is not None
        assert result.tolist() == [expected] * 2
    assert evaluate(opcode, [None, *[np.zeros(2, dtype=np.uint64)] * (len(operands) - 1)]) is None
