// What optimizers do to weights: stochastic rounding, sums and the moving average. All see a tensor as one long sample.

#include "blocks.h"
#include "philox.h"

namespace LEAP_ISA {
namespace {

void round_block(const StochasticRound& call, const Size& size, const Block& block) {
  Numbers numbers;
  for (int64_t begin = block.begin; begin < block.begin + block.count; begin += PIECE) {
    const int64_t count = smaller(PIECE, block.begin + block.count - begin);
    const uint16_t* random = draw(call.seed, call.offset + begin, count, numbers);
    const float* from = call.from + begin;
    uint16_t* to = call.to + begin;
    sweep(count, streamed<Brain>(to, size), [=](int64_t i, auto extent) {
      store_rounded_off(to + i, load<Float32>(from + i, extent), random + i, extent);
    });
  }
}

template <class T, class V>
void accumulate(const Accumulate& call) {
  Blocks(call.size).for_each([&](const Block& block) {
    auto* total = at<T>(call.total, block);
    const auto* value = at<V>(call.value, block);
    sweep(block.count, false, [=](int64_t i, auto extent) {
      store<T>(total + i, load<T>(total + i, extent) + load<V>(value + i, extent), extent);
    });
  });
}

template <class A, class W>
void average(const EmaUpdate& call) {
  Blocks(call.size).for_each([&](const Block& block) {
    auto* average = at<A>(call.average, block);
    const auto* weights = at<W>(call.weights, block);
    sweep(block.count, false, [=, step = call.step](int64_t i, auto extent) {
      const Step old = load<A>(average + i, extent);
      store<A>(average + i, old + (load<W>(weights + i, extent) - old) * step, extent);
    });
  });
}

}  // namespace

int32_t run(const StochasticRound& call) {
  const Size size{1, call.count, call.threads};
  Blocks(size).for_each([&](const Block& block) { round_block(call, size, block); });
  return 0;
}

int32_t run(const Accumulate& call) {
  return with_dtypes(call.dtype, call.value_dtype, [&](auto total, auto value) {
    accumulate<decltype(total), decltype(value)>(call);
    return 0;
  });
}

int32_t run(const EmaUpdate& call) {
  return with_dtypes(call.dtype, call.weights_dtype, [&](auto average_type, auto weights) {
    average<decltype(average_type), decltype(weights)>(call);
    return 0;
  });
}

}  // namespace LEAP_ISA
