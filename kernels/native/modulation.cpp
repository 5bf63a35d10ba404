// Adaptive layer norm and the gated residual: what a transformer block does to its stream with numbers from the
// conditioning, and the gradients of those, which are sums over rows.

#include "rows.h"

namespace LEAP_ISA {
namespace {

int64_t strips_of(int64_t rows) { return (rows + STRIP - 1) / STRIP; }

// Calls work(sample, strip of all, its first row of all rows, its rows).
template <class Work>
void for_each_strip(int64_t batch, int64_t rows, int64_t width, int32_t threads, Work work) {
  const int64_t strips = strips_of(rows);
  share(batch * strips, STRIP * width, threads, [&](int64_t strip) {
    const int64_t sample = strip / strips, first = strip % strips * STRIP;
    work(sample, strip, sample * rows + first, smaller(STRIP, rows - first));
  });
}

template <class T>
void modulate_row(const typename T::Element* x, const float* factor, const float* shift, typename T::Element* out,
                  int64_t width, float eps, float* mean_out, float* rstd_out) {
  const float share_of_one = 1.0f / static_cast<float>(width);
  Step total{};
  sweep(width, false, [=, &total](int64_t i, auto extent) { total = total + load<T>(x + i, extent); });
  const float mean = fold(total) * share_of_one;
  Step squares{};
  sweep(width, false, [=, &squares](int64_t i, auto extent) {
    const Step centered = inside<T>(load<T>(x + i, extent) - all(mean), extent);
    squares = squares + centered * centered;
  });
  const float rstd = 1.0f / __builtin_sqrtf(fold(squares) * share_of_one + eps);
  sweep(width, false, [=](int64_t i, auto extent) {
    const Step normal = (load<T>(x + i, extent) - all(mean)) * rstd;
    const Step modulated = normal * load<Float32>(factor + i, Whole{});
    store<T>(out + i, shift == nullptr ? modulated : modulated + load<Float32>(shift + i, Whole{}), extent);
  });
  *mean_out = mean;
  *rstd_out = rstd;
}

template <class T>
int32_t forward(const Adaln& call) {
  const int64_t pitch = steps_of(call.width) * STEP;
  const Scratch factors(call.batch * pitch), shifts(call.shift == nullptr ? 1 : call.batch * pitch);
  if (factors.get() == nullptr || shifts.get() == nullptr) return -2;
  int32_t status = widen_vectors<T>(call.scale, call.scale_stride, call.scale_dtype, call.batch, call.width, 1.0f,
                                    factors.get());
  if (status == 0 && call.shift != nullptr) {
    status = widen_vectors<T>(call.shift, call.shift_stride, call.shift_dtype, call.batch, call.width, 0.0f,
                              shifts.get());
  }
  if (status != 0) return status;
  share(call.batch * call.rows, call.width, call.threads, [&](int64_t row) {
    const int64_t sample = row / call.rows;
    modulate_row<T>(row_of<T>(call.x, call.width, row), factors.get() + sample * pitch,
                    call.shift == nullptr ? nullptr : shifts.get() + sample * pitch,
                    row_of<T>(call.out, call.width, row), call.width, call.eps, call.statistics + row,
                    call.statistics + call.batch * call.rows + row);
  });
  return 0;
}

// What the gradient at a row needs to know of it.
struct Statistics {
  float mean, rstd, grad_mean, projection;
};

template <class T>
Statistics look_at(const typename T::Element* grad, const typename T::Element* x, const float* factor, int64_t width,
                   float mean, float rstd) {
  Step total{}, projected{};
  sweep(width, false, [=, &total, &projected](int64_t i, auto extent) {
    const Step scaled = load<T>(grad + i, extent) * load<Float32>(factor + i, Whole{});
    total = total + scaled;
    projected = projected + scaled * ((load<T>(x + i, extent) - all(mean)) * rstd);
  });
  const float share_of_one = 1.0f / static_cast<float>(width);
  return {mean, rstd, fold(total) * share_of_one, fold(projected) * share_of_one};
}

inline Step grad_at_x(const Step& grad, const Step& normal, const Step& factor, const Statistics& row) {
  return (grad * factor - all(row.grad_mean) - normal * row.projection) * row.rstd;
}

// Writes the gradients at x of a strip, and, if `sums` is not null, its sums for scale and shift behind each other.
template <class T>
void backward_strip(const AdalnBackward& call, const float* factor, int64_t first, int64_t rows, float* sums) {
  const auto* grad = row_of<T>(call.grad, call.width, first);
  const auto* x = row_of<T>(call.x, call.width, first);
  auto* grad_x = row_of<T>(call.grad_x, call.width, first);
  const float* mean = call.statistics + first;
  const int64_t width = call.width;
  Statistics strip[STRIP];
  for (int64_t r = 0; r < rows; ++r) {
    const auto *grad_row = grad + r * width, *x_row = x + r * width;
    const Statistics row = look_at<T>(grad_row, x_row, factor, width, mean[r], mean[call.batch * call.rows + r]);
    strip[r] = row;
    if (sums != nullptr) continue;
    // The row is still in the nearest cache.
    sweep(width, false, [=](int64_t i, auto extent) {
      const Step normal = (load<T>(x_row + i, extent) - all(row.mean)) * row.rstd;
      const Step factors = load<Float32>(factor + i, Whole{});
      store<T>(grad_x + r * width + i, grad_at_x(load<T>(grad_row + i, extent), normal, factors, row), extent);
    });
  }
  if (sums == nullptr) return;
  const int64_t pitch = steps_of(width) * STEP;
  sweep(width, false, [=, &strip](int64_t i, auto extent) {
    const Step factors = load<Float32>(factor + i, Whole{});
    Step for_scale{}, for_shift{};
    for (int64_t r = 0; r < rows; ++r) {
      const Step incoming = load<T>(grad + r * width + i, extent);
      const Step normal = (load<T>(x + r * width + i, extent) - all(strip[r].mean)) * strip[r].rstd;
      store<T>(grad_x + r * width + i, grad_at_x(incoming, normal, factors, strip[r]), extent);
      for_scale = for_scale + incoming * normal;
      for_shift = for_shift + incoming;
    }
    store<Float32>(sums + i, for_scale, Whole{});
    store<Float32>(sums + pitch + i, for_shift, Whole{});
  });
}

template <class T>
int32_t backward(const AdalnBackward& call) {
  const int64_t pitch = steps_of(call.width) * STEP, strips = strips_of(call.rows);
  const bool sum = call.grad_scale != nullptr;
  const Scratch factors(call.batch * pitch), sums(sum ? call.batch * strips * 2 * pitch : 1);
  if (factors.get() == nullptr || sums.get() == nullptr) return -2;
  int32_t status = widen_vectors<T>(call.scale, call.scale_stride, call.scale_dtype, call.batch, call.width, 1.0f,
                                    factors.get());
  if (status != 0) return status;
  for_each_strip(call.batch, call.rows, call.width, call.threads,
                 [&](int64_t sample, int64_t strip, int64_t first, int64_t rows) {
                   float* strip_sums = sum ? sums.get() + strip * 2 * pitch : nullptr;
                   backward_strip<T>(call, factors.get() + sample * pitch, first, rows, strip_sums);
                 });
  if (sum) {
    status = add_strips<T>(sums.get(), strips, 2 * pitch, call.batch, call.width, call.threads, call.grad_scale,
                           call.scale_dtype);
  }
  if (status == 0 && call.grad_shift != nullptr) {
    status = add_strips<T>(sums.get() + pitch, strips, 2 * pitch, call.batch, call.width, call.threads,
                           call.grad_shift, call.shift_dtype);
  }
  return status;
}

template <class X, class Y>
int32_t forward(const GatedResidual& call) {
  const int64_t pitch = steps_of(call.width) * STEP;
  const Scratch gates(call.batch * pitch);
  if (gates.get() == nullptr) return -2;
  const int32_t status =
      widen_vectors<Y>(call.gate, call.gate_stride, call.gate_dtype, call.batch, call.width, 0.0f, gates.get());
  if (status != 0) return status;
  share(call.batch * call.rows, call.width, call.threads, [&](int64_t row) {
    const auto* x = row_of<X>(call.x, call.width, row);
    const auto* y = row_of<Y>(call.y, call.width, row);
    const float* gate = gates.get() + row / call.rows * pitch;
    auto* out = row_of<X>(call.out, call.width, row);
    sweep(call.width, false, [=](int64_t i, auto extent) {
      const Step gated = load<Float32>(gate + i, Whole{}) * load<Y>(y + i, extent);
      store<X>(out + i, load<X>(x + i, extent) + gated, extent);
    });
  });
  return 0;
}

template <class G, class Y>
void backward_strip(const GatedResidualBackward& call, const float* gate, int64_t first, int64_t rows, float* sums) {
  const int64_t width = call.width;
  const auto* grad = row_of<G>(call.grad, width, first);
  const auto* y = call.y == nullptr ? nullptr : row_of<Y>(call.y, width, first);
  auto* grad_y = call.grad_y == nullptr ? nullptr : row_of<Y>(call.grad_y, width, first);
  if (y == nullptr) {
    for (int64_t r = 0; r < rows; ++r) {
      sweep(width, false, [=](int64_t i, auto extent) {
        const Step incoming = load<G>(grad + r * width + i, extent);
        store<Y>(grad_y + r * width + i, incoming * load<Float32>(gate + i, Whole{}), extent);
      });
    }
    return;
  }
  sweep(width, false, [=](int64_t i, auto extent) {
    const Step gates = load<Float32>(gate + i, Whole{});
    Step total{};
    for (int64_t r = 0; r < rows; ++r) {
      const Step incoming = load<G>(grad + r * width + i, extent);
      total = total + incoming * load<Y>(y + r * width + i, extent);
      if (grad_y != nullptr) store<Y>(grad_y + r * width + i, incoming * gates, extent);
    }
    store<Float32>(sums + i, total, Whole{});
  });
}

template <class G, class Y>
int32_t backward(const GatedResidualBackward& call) {
  const int64_t pitch = steps_of(call.width) * STEP, strips = strips_of(call.rows);
  const bool sum = call.y != nullptr;
  const Scratch gates(call.batch * pitch), sums(sum ? call.batch * strips * pitch : 1);
  if (gates.get() == nullptr || sums.get() == nullptr) return -2;
  const int32_t status =
      widen_vectors<Y>(call.gate, call.gate_stride, call.gate_dtype, call.batch, call.width, 0.0f, gates.get());
  if (status != 0) return status;
  for_each_strip(call.batch, call.rows, call.width, call.threads,
                 [&](int64_t sample, int64_t strip, int64_t first, int64_t rows) {
                   backward_strip<G, Y>(call, gates.get() + sample * pitch, first, rows, sums.get() + strip * pitch);
                 });
  if (!sum) return 0;
  return add_strips<Y>(sums.get(), strips, pitch, call.batch, call.width, call.threads, call.grad_gate,
                       call.gate_dtype);
}

}  // namespace

int32_t run(const Adaln& call) {
  return with_storage(call.dtype, [&](auto storage) { return forward<decltype(storage)>(call); });
}

int32_t run(const AdalnBackward& call) {
  return with_storage(call.dtype, [&](auto storage) { return backward<decltype(storage)>(call); });
}

int32_t run(const GatedResidual& call) {
  return with_dtypes(call.dtype, call.y_dtype,
                     [&](auto x, auto y) { return forward<decltype(x), decltype(y)>(call); });
}

int32_t run(const GatedResidualBackward& call) {
  return with_dtypes(call.dtype, call.y_dtype,
                     [&](auto grad, auto y) { return backward<decltype(grad), decltype(y)>(call); });
}

}  // namespace LEAP_ISA
