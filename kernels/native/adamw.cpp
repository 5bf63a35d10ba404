// AdamW on weights whose moments are bytes: each byte stands for an entry of a map, in units of the largest magnitude
// of its group.

#include "blocks.h"
#include "philox.h"

namespace LEAP_ISA {
namespace {

constexpr int64_t GROUP = 256;
static_assert(BLOCK % PIECE == 0 && PIECE % GROUP == 0, "no group is split between threads or draws");

// Writes the `count` elements from `begin` on, and zeros up to the length of a group.
inline void widen(const Moment& moment, int64_t begin, int64_t count, float* values) {
  const uint8_t* codes = moment.codes + begin;
  const float* map = moment.map;
  const float absmax = moment.absmax[begin / GROUP];
  for (int64_t i = 0; i < count; ++i) values[i] = map[codes[i]] * absmax;
  for (int64_t i = count; i < GROUP; ++i) values[i] = 0.0f;
}

// Turns what `widen` has written, or what was computed from it in place, into bytes and their largest magnitude.
inline void narrow(const Moment& moment, int64_t begin, int64_t count, const float* values) {
  Step largest{};
  sweep(GROUP, false, [&](int64_t i, auto extent) {
    const Step magnitude = absolute(load<Float32>(values + i, extent));
    // False for NaN.
    largest = each([&](int64_t p) {
      return magnitude.part[p] > largest.part[p] ? magnitude.part[p] : largest.part[p];
    });
  });
  float absmax = 0.0f, lanes[STEP];
  std::memcpy(lanes, largest.part, sizeof(lanes));
  for (float lane : lanes) absmax = lane > absmax ? lane : absmax;
  moment.absmax[begin / GROUP] = absmax;

  uint16_t places[GROUP];
  sweep(GROUP, false, [&, inverse = 1.0f / absmax](int64_t i, auto extent) {
    const Step scaled = load<Float32>(values + i, extent) * inverse;
    const Step half = each([&](int64_t p) {
      const Floats x = scaled.part[p], low = Floats{} - 1.0f, high = Floats{} + 1.0f;
      const Floats above = x > low ? x : low;  // NaN too
      return ((above < high ? above : high) + 1.0f) * 0.5f;
    });
    const Step place = multiply_add(half, all(65535.0f), all(0.5f));
    extent.write(places + i, each([&](int64_t p) {
                   return __builtin_convertvector(__builtin_convertvector(place.part[p], Integers), Halves);
                 }));
  });
  uint8_t* codes = moment.codes + begin;
  const uint8_t* table = moment.table;
  for (int64_t i = 0; i < count; ++i) codes[i] = table[places[i]];
}

// `random` has a number for each of the `count` elements from `begin` on, where P is bfloat16.
template <class P, class G>
void step_group(const Adamw8bit& call, int64_t begin, int64_t count, const uint16_t* random) {
  auto* parameter = static_cast<typename P::Element*>(call.parameter) + begin;
  const auto* gradient = static_cast<const typename G::Element*>(call.gradient) + begin;
  float first[GROUP], second[GROUP];
  widen(call.first, begin, count, first);
  widen(call.second, begin, count, second);
  sweep(count, false, [&](int64_t i, auto extent) {
    const Step g = load<G>(gradient + i, extent) * call.gradient_scale;
    const Step m = multiply_add(all(call.first.take), g, load<Float32>(first + i, extent) * call.first.keep);
    const Step v = multiply_add(g * call.second.take, g, load<Float32>(second + i, extent) * call.second.keep);
    store<Float32>(first + i, m, extent);
    store<Float32>(second + i, v, extent);
    const Step old = load<P>(parameter + i, extent);
    const Step change = m * call.rate / (square_root(v) / all(call.root) + all(call.eps));
    const Step stepped = old - (change + old * call.decay);
    if constexpr (sizeof(*parameter) == 2) {
      store_rounded_off(parameter + i, stepped, random + i, extent);
    } else {
      store<P>(parameter + i, stepped, extent);
    }
  });
  narrow(call.first, begin, count, first);
  narrow(call.second, begin, count, second);
}

template <class P, class G>
void step(const Adamw8bit& call) {
  Blocks(call.size).for_each([&](const Block& block) {
    Numbers numbers;
    const uint16_t* random = numbers;
    for (int64_t done = 0; done < block.count; done += GROUP) {
      if (sizeof(typename P::Element) == 2 && done % PIECE == 0) {
        random = draw(call.seed, call.offset + block.begin + done, smaller(PIECE, block.count - done), numbers);
      }
      step_group<P, G>(call, block.begin + done, smaller(GROUP, block.count - done), random + done % PIECE);
    }
  });
}

template <class Body>
int32_t with_weights(int32_t dtype, Body body) {
  switch (dtype) {
    case LEAP_FLOAT32: return body(Float32{});
    case LEAP_BFLOAT16: return body(Brain{});
    default: return -1;
  }
}

}  // namespace

int32_t run(const Adamw8bit& call) {
  return with_weights(call.dtype, [&](auto parameter) {
    return with_weights(call.gradient_dtype, [&](auto gradient) {
      step<decltype(parameter), decltype(gradient)>(call);
      return 0;
    });
  });
}

}  // namespace LEAP_ISA
