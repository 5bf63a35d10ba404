"""The GPUs that `audit` compiles for: how many programs fit on one of their cores, and how fast their memory is."""

from __future__ import annotations

from dataclasses import dataclass

ROOFLINE_SHAPE = (8, 65536, 64)
"""Latents whose roofline time is computed: 64 MiB each in bfloat16, so that caches hold little of them."""
NOT_MEASURED = "computed, not measured"


@dataclass(frozen=True)
class Core:
    """What a streaming multiprocessor (NVIDIA) or compute unit (AMD) can hold at a time.

    `registers` are 32-bit registers of one thread slot times the threads they serve; a warp takes them in steps of
    `register_step` a thread. `reserved_shared` bytes go to the system for every program.
    """

    warps: int
    programs: int
    registers: int
    register_step: int
    shared_bytes: int
    reserved_shared: int


@dataclass(frozen=True)
class Target:
    """An instruction set, and the GPU that stands for it."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    gpu: str
    bytes_per_second: float
    core: Core


# Cores: table "Technical Specifications per Compute Capability" of NVIDIA's CUDA C++ Programming Guide, and the CDNA 3
# white paper of AMD (4 SIMDs of 512 registers a lane, 8 waves a SIMD, 64 KiB of LDS).
# Bandwidths are peaks from the makers' data sheets: A100 80GB SXM 2039 GB/s, H100 SXM 3.35 TB/s, DGX B200 64 TB/s for
# eight GPUs, Instinct MI300X 5.3 TB/s.
TARGETS = (
    Target("sm_80", "cuda", 80, 32, "A100 80GB SXM", 2.039e12, Core(64, 32, 65536, 8, 164 << 10, 1 << 10)),
    Target("sm_90", "cuda", 90, 32, "H100 SXM", 3.35e12, Core(64, 32, 65536, 8, 228 << 10, 1 << 10)),
    Target("sm_100", "cuda", 100, 32, "B200", 8.0e12, Core(64, 32, 65536, 8, 228 << 10, 1 << 10)),
    Target("gfx942", "hip", "gfx942", 64, "MI300X", 5.3e12, Core(32, 32, 4 * 512 * 64, 8, 64 << 10, 0)),
)


def occupancy(target: Target, registers: int, shared_bytes: int, num_warps: int) -> float:
    """Return the share of a core's warps that are resident, for programs of `num_warps` warps.

    `registers` are those of one thread; `shared_bytes` those of one program.
    """
    core = target.core
    step = core.register_step
    per_warp = -(-max(registers, 1) // step) * step * target.warp_size
    programs = min(
        core.programs,
        core.warps // num_warps,
        core.registers // per_warp // num_warps,
        core.shared_bytes // max(shared_bytes + core.reserved_shared, 1),
    )
    return programs * num_warps / core.warps


def roofline_microseconds(target: Target, bytes_per_element: float) -> float:
    """Return the time in which the memory can move `ROOFLINE_SHAPE` elements at its peak rate."""
    batch, tokens, channels = ROOFLINE_SHAPE
    return 1e6 * batch * tokens * channels * bytes_per_element / target.bytes_per_second
