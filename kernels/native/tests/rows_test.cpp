// Tests of the kernels of transformer blocks without Python, in every format, against plain loops in double.

#include "tensor.h"

namespace {

struct Rows {
  int64_t batch, rows, width;
  int32_t threads;
  int64_t count() const { return batch * rows * width; }
  int64_t vector(int64_t i) const { return i / (rows * width) * 3 * width + i % width; }
};

const Rows CASES[] = {{1, 1, 1, 1}, {2, 3, 31, 1}, {3, 17, 33, 2}, {2, 40, 300, 3}};

// Vectors are the second chunk of three of a wider tensor, as models make them.
void* chunk(Tensor& wide, const Rows& s) {
  return static_cast<unsigned char*>(wide.data()) + static_cast<size_t>(s.width) * width(wide.dtype());
}

void test_adaln(Rows s, int32_t dtype, int32_t other) {
  Tensor x = filled(dtype, s.count(), 1), grad = filled(dtype, s.count(), 2), scale = filled(other, 3 * s.batch * s.width, 3);
  Tensor shift = filled(other, 3 * s.batch * s.width, 4), out(dtype, s.count()), grad_x(dtype, s.count());
  Tensor grad_shift(other, s.batch * s.width), grad_scale(other, s.batch * s.width);
  std::vector<float> statistics(static_cast<size_t>(2 * s.batch * s.rows));
  // A large eps bounds what the rounding of a small variance does.
  expect(0 == leap_adaln(x.data(), chunk(shift, s), 3 * s.width, chunk(scale, s), 3 * s.width, 0.1f, out.data(),
                         statistics.data(), s.batch, s.rows, s.width, dtype, other, other, s.threads),
         "adaln status", dtype, other, s.width);
  expect(0 == leap_adaln_backward(grad.data(), x.data(), chunk(scale, s), 3 * s.width, statistics.data(),
                                  grad_x.data(), grad_shift.data(), grad_scale.data(), s.batch, s.rows, s.width, dtype,
                                  other, other, s.threads),
         "adaln backward status", dtype, other, s.width);
  const double n = static_cast<double>(s.width);
  std::vector<double> for_scale(static_cast<size_t>(s.batch * s.width)), for_shift(for_scale.size());
  for (int64_t row = 0; row < s.batch * s.rows; ++row) {
    double mean = 0, squares = 0, total = 0, projected = 0;
    for (int64_t i = row * s.width; i < (row + 1) * s.width; ++i) mean += x.at(i) / n;
    for (int64_t i = row * s.width; i < (row + 1) * s.width; ++i) squares += (x.at(i) - mean) * (x.at(i) - mean) / n;
    const double rstd = 1 / std::sqrt(squares + static_cast<double>(0.1f));
    const auto factor = [&](int64_t i) { return 1 + scale.at(s.vector(i) + s.width); };
    for (int64_t i = row * s.width; i < (row + 1) * s.width; ++i) {
      total += grad.at(i) * factor(i) / n;
      projected += grad.at(i) * factor(i) * (x.at(i) - mean) * rstd / n;
    }
    for (int64_t i = row * s.width; i < (row + 1) * s.width; ++i) {
      const double normal = (x.at(i) - mean) * rstd;
      const double modulated = normal * factor(i) + shift.at(s.vector(i) + s.width);
      expect(close(out.at(i), modulated, 100, dtype), "adaln", dtype, other, i);
      const double gradient = rstd * (grad.at(i) * factor(i) - total - normal * projected);
      expect(close(grad_x.at(i), gradient, 1000, dtype), "adaln at x", dtype, other, i);
      const size_t at = static_cast<size_t>(row / s.rows * s.width + i % s.width);
      for_scale[at] += grad.at(i) * normal;
      for_shift[at] += grad.at(i);
    }
  }
  for (size_t i = 0; i < for_scale.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i);
    expect(close(grad_scale.at(at), for_scale[i], 1000, other), "adaln at scale", dtype, other, at);
    expect(close(grad_shift.at(at), for_shift[i], 1000, other), "adaln at shift", dtype, other, at);
  }
}

