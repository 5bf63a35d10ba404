// Which instruction set the kernels use on this processor.
#pragma once

enum class Isa { baseline, avx2, avx512 };

// Decided once. LEAP_NATIVE_ISA=avx2 or baseline asks for less than the processor has, so that one machine can
// test all of them.
Isa leap_isa_in_use();
