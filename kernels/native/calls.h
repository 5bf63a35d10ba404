// The arguments of each kernel, as the C interface took them, and the kernels themselves: one `run` for each kind of
// call in a namespace for each instruction set. leap_native.cpp picks the namespace; CMake compiles the kernels'
// files once for each, with LEAP_ISA naming it.
#pragma once

#include <cstdint>

struct Size {
  int64_t batch, per_sample;
  int32_t threads;
};

struct Connector {
  const void *x, *velocity, *target;
  const float* delta;
  void* out;
  float* distance;
  Size size;
  int32_t dtype, velocity_dtype;
};

struct Scale {
  const void* grad;
  const float* factor;
  void* out;
  const float* second_factor;
  void* second_out;
  Size size;
  int32_t dtype, out_dtype;
};

struct LeapDistances {
  const void *x_k, *v_k, *x_j, *v_j, *x_end;
  const float *delta, *sigma_j;
  float *distance_j, *distance_end;
  Size size;
  int32_t dtype, velocity_dtype;
};

struct Combine {
  const void *direct, *nested;
  const float* coefficient;
  float alpha, max_ratio;
  void* out;
  float *direct_norm, *nested_norm;
  Size size;
  int32_t dtype, nested_dtype;
};

struct EulerStep {
  const void *x, *velocity, *uncond;
  const float *delta, *scale;
  void* out;
  Size size;
  int32_t dtype, velocity_dtype;
};

struct StochasticRound {
  const float* from;
  uint16_t* to;
  uint64_t seed;
  int64_t offset, count;
  int32_t threads;
};

struct Accumulate {
  void* total;
  const void* value;
  Size size;
  int32_t dtype, value_dtype;
};

struct EmaUpdate {
  void* average;
  const void* weights;
  float step;
  Size size;
  int32_t dtype, weights_dtype;
};

// A moment of a parameter, in bytes.
struct Moment {
  uint8_t* codes;
  float* absmax;
  const float* map;
  const uint8_t* table;
  float keep, take;
};

struct Adamw8bit {
  void* parameter;
  const void* gradient;
  Moment first, second;
  float gradient_scale, rate, root, eps, decay;
  uint64_t seed;
  int64_t offset;
  Size size;
  int32_t dtype, gradient_dtype;
};

// Where the heads of a tensor (batch, tokens, heads, width) lie: elements from one to the next.
struct Heads {
  const void* data;
  int64_t batch, token, head;
};

// Forward without a `grad`, else backward.
struct NormRope {
  Heads grad, x;
  const float *weight, *cos, *sin;
  int64_t table_batch;
  void* out;
  int64_t out_batch, out_token;
  float* at_weight;
  int64_t batch, tokens, heads, width;
  float eps;
  int32_t halves, dtype, threads;
};

// Forward without a `grad`, which writes mean and rstd, else backward.
struct GroupNorm {
  const void *grad, *x;
  float *mean, *rstd;
  const float *weight, *bias;
  void* out;
  float *at_weight, *at_bias;
  int64_t batch, channels, places, groups;
  float eps;
  int32_t dtype, threads;
};

// The same with the channels of a place side by side.
struct GroupNormLast : GroupNorm {};

struct Adaln {
  const void *x, *shift;
  int64_t shift_stride;
  const void* scale;
  int64_t scale_stride;
  float eps;
  void* out;
  float* statistics;
  int64_t batch, rows, width;
  int32_t dtype, shift_dtype, scale_dtype, threads;
};

struct AdalnBackward {
  const void *grad, *x, *scale;
  int64_t scale_stride;
  const float* statistics;
  void *grad_x, *grad_shift, *grad_scale;
  int64_t batch, rows, width;
  int32_t dtype, shift_dtype, scale_dtype, threads;
};

struct GatedResidual {
  const void *x, *gate;
  int64_t gate_stride;
  const void* y;
  void* out;
  int64_t batch, rows, width;
  int32_t dtype, gate_dtype, y_dtype, threads;
};

struct GatedResidualBackward {
  const void *grad, *gate;
  int64_t gate_stride;
  const void* y;
  void *grad_gate, *grad_y;
  int64_t batch, rows, width;
  int32_t dtype, gate_dtype, y_dtype, threads;
};

struct GeluTanh {
  const void *grad, *x;
  void *out, *value;
  Size size;
  int32_t dtype;
};

struct Swiglu {
  const void* gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void* out;
  int64_t rows, width;
  int32_t dtype, threads;
};

struct SwigluBackward {
  const void *grad, *gate;
  int64_t gate_stride;
  const void* up;
  int64_t up_stride;
  void *grad_gate, *grad_up;
  int64_t out_stride, rows, width;
  int32_t dtype, threads;
};

#define LEAP_DECLARE_KERNELS(isa)                 \
  namespace isa {                                 \
  int32_t run(const Connector& call);             \
  int32_t run(const Scale& call);                 \
  int32_t run(const LeapDistances& call);         \
  int32_t run(const Combine& call);               \
  int32_t run(const EulerStep& call);             \
  int32_t run(const StochasticRound& call);       \
  int32_t run(const Accumulate& call);            \
  int32_t run(const EmaUpdate& call);             \
  int32_t run(const Adamw8bit& call);             \
  int32_t run(const Adaln& call);                 \
  int32_t run(const AdalnBackward& call);         \
  int32_t run(const GatedResidual& call);         \
  int32_t run(const GatedResidualBackward& call); \
  int32_t run(const GeluTanh& call);              \
  int32_t run(const Swiglu& call);                \
  int32_t run(const SwigluBackward& call);        \
  int32_t run(const NormRope& call);              \
  int32_t run(const GroupNorm& call);             \
  int32_t run(const GroupNormLast& call);         \
  }

LEAP_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
LEAP_DECLARE_KERNELS(avx2)
LEAP_DECLARE_KERNELS(avx512)
#endif
