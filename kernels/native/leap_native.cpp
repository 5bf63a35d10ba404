// The C interface: picks the instruction set once, and hands every call to the kernels compiled for it.

#include "leap_native.h"

#include <cstdlib>
#include <string>

#include "calls.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

// Asks for huge pages where `bytes` from `output` on hold a few of them. Only advice: a failure changes nothing.
void advise_huge_pages(void* output, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t HUGE_PAGE = uintptr_t{2} << 20;
  if (bytes < int64_t{2} * static_cast<int64_t>(HUGE_PAGE)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(output) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(output) + static_cast<uintptr_t>(bytes)) / HUGE_PAGE * HUGE_PAGE;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)output;
  (void)bytes;
#endif
}

int64_t bytes_of(int64_t elements, int32_t dtype) { return elements * (dtype == LEAP_FLOAT32 ? 4 : 2); }

enum class Isa { baseline, avx2, avx512 };

// LEAP_NATIVE_ISA=avx2 or baseline asks for less than the processor has, so that one machine can test all of them.
Isa detect() {
#if defined(__x86_64__)
  const char* asked = std::getenv("LEAP_NATIVE_ISA");
  const std::string cap = asked == nullptr ? "avx512" : asked;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && cap == "avx512") return Isa::avx512;
  if (avx2 && cap != "baseline") return Isa::avx2;
#endif
  return Isa::baseline;
}

Isa isa() {
  static const Isa detected = detect();
  return detected;
}

template <class Call>
int32_t dispatch(const Call& call) {
#if defined(__x86_64__)
  if (isa() == Isa::avx512) return avx512::run(call);
  if (isa() == Isa::avx2) return avx2::run(call);
#endif
  return baseline::run(call);
}

}  // namespace

int32_t leap_abi() { return LEAP_ABI; }

