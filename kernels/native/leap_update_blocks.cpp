// CMake compiles this file once per instruction set; LEAP_BLOCKS names the table to define. Nothing here may call
// an inline function of the standard library: the linker could hand its AVX copy to code that must run anywhere.

#include "leap_update_blocks.h"

#include "lanes.h"

namespace {

template <class T>
struct Forward {
  const typename T::Element* x;
  const typename T::Element* velocity;
  const typename T::Element* target;  // nullptr: out is xhat, and nothing is measured
  typename T::Element* out;
};

template <class T>
inline Floats forward_lanes(const Forward<T>& at, int64_t i, float delta) {
  const Floats xhat = T::widen(load<T>(at.x + i)) - T::widen(load<T>(at.velocity + i)) * delta;
  if (at.target == nullptr) {
    store<T>(at.out + i, T::narrow(xhat));
    return Floats{};
  }
  const typename T::Raw target = load<T>(at.target + i);
  store<T>(at.out + i, target);
  return absolute(T::widen(target) - xhat);
}

// The last, partial vector goes through a padded copy; the padding is zero and adds nothing to the sum.
template <class T>
inline Floats forward_tail(const Forward<T>& at, int64_t i, int64_t count, float delta) {
  typename T::Element x[LANES] = {}, velocity[LANES] = {}, target[LANES] = {}, out[LANES] = {};
  const uint64_t bytes = static_cast<uint64_t>(count) * sizeof(x[0]);
  std::memcpy(x, at.x + i, bytes);
  std::memcpy(velocity, at.velocity + i, bytes);
  if (at.target != nullptr) std::memcpy(target, at.target + i, bytes);
  const Forward<T> padded{x, velocity, at.target == nullptr ? nullptr : target, out};
  const Floats distance = forward_lanes<T>(padded, 0, delta);
  std::memcpy(at.out + i, out, bytes);
  return distance;
}

template <class T>
double forward(const void* x, const void* velocity, const void* target, void* out, int64_t begin, int64_t count,
               float delta) {
  using Element = typename T::Element;
  const Forward<T> at{static_cast<const Element*>(x), static_cast<const Element*>(velocity),
                      static_cast<const Element*>(target), static_cast<Element*>(out)};
  Floats sum = {};
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) sum += forward_lanes<T>(at, begin + i, delta);
  if (i < count) sum += forward_tail<T>(at, begin + i, count - i, delta);
  double total = 0.0;
  for (int64_t lane = 0; lane < LANES; ++lane) total += static_cast<double>(sum[lane]);
  return total;
}

template <class T>
void backward(const void* grad, void* out, int64_t begin, int64_t count, float delta) {
  const auto* from = static_cast<const typename T::Element*>(grad) + begin;
  auto* to = static_cast<typename T::Element*>(out) + begin;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store<T>(to + i, T::narrow(T::widen(load<T>(from + i)) * -delta));
  if (i == count) return;
  typename T::Element padded[LANES] = {};
  const uint64_t bytes = static_cast<uint64_t>(count - i) * sizeof(padded[0]);
  std::memcpy(padded, from + i, bytes);
  store<T>(padded, T::narrow(T::widen(load<T>(padded)) * -delta));
  std::memcpy(to + i, padded, bytes);
}

}  // namespace

const LeapUpdateBlocks LEAP_BLOCKS[3] = {
    {forward<Float32>, backward<Float32>},
    {forward<BFloat16>, backward<BFloat16>},
    {forward<Float16>, backward<Float16>},
};
