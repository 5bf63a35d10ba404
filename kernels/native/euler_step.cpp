// euler_step, and the backward pass of every linear op: a gradient times one factor, or two, per sample.

#include "blocks.h"

namespace LEAP_ISA {
namespace {

template <class X, class V>
int32_t step(const EulerStep& call) {
  Blocks(call.size).for_each([&](const Block& block) {
    const auto* x = at<X>(call.x, block);
    const auto* velocity = at<V>(call.velocity, block);
    auto* out = at<X>(call.out, block);
    const float delta = call.delta[block.sample];
    sweep(block.count, streamed<X>(out, call.size), [=](int64_t i, auto extent) {
      store<X>(out + i, load<X>(x + i, extent) + load<V>(velocity + i, extent) * delta, extent);
    });
  });
  return 0;
}

template <class X, class V>
int32_t guided_step(const EulerStep& call) {
  Blocks(call.size).for_each([&](const Block& block) {
    const auto* x = at<X>(call.x, block);
    const auto* velocity = at<V>(call.velocity, block);
    const auto* uncond = at<V>(call.uncond, block);
    auto* out = at<X>(call.out, block);
    const float delta = call.delta[block.sample], scale = call.scale[block.sample];
    sweep(block.count, streamed<X>(out, call.size), [=](int64_t i, auto extent) {
      const Step without = load<V>(uncond + i, extent);
      const Step guided = without + (load<V>(velocity + i, extent) - without) * scale;
      store<X>(out + i, load<X>(x + i, extent) + guided * delta, extent);
    });
  });
  return 0;
}

template <class G, class T>
int32_t scale_once(const Scale& call) {
  Blocks(call.size).for_each([&](const Block& block) {
    const auto* grad = at<G>(call.grad, block);
    auto* out = at<T>(call.out, block);
    const float factor = call.factor[block.sample];
    sweep(block.count, streamed<T>(out, call.size), [=](int64_t i, auto extent) {
      store<T>(out + i, load<G>(grad + i, extent) * factor, extent);
    });
  });
  return 0;
}

template <class G, class T>
int32_t scale_twice(const Scale& call) {
  Blocks(call.size).for_each([&](const Block& block) {
    const auto* grad = at<G>(call.grad, block);
    auto* out = at<T>(call.out, block);
    auto* second_out = at<T>(call.second_out, block);
    const float factor = call.factor[block.sample], second_factor = call.second_factor[block.sample];
    const bool stream = streamed<T>(out, call.size) && streamed<T>(second_out, call.size);
    sweep(block.count, stream, [=](int64_t i, auto extent) {
      const Step value = load<G>(grad + i, extent);
      store<T>(out + i, value * factor, extent);
      store<T>(second_out + i, value * second_factor, extent);
    });
  });
  return 0;
}

}  // namespace

int32_t run(const EulerStep& call) {
  return with_dtypes(call.dtype, call.velocity_dtype, [&](auto x, auto velocity) {
    using X = decltype(x);
    using V = decltype(velocity);
    return call.uncond == nullptr ? step<X, V>(call) : guided_step<X, V>(call);
  });
}

int32_t run(const Scale& call) {
  return with_dtypes(call.dtype, call.out_dtype, [&](auto grad, auto out) {
    using G = decltype(grad);
    using T = decltype(out);
    return call.second_out == nullptr ? scale_once<G, T>(call) : scale_twice<G, T>(call);
  });
}

}  // namespace LEAP_ISA
