// The connector of leap_update, and leap_distances: how far from the rollout leaps land.

#include "blocks.h"

namespace LEAP_ISA {
namespace {

// How far `to` is from where `velocity` leads.
inline Step miss(const Step& to, const Step& x, const Step& velocity, float delta) {
  return to - (x + velocity * delta);
}

template <class X, class V>
int32_t connect(const Connector& call) {
  const Blocks blocks(call.size);
  const Sums sums(blocks.count());
  if (sums.get() == nullptr) return -2;
  blocks.for_each([&](const Block& block) {
    const auto* x = at<X>(call.x, block);
    const auto* velocity = at<V>(call.velocity, block);
    const auto* target = at<X>(call.target, block);
    auto* out = at<X>(call.out, block);
    const float delta = call.delta[block.sample];
    Step total{};
    sweep(block.count, streamed<X>(out, call.size), [=, &total](int64_t i, auto extent) {
      const typename X::Raw to = read<X>(target + i, extent);
      extent.write(out + i, to);
      total = total + absolute(miss(X::widen(to), load<X>(x + i, extent), load<V>(velocity + i, extent), delta));
    });
    sums.get()[block.number] = sum(total);
  });
  for (int64_t sample = 0; sample < call.size.batch; ++sample) {
    const double total = blocks.sum_of(sums.get(), sample, 1);
    call.distance[sample] = static_cast<float>(total / static_cast<double>(call.size.per_sample));
  }
  return 0;
}

template <class X, class V>
int32_t distances(const LeapDistances& call) {
  const Blocks blocks(call.size);
  const Sums sums(2 * blocks.count());
  if (sums.get() == nullptr) return -2;
  blocks.for_each([&](const Block& block) {
    const auto* x_k = at<X>(call.x_k, block);
    const auto* v_k = at<V>(call.v_k, block);
    const auto* x_j = at<X>(call.x_j, block);
    const auto* v_j = at<V>(call.v_j, block);
    const auto* x_end = at<X>(call.x_end, block);
    const float delta = -call.delta[block.sample], sigma_j = -call.sigma_j[block.sample];
    Step first{}, second{};
    sweep(block.count, false, [=, &first, &second](int64_t i, auto extent) {
      const Step middle = load<X>(x_j + i, extent);
      first = first + absolute(miss(middle, load<X>(x_k + i, extent), load<V>(v_k + i, extent), delta));
      second = second + absolute(miss(load<X>(x_end + i, extent), middle, load<V>(v_j + i, extent), sigma_j));
    });
    sums.get()[2 * block.number] = sum(first);
    sums.get()[2 * block.number + 1] = sum(second);
  });
  for (int64_t sample = 0; sample < call.size.batch; ++sample) {
    const double count = static_cast<double>(call.size.per_sample);
    call.distance_j[sample] = static_cast<float>(blocks.sum_of(sums.get(), sample, 2) / count);
    call.distance_end[sample] = static_cast<float>(blocks.sum_of(sums.get() + 1, sample, 2) / count);
  }
  return 0;
}

}  // namespace

int32_t run(const Connector& call) {
  return with_dtypes(call.dtype, call.velocity_dtype, [&](auto x, auto velocity) {
    return connect<decltype(x), decltype(velocity)>(call);
  });
}

int32_t run(const LeapDistances& call) {
  return with_dtypes(call.dtype, call.velocity_dtype, [&](auto x, auto velocity) {
    return distances<decltype(x), decltype(velocity)>(call);
  });
}

}  // namespace LEAP_ISA