const char* leap_isa() {
  switch (isa()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

int32_t leap_has_openmp() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}

int32_t leap_connector(const void* x, const void* velocity, const void* target, const float* delta, void* out,
                       float* distance, int64_t batch, int64_t per_sample, int32_t dtype, int32_t velocity_dtype,
                       int32_t threads) {
  advise_huge_pages(out, bytes_of(batch * per_sample, dtype));
  return dispatch(
      Connector{x, velocity, target, delta, out, distance, {batch, per_sample, threads}, dtype, velocity_dtype});
}

int32_t leap_scale(const void* grad, const float* factor, void* out, const float* second_factor, void* second_out,
                   int64_t batch, int64_t per_sample, int32_t dtype, int32_t out_dtype, int32_t threads) {
  advise_huge_pages(out, bytes_of(batch * per_sample, out_dtype));
  if (second_out != nullptr) advise_huge_pages(second_out, bytes_of(batch * per_sample, out_dtype));
  return dispatch(
      Scale{grad, factor, out, second_factor, second_out, {batch, per_sample, threads}, dtype, out_dtype});
}

int32_t leap_distances(const void* x_k, const void* v_k, const void* x_j, const void* v_j, const void* x_end,
                       const float* delta, const float* sigma_j, float* distance_j, float* distance_end,
                       int64_t batch, int64_t per_sample, int32_t dtype, int32_t velocity_dtype, int32_t threads) {
  return dispatch(LeapDistances{x_k, v_k, x_j, v_j, x_end, delta, sigma_j, distance_j, distance_end,
                                {batch, per_sample, threads}, dtype, velocity_dtype});
}

int32_t leap_combine(const void* direct, const void* nested, const float* coefficient, float alpha, float max_ratio,
                     void* out, float* direct_norm, float* nested_norm, int64_t batch, int64_t per_sample,
                     int32_t dtype, int32_t nested_dtype, int32_t threads) {
  advise_huge_pages(out, bytes_of(batch * per_sample, dtype));
  return dispatch(Combine{direct, nested, coefficient, alpha, max_ratio, out, direct_norm, nested_norm,
                          {batch, per_sample, threads}, dtype, nested_dtype});
}

int32_t leap_euler_step(const void* x, const void* velocity, const void* uncond, const float* delta,
                        const float* scale, void* out, int64_t batch, int64_t per_sample, int32_t dtype,
                        int32_t velocity_dtype, int32_t threads) {
  advise_huge_pages(out, bytes_of(batch * per_sample, dtype));
  return dispatch(EulerStep{x, velocity, uncond, delta, scale, out, {batch, per_sample, threads}, dtype,
                            velocity_dtype});
}

int32_t leap_weighted_loss(const float* reward, const float* distances, float threshold, float tau, float* loss,
                           float* weight, int64_t count, int64_t batch, int32_t /*threads*/) {
  double total = 0.0;
  for (int64_t sample = 0; sample < batch; ++sample) {
    float sum = 0.0f;
    // Comparisons that let a NaN through.
    for (int64_t row = 0; row < count; ++row) {
      const float distance = distances[row * batch + sample];
      sum += distance < tau ? tau : distance;
    }
    const float hinge = threshold - reward[sample];
    weight[sample] = 1.0f / sum;
    total += static_cast<double>(weight[sample] * (hinge < 0.0f ? 0.0f : hinge));
  }
  *loss = static_cast<float>(total / static_cast<double>(batch));
  return 0;
}

int32_t leap_stochastic_round(const float* from, void* to, uint64_t seed, int64_t offset, int64_t count,
                              int32_t threads) {
  return dispatch(StochasticRound{from, static_cast<uint16_t*>(to), seed, offset, count, threads});
}

int32_t leap_accumulate(void* total, const void* value, int64_t count, int32_t dtype, int32_t value_dtype,
                        int32_t threads) {
  return dispatch(Accumulate{total, value, {1, count, threads}, dtype, value_dtype});
}

int32_t leap_ema_update(void* average, const void* weights, float step, int64_t count, int32_t dtype,
                        int32_t weights_dtype, int32_t threads) {
  return dispatch(EmaUpdate{average, weights, step, {1, count, threads}, dtype, weights_dtype});
}

int32_t leap_adamw_8bit_step(void* parameter, const void* gradient, uint8_t* state1, float* absmax1, uint8_t* state2,
                             float* absmax2, const float* map1, const uint8_t* table1, const float* map2,
                             const uint8_t* table2, float beta1, float rest1, float beta2, float rest2,
                             float gradient_scale, float rate, float root, float eps, float decay, uint64_t seed,
                             int64_t offset, int64_t count, int32_t dtype, int32_t gradient_dtype, int32_t threads) {
  return dispatch(Adamw8bit{parameter, gradient,
                            {state1, absmax1, map1, table1, beta1, rest1},
                            {state2, absmax2, map2, table2, beta2, rest2},
                            gradient_scale, rate, root, eps, decay, seed, offset, {1, count, threads}, dtype,
                            gradient_dtype});
}

int32_t leap_norm_rope(const void* x, const float* weight, const float* cos, const float* sin, void* out,
                       int64_t x_batch, int64_t x_token, int64_t x_head, int64_t out_batch, int64_t out_token,
                       int64_t table_batch, int64_t batch, int64_t tokens, int64_t heads, int64_t width, float eps,
                       int32_t halves, int32_t dtype, int32_t threads) {
  return dispatch(NormRope{{nullptr, 0, 0, 0}, {x, x_batch, x_token, x_head}, weight, cos, sin, table_batch,
                           out, out_batch, out_token, nullptr, batch, tokens, heads, width, eps, halves, dtype,
                           threads});
}

int32_t leap_norm_rope_backward(const void* grad, const void* x, const float* weight, const float* cos,
                                const float* sin, void* out, float* at_weight, int64_t grad_batch, int64_t grad_token,
                                int64_t grad_head, int64_t x_batch, int64_t x_token, int64_t x_head,
                                int64_t table_batch, int64_t batch, int64_t tokens, int64_t heads, int64_t width,
                                float eps, int32_t halves, int32_t dtype, int32_t threads) {
  advise_huge_pages(out, bytes_of(batch * tokens * heads * width, dtype));
  return dispatch(NormRope{{grad, grad_batch, grad_token, grad_head}, {x, x_batch, x_token, x_head}, weight, cos, sin,
                           table_batch, out, 0, 0, at_weight, batch, tokens, heads, width, eps, halves, dtype,
                           threads});
}

int32_t leap_group_norm_silu(const void* x, const float* weight, const float* bias, void* out, float* mean,
                             float* rstd, int64_t batch, int64_t channels, int64_t places, int64_t groups, float eps,
                             int32_t last, int32_t dtype, int32_t threads) {
  advise_huge_pages(out, bytes_of(batch * channels * places, dtype));
  const GroupNorm call{nullptr, x,        mean,   rstd,   weight, bias, out,  nullptr,
                       nullptr, batch,    channels, places, groups, eps,  dtype, threads};
  return last != 0 ? dispatch(GroupNormLast{call}) : dispatch(call);
}

int32_t leap_group_norm_silu_backward(const void* grad, const void* x, float* mean, float* rstd, const float* weight,
                                      const float* bias, void* out, float* at_weight, float* at_bias, int64_t batch,
                                      int64_t channels, int64_t places, int64_t groups, int32_t last, int32_t dtype,
                                      int32_t threads) {
  advise_huge_pages(out, bytes_of(batch * channels * places, dtype));
  const GroupNorm call{grad,    x,     mean,     rstd,   weight, bias, out,   at_weight,
                       at_bias, batch, channels, places, groups, 0.0f, dtype, threads};
  return last != 0 ? dispatch(GroupNormLast{call}) : dispatch(call);
}

int32_t leap_adaln(const void* x, const void* shift, int64_t shift_stride, const void* scale, int64_t scale_stride,
                   float eps, void* out, float* statistics, int64_t batch, int64_t rows, int64_t width,
                   int32_t dtype, int32_t shift_dtype, int32_t scale_dtype, int32_t threads) {
  advise_huge_pages(out, bytes_of(batch * rows * width, dtype));
  return dispatch(Adaln{x, shift, shift_stride, scale, scale_stride, eps, out, statistics, batch, rows, width, dtype,
                        shift_dtype, scale_dtype, threads});
}

int32_t leap_adaln_backward(const void* grad, const void* x, const void* scale, int64_t scale_stride,
                            const float* statistics, void* grad_x, void* grad_shift, void* grad_scale,
                            int64_t batch, int64_t rows, int64_t width, int32_t dtype, int32_t shift_dtype,
                            int32_t scale_dtype, int32_t threads) {
  advise_huge_pages(grad_x, bytes_of(batch * rows * width, dtype));
  return dispatch(AdalnBackward{grad, x, scale, scale_stride, statistics, grad_x, grad_shift, grad_scale, batch, rows,
                                width, dtype, shift_dtype, scale_dtype, threads});
}

int32_t leap_gated_residual(const void* x, const void* gate, int64_t gate_stride, const void* y, void* out,
                            int64_t batch, int64_t rows, int64_t width, int32_t dtype, int32_t gate_dtype,
                            int32_t y_dtype, int32_t threads) {
  advise_huge_pages(out, bytes_of(batch * rows * width, dtype));
  return dispatch(
      GatedResidual{x, gate, gate_stride, y, out, batch, rows, width, dtype, gate_dtype, y_dtype, threads});
}

int32_t leap_gated_residual_backward(const void* grad, const void* gate, int64_t gate_stride, const void* y,
                                     void* grad_gate, void* grad_y, int64_t batch, int64_t rows, int64_t width,
                                     int32_t dtype, int32_t gate_dtype, int32_t y_dtype, int32_t threads) {
  if (grad_y != nullptr) advise_huge_pages(grad_y, bytes_of(batch * rows * width, y_dtype));
  return dispatch(GatedResidualBackward{grad, gate, gate_stride, y, grad_gate, grad_y, batch, rows, width, dtype,
                                        gate_dtype, y_dtype, threads});
}

int32_t leap_gelu_tanh(const void* grad, const void* x, void* out, void* value, int64_t count, int32_t dtype,
                       int32_t threads) {
  advise_huge_pages(out, bytes_of(count, dtype));
  if (value != nullptr) advise_huge_pages(value, bytes_of(count, dtype));
  return dispatch(GeluTanh{grad, x, out, value, {1, count, threads}, dtype});
}

int32_t leap_swiglu(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* out, int64_t rows,
                    int64_t width, int32_t dtype, int32_t threads) {
  advise_huge_pages(out, bytes_of(rows * width, dtype));
  return dispatch(Swiglu{gate, gate_stride, up, up_stride, out, rows, width, dtype, threads});
}

int32_t leap_swiglu_backward(const void* grad, const void* gate, int64_t gate_stride, const void* up,
                             int64_t up_stride, void* grad_gate, void* grad_up, int64_t out_stride, int64_t rows,
                             int64_t width, int32_t dtype, int32_t threads) {
  advise_huge_pages(grad_gate, bytes_of(rows * width, dtype));
  advise_huge_pages(grad_up, bytes_of(rows * width, dtype));
  return dispatch(SwigluBackward{grad, gate, gate_stride, up, up_stride, grad_gate, grad_up, out_stride, rows, width,
                                 dtype, threads});
}
