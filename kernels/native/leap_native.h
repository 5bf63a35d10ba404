// C interface of the native CPU kernels. Raw pointers only, so that one binary serves any torch version.
//
// Tensors are contiguous, laid out (batch, per_sample); scalars per sample are arrays of `batch` floats. Tensors are
// float, bfloat16 or half as the dtype beside them says; arithmetic is in float. Any address is taken. Outputs must
// not overlap inputs, except where stated. The result has the same bits on any number of threads and on any
// instruction set. On Linux, large outputs are advised to use huge pages: where their memory is new, most of the time
// would go into handing it over 4096 bytes at a time.
// Functions return 0 on success and a negative number otherwise: -1 unknown dtype, -2 out of memory.
#pragma once

#include <cstdint>

#define LEAP_API extern "C" __attribute__((visibility("default")))

// Changes whenever a signature below or a function of python.cpp does; leap_kernels/_native.py refuses any other value.
constexpr int32_t LEAP_ABI = 8;

enum LeapDtype : int32_t { LEAP_FLOAT32 = 0, LEAP_BFLOAT16 = 1, LEAP_FLOAT16 = 2 };

LEAP_API int32_t leap_abi();

// Name of the instruction set picked for this processor: "avx512", "avx2" or "baseline".
LEAP_API const char* leap_isa();

// 1 if built with OpenMP, else 0 (then `threads` is ignored).
LEAP_API int32_t leap_has_openmp();

// out = target, bit for bit, and distance[b] = mean |target - (x + delta * velocity)| over the sample. x, target and
// out are of `dtype`.
LEAP_API int32_t leap_connector(const void* x, const void* velocity, const void* target, const float* delta, void* out,
                                float* distance, int64_t batch, int64_t per_sample, int32_t dtype,
                                int32_t velocity_dtype, int32_t threads);

// out = factor * grad, and, if second_out is not null, second_out = second_factor * grad. Both outputs are of
// `out_dtype`.
LEAP_API int32_t leap_scale(const void* grad, const float* factor, void* out, const float* second_factor,
                            void* second_out, int64_t batch, int64_t per_sample, int32_t dtype, int32_t out_dtype,
                            int32_t threads);

// distance_j[b] = mean |x_j - (x_k - delta * v_k)|, distance_end[b] = mean |x_end - (x_j - sigma_j * v_j)|. The
// three latents are of `dtype`, both velocities of `velocity_dtype`.
LEAP_API int32_t leap_distances(const void* x_k, const void* v_k, const void* x_j, const void* v_j,
                                const void* x_end, const float* delta, const float* sigma_j, float* distance_j,
                                float* distance_end, int64_t batch, int64_t per_sample, int32_t dtype,
                                int32_t velocity_dtype, int32_t threads);

// out = coefficient * (direct + alpha * s * nested), s = min(1, max_ratio * |direct| / |nested|), or 1 where
// |nested| is 0 or max_ratio is negative (no limit). Also writes both norms. direct and out are of `dtype`.
LEAP_API int32_t leap_combine(const void* direct, const void* nested, const float* coefficient, float alpha,
                              float max_ratio, void* out, float* direct_norm, float* nested_norm, int64_t batch,
                              int64_t per_sample, int32_t dtype, int32_t nested_dtype, int32_t threads);

// out = x + delta * v, where v = velocity, or uncond + scale * (velocity - uncond) if uncond is not null. x and out
// are of `dtype`, both velocities of `velocity_dtype`.
LEAP_API int32_t leap_euler_step(const void* x, const void* velocity, const void* uncond, const float* delta,
                                 const float* scale, void* out, int64_t batch, int64_t per_sample, int32_t dtype,
                                 int32_t velocity_dtype, int32_t threads);

// weight[b] = 1 / sum over the `count` rows of max(distances[row][b], tau); loss = mean of
// weight[b] * max(0, threshold - reward[b]). A handful of values: one thread takes them.
LEAP_API int32_t leap_weighted_loss(const float* reward, const float* distances, float threshold, float tau,
                                    float* loss, float* weight, int64_t count, int64_t batch, int32_t threads);

