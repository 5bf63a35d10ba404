// C interface of the native CPU kernels. Raw pointers only, so that one binary serves any torch version.
//
// Tensors are contiguous, laid out (batch, per_sample), of one dtype; `delta` holds one float per sample.
// Inputs may be read at any alignment. Outputs must not overlap inputs, except where stated.
// Functions return 0 on success and a negative number otherwise: -1 unknown dtype, -2 out of memory.
#pragma once

#include <cstdint>

#define LEAP_API extern "C" __attribute__((visibility("default")))

// Changes whenever a signature below does; leap_kernels/_native.py refuses any other value.
constexpr int32_t LEAP_ABI = 1;

enum LeapDtype : int32_t { LEAP_FLOAT32 = 0, LEAP_BFLOAT16 = 1, LEAP_FLOAT16 = 2 };

LEAP_API int32_t leap_abi();

// Name of the instruction set picked for this processor: "avx512", "avx2" or "baseline".
LEAP_API const char* leap_isa();

// 1 if built with OpenMP, else 0 (then `threads` is ignored).
LEAP_API int32_t leap_has_openmp();

// xhat = x - delta * velocity, in float. With target == nullptr, out = xhat. Otherwise out = target, bit for bit,
// and distance[b] = mean |target - xhat| over the sample.
LEAP_API int32_t leap_update_forward(const void* x, const void* velocity, const void* target, const float* delta,
                                     void* out, float* distance, int64_t batch, int64_t per_sample, int32_t dtype,
                                     int32_t threads);

// grad_velocity = -delta * grad, in float.
LEAP_API int32_t leap_update_backward(const void* grad, const float* delta, void* grad_velocity, int64_t batch,
                                      int64_t per_sample, int32_t dtype, int32_t threads);
