// The activations of transformer blocks: GELU in its tanh form, and SwiGLU. Backward passes recompute them.

#include "rows.h"

namespace LEAP_ISA {
namespace {

// exp(x), off by one or two units in the last place (Cephes' polynomial). Infinite from 88.4 on, where float still has a
// few numbers, and never below 1e-38.
inline Step exponential(const Step& x) {
  constexpr float LOG2_E = 1.44269504f, ROUNDING = 12582912.0f, LN2_HIGH = 0.693359375f, LN2_LOW = -2.12194440e-4f;
  const Step value = each([&](int64_t p) {
    const Floats most = Floats{} + 88.8f, least = Floats{} - 87.0f;
    // Comparisons that let a NaN through.
    const Floats below = x.part[p] > most ? most : x.part[p];
    return below < least ? least : below;
  });
  const Step shifted = multiply_add(value, all(LOG2_E), all(ROUNDING));
  const Step whole = shifted - all(ROUNDING);
  const Step rest = multiply_add(whole, all(-LN2_LOW), multiply_add(whole, all(-LN2_HIGH), value));
  Step series = multiply_add(rest, all(1.9875691500e-4f), all(1.3981999507e-3f));
  series = multiply_add(series, rest, all(8.3334519073e-3f));
  series = multiply_add(series, rest, all(4.1665795894e-2f));
  series = multiply_add(series, rest, all(1.6666665459e-1f));
  series = multiply_add(series, rest, all(5.0000001201e-1f));
  series = multiply_add(series, rest * rest, rest) + all(1.0f);
  return each([&](int64_t p) {
    return series.part[p] * bits<Floats>((bits<Words>(shifted.part[p]) + 127u) << 23);
  });
}

// s = sigmoid(z), and s * (1 - s), its derivative, without the loss that 1 - s would be.
struct Sigmoid {
  Step value, slope;

  explicit Sigmoid(const Step& z) {
    const Step power = exponential(z * -1.0f);
    value = all(1.0f) / (power + all(1.0f));
    // An infinite power times a sigmoid of zero would be no number.
    const Step finite = each([&](int64_t p) {
      const Floats most = Floats{} + 3.0e38f;
      return power.part[p] > most ? most : power.part[p];
    });
    slope = finite * value * value;
  }
};

// 0.5 x (1 + tanh(y)) = x sigmoid(2 y), here with 2 y = x (LINEAR + CUBIC x^2).
constexpr float LINEAR = 1.5957691216f, CUBIC = 0.0713548163f;

template <class T>
int32_t gelu(const GeluTanh& call) {
  const bool backward = call.grad != nullptr;
  Blocks(call.size).for_each([&](const Block& block) {
    const auto* x = at<T>(call.x, block);
    auto* out = at<T>(call.out, block);
    const bool stream = streamed<T>(out, call.size);
    if (!backward) {
      sweep(block.count, stream, [=](int64_t i, auto extent) {
        const Step value = load<T>(x + i, extent);
        const Sigmoid sigmoid(value * (value * value * CUBIC + all(LINEAR)));
        store<T>(out + i, value * sigmoid.value, extent);
      });
      return;
    }
    const auto* grad = at<T>(call.grad, block);
    auto* again = call.value == nullptr ? nullptr : at<T>(call.value, block);
    sweep(block.count, stream && (again == nullptr || streamed<T>(again, call.size)), [=](int64_t i, auto extent) {
      const Step value = load<T>(x + i, extent);
      const Step square = value * value * CUBIC;
      const Sigmoid sigmoid(value * (square + all(LINEAR)));
      const Step inner = value * (square * 3.0f + all(LINEAR));
      store<T>(out + i, load<T>(grad + i, extent) * (sigmoid.value + sigmoid.slope * inner), extent);
      if (again != nullptr) store<T>(again + i, value * sigmoid.value, extent);
    });
  });
  return 0;
}

// Calls work(row, first element of it, elements): rows one by one, or, where all lie behind each other, as one row in
// pieces, so that short rows do not cost a start each.
template <class Call, class Work>
void for_each_run(const Call& call, int64_t out_stride, Work work) {
  const int64_t width = call.width;
  if (call.gate_stride != width || call.up_stride != width || out_stride != width) {
    share(call.rows, width, call.threads, [&](int64_t row) { work(row, 0, width); });
    return;
  }
  const int64_t total = call.rows * width, piece = smaller(BLOCK, total);
  share((total + piece - 1) / piece, piece, call.threads,
        [&](int64_t i) { work(0, i * piece, smaller(piece, total - i * piece)); });
}

template <class T>
int32_t forward(const Swiglu& call) {
  for_each_run(call, call.width, [&](int64_t row, int64_t begin, int64_t count) {
    const auto* gate = row_of<T>(call.gate, call.gate_stride, row) + begin;
    const auto* up = row_of<T>(call.up, call.up_stride, row) + begin;
    auto* out = row_of<T>(call.out, call.width, row) + begin;
    sweep(count, false, [=](int64_t i, auto extent) {
      const Step value = load<T>(gate + i, extent);
      store<T>(out + i, value * Sigmoid(value).value * load<T>(up + i, extent), extent);
    });
  });
  return 0;
}

template <class T>
int32_t backward(const SwigluBackward& call) {
  for_each_run(call, call.out_stride, [&](int64_t row, int64_t begin, int64_t count) {
    const auto* grad = row_of<T>(call.grad, call.width, row) + begin;
    const auto* gate = row_of<T>(call.gate, call.gate_stride, row) + begin;
    const auto* up = row_of<T>(call.up, call.up_stride, row) + begin;
    auto* grad_gate = row_of<T>(call.grad_gate, call.out_stride, row) + begin;
    auto* grad_up = row_of<T>(call.grad_up, call.out_stride, row) + begin;
    sweep(count, false, [=](int64_t i, auto extent) {
      const Step value = load<T>(gate + i, extent), incoming = load<T>(grad + i, extent);
      const Sigmoid sigmoid(value);
      const Step slope = sigmoid.value + value * sigmoid.slope;
      store<T>(grad_gate + i, incoming * load<T>(up + i, extent) * slope, extent);
      store<T>(grad_up + i, incoming * (value * sigmoid.value), extent);
    });
  });
  return 0;
}

}  // namespace

int32_t run(const GeluTanh& call) {
  return with_storage(call.dtype, [&](auto storage) { return gelu<decltype(storage)>(call); });
}

int32_t run(const Swiglu& call) {
  return with_storage(call.dtype, [&](auto storage) { return forward<decltype(storage)>(call); });
}

int32_t run(const SwigluBackward& call) {
  return with_storage(call.dtype, [&](auto storage) { return backward<decltype(storage)>(call); });
}

}  // namespace LEAP_ISA
