// What optimizers do to weights: stochastic rounding and the moving average. Both see a tensor as one long sample.

#include "blocks.h"
#include "philox.h"

namespace LEAP_ISA {
namespace {

using Brain = InOrder<BFloat16>;

// Adds a random number below the cut and keeps what is above it. What would carry into an infinite exponent is cut
// without it: so infinity stays, and a finite value stays finite. NaN stays by its quiet bit.
inline Halves round_off(Floats value, Halves random) {
  const Words word = bits<Words>(value);
  const Words rounded = word + __builtin_convertvector(random, Words);
  const Words kept = (rounded & 0x7f800000u) == 0x7f800000u ? word : rounded;
  return __builtin_convertvector((value == value ? kept : word | 0x400000u) >> 16, Halves);
}

// Drawn by the piece, so that reading memory and the arithmetic of the draws overlap.
constexpr int64_t PIECE = 1024;

void round_block(const StochasticRound& call, const Size& size, const Block& block) {
  uint16_t numbers[PIECE + (UNROLL * WIDTH + 1) * NUMBERS];
  for (int64_t begin = block.begin; begin < block.begin + block.count; begin += PIECE) {
    const int64_t count = smaller(PIECE, block.begin + block.count - begin);
    const uint64_t first = static_cast<uint64_t>(call.offset + begin);
    const int64_t skip = static_cast<int64_t>(first % NUMBERS);
    draw(call.seed, first / NUMBERS, (skip + count + NUMBERS - 1) / NUMBERS, numbers);
    const uint16_t* random = numbers + skip;
    const float* from = call.from + begin;
    uint16_t* to = call.to + begin;
    sweep(count, streamed<Brain>(to, size), [=](int64_t i, auto extent) {
      const Step value = load<Float32>(from + i, extent);
      Brain::Raw half = read<Brain>(random + i, extent);
      for (int64_t p = 0; p < PARTS; ++p) half.part[p] = round_off(value.part[p], half.part[p]);
      extent.write(to + i, half);
    });
  }
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

int32_t run(const EmaUpdate& call) {
  return with_dtypes(call.dtype, call.weights_dtype, [&](auto average_type, auto weights) {
    average<decltype(average_type), decltype(weights)>(call);
    return 0;
  });
}

}  // namespace LEAP_ISA