// Rounds float to bfloat16: 16 random bits are added to the half that is cut off. Element i takes number
// (offset + i) % 8 of the eight 16-bit numbers that Philox4x32-7 draws at counter (offset + i) / 8.
LEAP_API int32_t leap_stochastic_round(const float* from, void* to, uint64_t seed, int64_t offset, int64_t count,
                                       int32_t threads);

// total = total + value, in place.
LEAP_API int32_t leap_accumulate(void* total, const void* value, int64_t count, int32_t dtype, int32_t value_dtype,
                                 int32_t threads);

// average = average + step * (weights - average), in place.
LEAP_API int32_t leap_ema_update(void* average, const void* weights, float step, int64_t count, int32_t dtype,
                                 int32_t weights_dtype, int32_t threads);

// A step of AdamW on a parameter of `dtype`, in place, with a gradient of `gradient_dtype`, each float or bfloat16.
// Element i of moment n is mapn[staten[i]] * absmaxn[i / 256]. With m and v the moments after the step,
//   m = beta1 * m + rest1 * g,  v = beta2 * v + rest2 * g^2,  g = gradient_scale * gradient
//   parameter = parameter - (rate * m / (sqrt(v) / root + eps) + decay * parameter)
// where bfloat16 is rounded as leap_stochastic_round does. A moment then becomes bytes again: absmax is the largest
// magnitude of its 256 elements, NaN aside, and the byte is tablen[(1 + x) / 2 * 65535, rounded] for x = element /
// absmax, or tablen[0] for NaN.
LEAP_API int32_t leap_adamw_8bit_step(void* parameter, const void* gradient, uint8_t* state1, float* absmax1,
                                      uint8_t* state2, float* absmax2, const float* map1, const uint8_t* table1,
                                      const float* map2, const uint8_t* table2, float beta1, float rest1, float beta2,
                                      float rest2, float gradient_scale, float rate, float root, float eps,
                                      float decay, uint64_t seed, int64_t offset, int64_t count, int32_t dtype,
                                      int32_t gradient_dtype, int32_t threads);

// Queries or keys: out = rotated(x * weight / sqrt(mean(x^2) + eps)) over each head of `width` elements, at most 512.
// x and out are (batch, tokens, heads, width) of `dtype`, with the given distances, in elements, from one sample, token
// and head of x to the next, and from one sample and token of out. weight is null for 1. cos and sin are
// (tokens, width / 2), `table_batch` elements from one sample to the next, and null for no rotation; a pair (a, b)
// becomes (a cos - b sin, b cos + a sin), and is (2i, 2i + 1), or with `halves` (i, i + width / 2).
LEAP_API int32_t leap_norm_rope(const void* x, const float* weight, const float* cos, const float* sin, void* out,
                                int64_t x_batch, int64_t x_token, int64_t x_head, int64_t out_batch,
                                int64_t out_token, int64_t table_batch, int64_t batch, int64_t tokens, int64_t heads,
                                int64_t width, float eps, int32_t halves, int32_t dtype, int32_t threads);

// The gradients of leap_norm_rope from `grad`, that at its output: out, contiguous, at x, and at_weight (width,), unless
// it is null, at the weight.
LEAP_API int32_t leap_norm_rope_backward(const void* grad, const void* x, const float* weight, const float* cos,
                                         const float* sin, void* out, float* at_weight, int64_t grad_batch,
                                         int64_t grad_token, int64_t grad_head, int64_t x_batch, int64_t x_token,
                                         int64_t x_head, int64_t table_batch, int64_t batch, int64_t tokens,
                                         int64_t heads, int64_t width, float eps, int32_t halves, int32_t dtype,
                                         int32_t threads);