void test_gated(Rows s, int32_t dtype, int32_t other) {
  Tensor x = filled(dtype, s.count(), 5), y = filled(other, s.count(), 6), gate = filled(dtype, 3 * s.batch * s.width, 7);
  Tensor out(dtype, s.count()), grad_y(other, s.count()), grad_gate(dtype, s.batch * s.width);
  leap_gated_residual(x.data(), chunk(gate, s), 3 * s.width, y.data(), out.data(), s.batch, s.rows, s.width, dtype,
                      dtype, other, s.threads);
  leap_gated_residual_backward(x.data(), chunk(gate, s), 3 * s.width, y.data(), grad_gate.data(), grad_y.data(),
                               s.batch, s.rows, s.width, dtype, dtype, other, s.threads);
  std::vector<double> for_gate(static_cast<size_t>(s.batch * s.width));
  for (int64_t i = 0; i < s.count(); ++i) {
    const double factor = gate.at(s.vector(i) + s.width);
    expect(close(out.at(i), x.at(i) + factor * y.at(i), 20, dtype), "gated", dtype, other, i);
    expect(close(grad_y.at(i), factor * x.at(i), 16, other), "gated at y", dtype, other, i);
    for_gate[static_cast<size_t>(i / (s.rows * s.width) * s.width + i % s.width)] += x.at(i) * y.at(i);
  }
  for (size_t i = 0; i < for_gate.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i);
    expect(close(grad_gate.at(at), for_gate[i], 1000, dtype), "gated at gate", dtype, other, at);
  }
}

void test_activations(Rows s, int32_t dtype) {
  const int64_t rows = s.batch * s.rows;
  Tensor packed = filled(dtype, 2 * s.count(), 8), grad = filled(dtype, s.count(), 9), out(dtype, s.count());
  Tensor grads(dtype, 2 * s.count()), curved(dtype, s.count()), slope(dtype, s.count()), again(dtype, s.count());
  const size_t half = static_cast<size_t>(s.width) * width(dtype);
  unsigned char* up = static_cast<unsigned char*>(packed.data()) + half;
  unsigned char* grad_up = static_cast<unsigned char*>(grads.data()) + half;
  leap_swiglu(packed.data(), 2 * s.width, up, 2 * s.width, out.data(), rows, s.width, dtype, s.threads);
  leap_swiglu_backward(grad.data(), packed.data(), 2 * s.width, up, 2 * s.width, grads.data(), grad_up, 2 * s.width,
                       rows, s.width, dtype, s.threads);
  leap_gelu_tanh(nullptr, grad.data(), curved.data(), nullptr, s.count(), dtype, s.threads);
  leap_gelu_tanh(packed.data(), grad.data(), slope.data(), again.data(), s.count(), dtype, s.threads);
  for (int64_t i = 0; i < s.count(); ++i) {
    const int64_t at = i / s.width * 2 * s.width + i % s.width;
    const double g = packed.at(at), u = packed.at(at + s.width), sigmoid = 1 / (1 + std::exp(-g));
    expect(close(out.at(i), g * sigmoid * u, 16, dtype), "swiglu", dtype, s.width, i);
    const double derivative = sigmoid * (1 + g * (1 - sigmoid));
    expect(close(grads.at(at), grad.at(i) * u * derivative, 32, dtype), "swiglu at gate", dtype, s.width, i);
    expect(close(grads.at(at + s.width), grad.at(i) * g * sigmoid, 16, dtype), "swiglu at up", dtype, s.width, i);
    const double x = grad.at(i), inner = std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
    const double t = std::tanh(inner), rise = std::sqrt(2 / std::acos(-1.0)) * (1 + 3 * 0.044715 * x * x);
    expect(close(curved.at(i), 0.5 * x * (1 + t), 8, dtype), "gelu", dtype, s.width, i);
    expect(again.at(i) == curved.at(i), "gelu beside its gradient", dtype, s.width, i);
    const double gelu_slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * rise;
    expect(close(slope.at(i), packed.at(i) * gelu_slope, 32, dtype), "gelu at x", dtype, s.width, i);
  }
}

}  // namespace

int main() {
  for (const Rows& s : CASES) {
    for (int32_t dtype = 0; dtype < 3; ++dtype) {
      test_activations(s, dtype);
      for (int32_t other = 0; other < 3; ++other) {
        test_adaln(s, dtype, other);
        test_gated(s, dtype, other);
      }
    }
  }
  expect(leap_gelu_tanh(nullptr, CASES, nullptr, nullptr, 0, 7, 1) == -1, "unknown dtype", 7, 0, 0);
  return report();
}
