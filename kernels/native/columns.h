// How kernels go over images whose channels lie side by side, (batch, places, channels). Compiled once per instruction
// set, as lanes.h, and bound by the same rules.
//
// A sample is taken as rows of `period` elements: so many places that whole steps hold their channels. Then an element's
// channel follows from its column, and what belongs to a channel is a vector as long as a row. Strips of rows have sums of
// their own, which are added in order.
#pragma once

#include <numeric>

#include "rows.h"

namespace {

// Elements of a tensor that are worked on at a time, where there are several tensors.
constexpr int64_t TILE = 1024;

struct Layout {
  int64_t channels, groups, sample, period, strip, strips;

  explicit Layout(const GroupNorm& call)
      : channels(call.channels), groups(call.groups), sample(call.channels * call.places),
        period(channels / std::gcd(channels, STEP) * STEP), strip(period * larger(1, BLOCK / period)),
        strips((sample + strip - 1) / strip) {}

  int64_t group_of(int64_t channel) const { return channel / (channels / groups); }

  // Calls work(sample, number among all strips, first element of the sample, the one after the last).
  template <class Work>
  void for_each_strip(const GroupNorm& call, Work work) const {
    share(call.batch * strips, strip, call.threads, [=, *this](int64_t number) {
      const int64_t begin = number % strips * strip;
      work(number / strips, number, begin, smaller(begin + strip, sample));
    });
  }
};

// Calls body(element, extent) for the steps of all rows from `begin` that begin in a column.
template <class Body>
[[gnu::flatten]] inline void down(int64_t begin, int64_t end, int64_t column, int64_t period, Body body) {
  int64_t i = begin + column;
  for (; i + STEP <= end; i += period) body(i, Whole{});
  if (i < end) body(i, Part{end - i});
}

// Calls work(channel, where a vector in the order of the lanes has it) for each column of a row.
template <class T, class Work>
inline void for_each_column(const Layout& layout, Work work) {
  for (int64_t i = 0; i < layout.period; ++i) work(i % layout.channels, i / STEP * STEP + lane<T>(i % STEP));
}

// Calls body(first element, the one after the last, column) for the columns of a few rows at a time, so that what one
// leaves of a cache line is still there for the next.
template <class Body>
inline void in_tiles(int64_t begin, int64_t end, int64_t period, Body body) {
  const int64_t tile = period * larger(1, TILE / period);
  for (int64_t first = begin; first < end; first += tile) {
    for (int64_t column = 0; column < period; column += STEP) body(first, smaller(first + tile, end), column);
  }
}

// Writes value(channel) for each column of a row, in the order of the lanes of storage T.
template <class T, class Value>
inline void spread(const Layout& layout, float* to, Value value) {
  for_each_column<T>(layout, [&](int64_t channel, int64_t at) { to[at] = static_cast<float>(value(channel)); });
}

inline Step vector(const float* from) { return load<Float32>(from, Whole{}); }
inline void keep(float* to, const Step& value) { store<Float32>(to, value, Whole{}); }

}  // namespace