// out = silu(y) with y = (x - mean) * rstd * weight + bias, where mean and rstd = 1 / sqrt(variance + eps) are those of
// each of the groups of a sample, and are written (batch, groups). x and out are (batch, channels, places) of `dtype`, or
// with `last` (batch, places, channels); weight and bias are per channel, null for 1 and 0.
LEAP_API int32_t leap_group_norm_silu(const void* x, const float* weight, const float* bias, void* out, float* mean,
                                      float* rstd, int64_t batch, int64_t channels, int64_t places, int64_t groups,
                                      float eps, int32_t last, int32_t dtype, int32_t threads);

// The gradients of leap_group_norm_silu from `grad`, that at its output, and from what it wrote: out at x, and at_weight
// and at_bias, both (channels,).
LEAP_API int32_t leap_group_norm_silu_backward(const void* grad, const void* x, float* mean, float* rstd,
                                               const float* weight, const float* bias, void* out, float* at_weight,
                                               float* at_bias, int64_t batch, int64_t channels, int64_t places,
                                               int64_t groups, int32_t last, int32_t dtype, int32_t threads);

// ---- transformer blocks ----------------------------------------------------------------------------------------
//
// Tensors are (batch, rows, width). shift, scale and gate hold a vector of `width` for each sample, `..._stride`
// elements apart. Gradients of these vectors are (batch, width), contiguous, of the dtype of the vector.

// out = (x - mean) * rstd * (1 + scale) + shift, with mean and rstd = 1 / sqrt(variance + eps) of each row, which are
// written to `statistics` (2, batch, rows). shift may be null.
LEAP_API int32_t leap_adaln(const void* x, const void* shift, int64_t shift_stride, const void* scale,
                            int64_t scale_stride, float eps, void* out, float* statistics, int64_t batch,
                            int64_t rows, int64_t width, int32_t dtype, int32_t shift_dtype, int32_t scale_dtype,
                            int32_t threads);

// grad_shift may be null, and grad_scale with it.
LEAP_API int32_t leap_adaln_backward(const void* grad, const void* x, const void* scale, int64_t scale_stride,
                                     const float* statistics, void* grad_x, void* grad_shift,
                                     void* grad_scale, int64_t batch, int64_t rows, int64_t width, int32_t dtype,
                                     int32_t shift_dtype, int32_t scale_dtype, int32_t threads);

// out = x + gate * y; x and out are of `dtype`.
LEAP_API int32_t leap_gated_residual(const void* x, const void* gate, int64_t gate_stride, const void* y, void* out,
                                     int64_t batch, int64_t rows, int64_t width, int32_t dtype, int32_t gate_dtype,
                                     int32_t y_dtype, int32_t threads);

// y and grad_gate are null where the gradient of gate is not wanted; grad_y may be null where it is.
LEAP_API int32_t leap_gated_residual_backward(const void* grad, const void* gate, int64_t gate_stride, const void* y,
                                              void* grad_gate, void* grad_y, int64_t batch, int64_t rows,
                                              int64_t width, int32_t dtype, int32_t gate_dtype, int32_t y_dtype,
                                              int32_t threads);

// out = 0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))), or, if grad is not null, grad times its derivative,
// and then `value`, if not null, the function itself.
LEAP_API int32_t leap_gelu_tanh(const void* grad, const void* x, void* out, void* value, int64_t count,
                                int32_t dtype, int32_t threads);

// out = gate / (1 + exp(-gate)) * up. Strides are those of rows.
LEAP_API int32_t leap_swiglu(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* out,
                             int64_t rows, int64_t width, int32_t dtype, int32_t threads);

// `out_stride` is that of the rows of both gradients.
LEAP_API int32_t leap_swiglu_backward(const void* grad, const void* gate, int64_t gate_stride, const void* up,
                                      int64_t up_stride, void* grad_gate, void* grad_up, int64_t out_stride,
                                      int64_t rows, int64_t width, int32_t dtype, int32_t threads);
