// combine_gradient_terms. Without a limit the norms come out of the pass that writes. With one, nothing can be written
// before both norms of a sample are known: then samples go through two passes, few enough at a time that the second
// one finds them in the caches.

#include "blocks.h"

namespace LEAP_ISA {
namespace {

// Elements of a group of samples: two bfloat16 terms of them fill a megabyte.
constexpr int64_t GROUP = int64_t{1} << 18;

// Below this, squares of a block may have been too small for float.
constexpr double LEAST_SQUARES = 0x1p-80;

// The squares of a block whose sum in float came out as `found`: added up anew in double where float lost them.
template <class T>
double squares_of(const typename T::Element* values, int64_t count, double found) {
  if (found >= LEAST_SQUARES && found <= __FLT_MAX__) return found;
  double total = 0.0;
  sweep(count, false, [=, &total](int64_t i, auto extent) {
    const Step step = load<T>(values + i, extent);
    float lanes[STEP];
    std::memcpy(lanes, step.part, sizeof(lanes));
    for (double lane : lanes) total += lane * lane;
  });
  return total;
}

// Reads a block of both terms once: adds up their squares into two sums, writes coefficient * (direct + share *
// nested), or both.
template <class D, class N, bool NORMS, bool OUT>
void pass(const Combine& call, const Block& block, float share, double* sums) {
  const auto* direct = at<D>(call.direct, block);
  const auto* nested = at<N>(call.nested, block);
  auto* out = at<D>(call.out, block);
  const float coefficient = call.coefficient[block.sample];
  Step direct_squares{}, nested_squares{};
  sweep(block.count, OUT && streamed<D>(out, call.size), [=, &direct_squares, &nested_squares](int64_t i, auto extent) {
    const Step d = load<D>(direct + i, extent), n = load<N>(nested + i, extent);
    if constexpr (NORMS) {
      direct_squares = direct_squares + d * d;
      nested_squares = nested_squares + n * n;
    }
    if constexpr (OUT) store<D>(out + i, (d + n * share) * coefficient, extent);
  });
  if constexpr (NORMS) {
    sums[2 * block.number] = squares_of<D>(direct, block.count, sum(direct_squares));
    sums[2 * block.number + 1] = squares_of<N>(nested, block.count, sum(nested_squares));
  }
}

// alpha * s for one sample.
float share_of(const Combine& call, int64_t sample) {
  const float nested = call.nested_norm[sample];
  if (nested == 0.0f) return call.alpha;
  const float limit = call.max_ratio * call.direct_norm[sample] / nested;
  // Written so that a NaN stays one.
  return call.alpha * (limit > 1.0f ? 1.0f : limit);
}

template <class D, class N>
int32_t combine(const Combine& call) {
  const Blocks blocks(call.size);
  const Sums sums(2 * blocks.count());
  if (sums.get() == nullptr) return -2;
  const bool limited = call.max_ratio >= 0.0f;
  const int64_t group = limited ? larger(1, GROUP / larger(1, call.size.per_sample)) : call.size.batch;
  for (int64_t first = 0; first < call.size.batch; first += group) {
    const int64_t last = smaller(first + group, call.size.batch);
    blocks.for_each(first, last, [&](const Block& block) {
      if (limited) pass<D, N, true, false>(call, block, 0.0f, sums.get());
      else pass<D, N, true, true>(call, block, call.alpha, sums.get());
    });
    for (int64_t sample = first; sample < last; ++sample) {
      call.direct_norm[sample] = static_cast<float>(__builtin_sqrt(blocks.sum_of(sums.get(), sample, 2)));
      call.nested_norm[sample] = static_cast<float>(__builtin_sqrt(blocks.sum_of(sums.get() + 1, sample, 2)));
    }
    if (!limited) continue;
    blocks.for_each(first, last, [&](const Block& block) {
      pass<D, N, false, true>(call, block, share_of(call, block.sample), nullptr);
    });
  }
  return 0;
}

}  // namespace

int32_t run(const Combine& call) {
  return with_dtypes(call.dtype, call.nested_dtype, [&](auto direct, auto nested) {
    return combine<decltype(direct), decltype(nested)>(call);
  });
}

}  // namespace LEAP_ISA
