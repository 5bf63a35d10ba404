// Group norm and SiLU. A block is a part of a channel; sums of a channel's blocks are added in order, then a group's.

#include "blocks.h"
#include "sigmoid.h"

namespace LEAP_ISA {
namespace {

// What a channel does to its elements: y = (x - mean) * rstd * weight + bias.
struct Channel {
  float mean, rstd, weight, bias;

  Step normed(const Step& x) const { return (x - all(mean)) * rstd; }
};

int64_t group_of(const GroupNorm& call, int64_t channel) {
  const int64_t sample = channel / call.channels;
  return sample * call.groups + channel % call.channels / (call.channels / call.groups);
}

// `channel` counts through all samples.
Channel channel_of(const GroupNorm& call, int64_t channel) {
  const int64_t group = group_of(call, channel), within = channel % call.channels;
  return {call.mean[group], call.rstd[group], call.weight == nullptr ? 1.0f : call.weight[within],
          call.bias == nullptr ? 0.0f : call.bias[within]};
}

Size size_of(const GroupNorm& call) { return {call.batch * call.channels, call.places, call.threads}; }

// Padding differs from zero once a mean is subtracted. Its lanes depend on the storage.
template <class T, class Extent>
inline Step without_padding(const Step& value, Extent extent) {
  if constexpr (sizeof(Extent) == sizeof(Part)) {
    typename T::Element ones[STEP];
    store<T>(ones, all(1.0f), Whole{});
    return value * load<T>(ones, extent);
  } else {
    return value;
  }
}

// Sums of each block: of the elements, and of the squares of how far they are from the block's mean.
template <class T>
void moments_of_blocks(const GroupNorm& call, const Blocks& blocks, double* sums) {
  blocks.for_each([&](const Block& block) {
    const auto* x = at<T>(call.x, block);
    Step total{}, squares{};
    sweep(block.count, false, [=, &total](int64_t i, auto extent) { total = total + load<T>(x + i, extent); });
    const double of_block = sum(total);
    const float mean = static_cast<float>(of_block / static_cast<double>(block.count));
    // From the cache.
    sweep(block.count, false, [=, &squares](int64_t i, auto extent) {
      const Step apart = without_padding<T>(load<T>(x + i, extent) - all(mean), extent);
      squares = squares + apart * apart;
    });
    const double off = of_block / static_cast<double>(block.count) - static_cast<double>(mean);
    sums[2 * block.number] = of_block;
    sums[2 * block.number + 1] = sum(squares) - static_cast<double>(block.count) * off * off;
  });
}

void moments_of_groups(const GroupNorm& call, const double* sums) {
  const int64_t blocks = (call.places + BLOCK - 1) / BLOCK, channels = call.channels / call.groups;
  const double size = static_cast<double>(channels * call.places);
  for (int64_t group = 0; group < call.batch * call.groups; ++group) {
    const double* of_group = sums + 2 * group * channels * blocks;
    double total = 0.0, squares = 0.0;
    for (int64_t block = 0; block < channels * blocks; ++block) total += of_group[2 * block];
    const double mean = total / size;
    for (int64_t block = 0; block < channels * blocks; ++block) {
      const double count = static_cast<double>(smaller(BLOCK, call.places - block % blocks * BLOCK));
      const double apart = of_group[2 * block] / count - mean;
      squares += of_group[2 * block + 1] + count * apart * apart;
    }
    call.mean[group] = static_cast<float>(mean);
    call.rstd[group] = static_cast<float>(1.0 / __builtin_sqrt(squares / size + static_cast<double>(call.eps)));
  }
}

template <class T>
int32_t forward(const GroupNorm& call) {
  const Size size = size_of(call);
  const Blocks blocks(size);
  const Sums sums(2 * blocks.count());
  if (sums.get() == nullptr) return -2;
  moments_of_blocks<T>(call, blocks, sums.get());
  moments_of_groups(call, sums.get());
  blocks.for_each([&](const Block& block) {
    const Channel channel = channel_of(call, block.sample);
    const auto* x = at<T>(call.x, block);
    auto* out = at<T>(call.out, block);
    sweep(block.count, streamed<T>(out, size), [=](int64_t i, auto extent) {
      const Step y = channel.normed(load<T>(x + i, extent)) * channel.weight + all(channel.bias);
      store<T>(out + i, y * sigmoid(y), extent);
    });
  });
  return 0;
}

// The gradient at y: that at silu(y), times its derivative.
inline Step at_y(const Step& grad, const Step& normed, const Channel& channel) {
  return silu_gradient(grad, normed * channel.weight + all(channel.bias));
}

// Whether the first pass leaves the gradient at y in the output for the second: where storing it costs no digits.
template <class T>
constexpr bool KEPT = sizeof(typename T::Element) == sizeof(float);

template <class T>
int32_t backward(const GroupNorm& call) {
  const Size size = size_of(call);
  const Blocks blocks(size);
  const int64_t channels = call.batch * call.channels, of_group = call.channels / call.groups;
  const Sums sums(2 * blocks.count()), totals(2 * channels), means(2 * call.batch * call.groups);
  if (sums.get() == nullptr || totals.get() == nullptr || means.get() == nullptr) return -2;
  blocks.for_each([&](const Block& block) {
    const Channel channel = channel_of(call, block.sample);
    const auto* grad = at<T>(call.grad, block);
    const auto* x = at<T>(call.x, block);
    auto* out = at<T>(call.out, block);
    Step total{}, product{};
    sweep(block.count, false, [=, &total, &product](int64_t i, auto extent) {
      const Step normed = channel.normed(load<T>(x + i, extent));
      // Zero in the padding.
      const Step there = at_y(load<T>(grad + i, extent), normed, channel);
      if constexpr (KEPT<T>) store<T>(out + i, there, extent);
      total = total + there;
      product = product + there * normed;
    });
    sums.get()[2 * block.number] = sum(total);
    sums.get()[2 * block.number + 1] = sum(product);
  });
  for (int64_t channel = 0; channel < channels; ++channel) {
    totals.get()[2 * channel] = blocks.sum_of(sums.get(), channel, 2);
    totals.get()[2 * channel + 1] = blocks.sum_of(sums.get() + 1, channel, 2);
  }
  for (int64_t group = 0; group < call.batch * call.groups; ++group) {
    double total = 0.0, product = 0.0;
    for (int64_t channel = group * of_group; channel < (group + 1) * of_group; ++channel) {
      const double weight = static_cast<double>(channel_of(call, channel).weight);
      total += weight * totals.get()[2 * channel];
      product += weight * totals.get()[2 * channel + 1];
    }
    const double count = static_cast<double>(of_group * call.places);
    means.get()[2 * group] = total / count;
    means.get()[2 * group + 1] = product / count;
  }
  blocks.for_each([&](const Block& block) {
    const Channel channel = channel_of(call, block.sample);
    const int64_t group = group_of(call, block.sample);
    const float total = static_cast<float>(means.get()[2 * group]);
    const float product = static_cast<float>(means.get()[2 * group + 1]);
    const auto* grad = at<T>(call.grad, block);
    const auto* x = at<T>(call.x, block);
    auto* out = at<T>(call.out, block);
    sweep(block.count, streamed<T>(out, size), [=](int64_t i, auto extent) {
      const Step normed = channel.normed(load<T>(x + i, extent));
      const Step there = KEPT<T> ? load<T>(out + i, extent) : at_y(load<T>(grad + i, extent), normed, channel);
      store<T>(out + i, (there * channel.weight - all(total) - normed * product) * channel.rstd, extent);
    });
  });
  for (int64_t channel = 0; channel < call.channels; ++channel) {
    double total = 0.0, product = 0.0;
    for (int64_t sample = 0; sample < call.batch; ++sample) {
      total += totals.get()[2 * (sample * call.channels + channel)];
      product += totals.get()[2 * (sample * call.channels + channel) + 1];
    }
    call.at_bias[channel] = static_cast<float>(total);
    call.at_weight[channel] = static_cast<float>(product);
  }
  return 0;
}

}  // namespace

int32_t run(const GroupNorm& call) {
  return with_dtypes(call.dtype, call.dtype, [&](auto type, auto) {
    using T = decltype(type);
    return call.grad == nullptr ? forward<T>(call) : backward<T>(call);
  });
}

}  // namespace LEAP_ISA
