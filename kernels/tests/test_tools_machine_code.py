"""The reading of disassembled machine code, on snippets written by hand, and the arithmetic on what it shows."""

from __future__ import annotations

import pytest
from leap_kernels.tools.gpus import TARGETS, occupancy, roofline_microseconds
from leap_kernels.tools.machine_code import read_cdna, read_sass

TARGET = {target.name: target for target in TARGETS}
RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function kernel:
  REG:42 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
kernel:
        /*02f0*/                   LDG.E R18, desc[UR6][R12.64] ;
        /*03f0*/              @!P0 LDG.E.LTC128B.64 R4, desc[UR6][R14.64] ;
        /*0400*/              @!P0 LDG.E.128.CONSTANT R8, desc[UR6][R20.64] ;
        /*0410*/              @!P0 LDG.E.128 R8, desc[UR6][R20.64] ;
        /*0420*/                   LDG.E.U16 R9, desc[UR6][R22.64] ;
        /*0430*/                   LDGSTS.E.BYPASS.128 [R7], desc[UR6][R22.64] ;
        /*0440*/                   LDS R18, [R4] ;
        /*0450*/                   STS.128 [R4], R8 ;
        /*0460*/              @!P0 STG.E.128 desc[UR6][R4.64], R12 ;
        /*0470*/                   STG.E desc[UR6][R2.64], R5 ;
"""
CDNA = """
	s_load_dwordx4 s[12:15], s[0:1], 0x28
	global_load_dwordx4 v[6:9], v[6:7], off
	global_load_dwordx4 v[10:13], v[6:7], off
	buffer_load_short_d16 v2, v3, s[0:3], 0 offen
	global_store_dword v4, v3, s[0:1]
	global_store_dwordx4 v[2:3], v[8:11], off
	global_atomic_add_f32 v0, v1, s[0:1]
	ds_write_b32 v0, v1
---
amdhsa.kernels:
  - .agpr_count:     0
    .sgpr_count:     31
    .sgpr_spill_count: 1
    .vgpr_count:     12
    .vgpr_spill_count: 2
"""


def test_reads_sass() -> None:
    code = read_sass(SASS, RESOURCES)
    assert code.accesses == {
        ("load", 32): 1,
        ("load", 64): 1,
        ("load", 128): 3,
        ("load", 16): 1,
        ("store", 128): 1,
        ("store", 32): 1,
    }
    assert (code.registers, code.spills, code.atomics, code.float64) == (42, 0, 0, 0)


def test_counts_spills_and_atomics() -> None:
    worse = SASS + "  STL [R1+0x4], R3 ;\n  STL.64 [R1+0x8], R4 ;\n  LDL R3, [R1+0x4] ;\n"
    worse += "  RED.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;\n  ATOMG.E.ADD R0, desc[UR4][R2.64], R5 ;\n"
    assert read_sass(worse, RESOURCES).spills == 3
    assert read_sass(worse, RESOURCES).atomics == 2
    with pytest.raises(ValueError, match="registers"):
        read_sass(SASS, "")


def test_counts_what_computes_in_float64() -> None:
    names = ("DADD", "DFMA.RM", "DSETP.GT.AND", "F2F.F32.F64", "FRND.F64.FLOOR", "MUFU.RSQ64H")
    in_float32 = "  FADD R8, R5, R4 ;\n  F2I.S64.TRUNC R4, R5 ;\n  MUFU.RSQ R6, R7 ;\n"
    worse = SASS + in_float32 + "".join(f"  {name} R8, R6, R4 ;\n" for name in names)
    assert read_sass(worse, RESOURCES).float64 == len(names)
    assert read_cdna("\tv_fma_f64 v[0:1], v[0:1]\n\tv_cvt_f32_f64_e32 v0, v[0:1]\n\tv_add_f32 v0\n" + CDNA).float64 == 2


def test_reads_cdna() -> None:
    code = read_cdna(CDNA)
    assert code.accesses == {("load", 128): 2, ("load", 16): 1, ("store", 32): 1, ("store", 128): 1}
    assert (code.registers, code.spills, code.atomics, code.float64) == (12, 3, 1, 0)
    with pytest.raises(ValueError, match="vgpr_count"):
        read_cdna(CDNA.replace(".vgpr_count", ".something"))


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 32, 0, 4, 1.0),
        # 33 registers round to 40: 65536 / (40 * 32) = 51 warps, 12 programs of 4.
        ("sm_90", 33, 0, 4, 48 / 64),
        ("sm_90", 255, 0, 4, 8 / 64),
        # 64 KiB and the system's 1 KiB: 3 programs in 228 KiB, 2 in 164 KiB.
        ("sm_90", 32, 64 << 10, 4, 12 / 64),
        ("sm_80", 32, 64 << 10, 4, 8 / 64),
        # One warp a program: 32 programs at most.
        ("sm_80", 32, 0, 1, 0.5),
        ("gfx942", 64, 0, 4, 1.0),
        ("gfx942", 65, 0, 4, 28 / 32),
        ("gfx942", 16, 32 << 10, 4, 8 / 32),
    ],
)
def test_occupancy(target: str, registers: int, shared: int, warps: int, expected: float) -> None:
    assert occupancy(TARGET[target], registers, shared, warps) == expected


def test_roofline_is_bytes_over_bandwidth() -> None:
    # 33554432 elements of 8 bytes at 3.35 TB/s.
    assert roofline_microseconds(TARGET["sm_90"], 8.0) == pytest.approx(33554432 * 8 / 3.35e6)
