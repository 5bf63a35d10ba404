// exp and the logistic function of a step. Compiled once per instruction set, as arithmetic.h, and bound by the same
// rules.
#pragma once

#include "arithmetic.h"

namespace {

inline Step all_of(const Step& x, float least, float most) {
  return each([&](int64_t p) {
    const Floats low = Floats{} + least, high = Floats{} + most, value = x.part[p];
    // Comparisons that let a NaN through.
    const Floats raised = value < low ? low : value;
    return raised > high ? high : raised;
  });
}

// exp(x) for x in [-87, 88], where no result overflows or is subnormal, and for those beyond it that of the nearest:
// 2^n exp(r) with |r| <= log(2) / 2, and for exp(r) the polynomial of Cephes' expf. Within 2 units of the last place.
inline Step exponential(const Step& x) {
  const Step value = all_of(x, -87.0f, 88.0f);
  // Adding 1.5 * 2^23 rounds to an integer, and leaves it in the low bits.
  const Step shifted = multiply_add(value, all(1.44269504f), all(12582912.0f));
  const Step n = shifted - all(12582912.0f);
  const Step r = multiply_add(n, all(2.12194440e-4f), multiply_add(n, all(-0.693359375f), value));
  Step series = multiply_add(r, all(1.9875691500e-4f), all(1.3981999507e-3f));
  series = multiply_add(series, r, all(8.3334519073e-3f));
  series = multiply_add(series, r, all(4.1665795894e-2f));
  series = multiply_add(series, r, all(1.6666665459e-1f));
  series = multiply_add(series, r, all(5.0000001201e-1f));
  series = multiply_add(series, r * r, r + all(1.0f));
  return each([&](int64_t p) {
    const Words power = bits<Words>(shifted.part[p]) - 0x4b400000u;
    return series.part[p] * bits<Floats>((power + 127u) << 23);
  });
}

inline Step sigmoid(const Step& x) { return all(1.0f) / (all(1.0f) + exponential(x * -1.0f)); }

// The gradient at y of y sigmoid(y), from that at its result.
inline Step silu_gradient(const Step& grad, const Step& y) {
  const Step s = sigmoid(y);
  return grad * s * (all(1.0f) + y * (all(1.0f) - s));
}

}  // namespace
