// Group norm and SiLU where the channels of a place lie side by side.

#include "columns.h"
#include "sigmoid.h"

namespace LEAP_ISA {
namespace {

// Of a sample's strips, for each column: how many elements there are, their sum, their mean, and the squares of how far
// they are from it.
constexpr int64_t MOMENTS = 4;

template <class T>
void moments_of_strips(const GroupNorm& call, const Layout& layout, float* moments) {
  const int64_t period = layout.period;
  layout.for_each_strip(call, [=](int64_t sample, int64_t number, int64_t begin, int64_t end) {
    const auto* x = row_of<T>(call.x, layout.sample, sample);
    float* to = moments + number * MOMENTS * period;
    for (int64_t column = 0; column < period; column += STEP) {
      Step count{}, total{}, squares{};
      down(begin, end, column, period, [=, &count, &total](int64_t i, auto extent) {
        count = count + inside<T>(all(1.0f), extent);
        total = total + load<T>(x + i, extent);
      });
      // A column without elements has a sum of zero.
      const Step mean = total / each([&](int64_t p) {
        const Floats one = Floats{} + 1.0f;
        return count.part[p] < one ? one : count.part[p];
      });
      // From the cache.
      down(begin, end, column, period, [=, &squares](int64_t i, auto extent) {
        const Step apart = inside<T>(load<T>(x + i, extent) - mean, extent);
        squares = squares + apart * apart;
      });
      keep(to + column, count);
      keep(to + period + column, total);
      keep(to + 2 * period + column, mean);
      keep(to + 3 * period + column, squares);
    }
  });
}

// Writes mean and rstd of a sample's groups. `sums` has room for two numbers of each column and of each group.
template <class T>
void moments_of_groups(const GroupNorm& call, const Layout& layout, int64_t sample, const float* moments,
                       double* sums) {
  const int64_t period = layout.period;
  const double size = static_cast<double>(layout.sample / layout.groups);
  double *of_column = sums, *center = sums + period, *of_group = sums + 2 * period;
  for (int64_t i = 0; i < 2 * (period + layout.groups); ++i) sums[i] = 0.0;
  for (int64_t strip = 0; strip < layout.strips; ++strip) {
    const float* total = moments + (strip * MOMENTS + 1) * period;
    for (int64_t i = 0; i < period; ++i) of_column[i] += static_cast<double>(total[i]);
  }
  for_each_column<T>(layout, [&](int64_t channel, int64_t at) {
    of_group[layout.group_of(channel)] += of_column[at] / size;
    of_column[at] = 0.0;
  });
  for_each_column<T>(layout, [&](int64_t channel, int64_t at) { center[at] = of_group[layout.group_of(channel)]; });
  for (int64_t strip = 0; strip < layout.strips; ++strip) {
    const float* count = moments + strip * MOMENTS * period;
    const float *total = count + period, *mean = total + period, *squares = mean + period;
    for (int64_t i = 0; i < period; ++i) {
      const double many = static_cast<double>(count[i]), around = static_cast<double>(mean[i]);
      const double off = around - center[i], rest = static_cast<double>(total[i]) - many * around;
      // Around the group's mean. That of the column is rounded, so that something is left of its sum.
      of_column[i] += static_cast<double>(squares[i]) + off * (2.0 * rest + many * off);
    }
  }
  double* variance = of_group + layout.groups;
  for_each_column<T>(layout, [&](int64_t channel, int64_t at) {
    variance[layout.group_of(channel)] += of_column[at] / size;
  });
  for (int64_t group = 0; group < layout.groups; ++group) {
    const double root = __builtin_sqrt(variance[group] + static_cast<double>(call.eps));
    call.mean[sample * layout.groups + group] = static_cast<float>(of_group[group]);
    call.rstd[sample * layout.groups + group] = static_cast<float>(1.0 / root);
  }
}

inline float weight_of(const GroupNorm& call, int64_t channel) {
  return call.weight == nullptr ? 1.0f : call.weight[channel];
}

// The vectors of a sample: mean, rstd, weight and bias of each column's channel.
constexpr int64_t VECTORS = 4;

template <class T>
void spread_channels(const GroupNorm& call, const Layout& layout, int64_t sample, float* to) {
  const float* mean = call.mean + sample * layout.groups;
  const float* rstd = call.rstd + sample * layout.groups;
  spread<T>(layout, to, [&](int64_t channel) { return mean[layout.group_of(channel)]; });
  spread<T>(layout, to + layout.period, [&](int64_t channel) { return rstd[layout.group_of(channel)]; });
  spread<T>(layout, to + 2 * layout.period, [&](int64_t channel) { return weight_of(call, channel); });
  spread<T>(layout, to + 3 * layout.period,
            [&](int64_t channel) { return call.bias == nullptr ? 0.0f : call.bias[channel]; });
}

template <class T>
int32_t forward(const GroupNorm& call) {
  const Layout layout(call);
  const int64_t period = layout.period;
  const Scratch moments(call.batch * layout.strips * MOMENTS * period), vectors(call.batch * VECTORS * period);
  const int64_t of_sample = 2 * (period + layout.groups);
  const Sums sums(call.batch * of_sample);
  if (moments.get() == nullptr || vectors.get() == nullptr || sums.get() == nullptr) return -2;
  moments_of_strips<T>(call, layout, moments.get());
  share(call.batch, layout.strips * period, call.threads, [&](int64_t sample) {
    moments_of_groups<T>(call, layout, sample, moments.get() + sample * layout.strips * MOMENTS * period,
                         sums.get() + sample * of_sample);
    spread_channels<T>(call, layout, sample, vectors.get() + sample * VECTORS * period);
  });
  const float* all_vectors = vectors.get();
  layout.for_each_strip(call, [=](int64_t sample, int64_t, int64_t begin, int64_t end) {
    const auto* x = row_of<T>(call.x, layout.sample, sample);
    auto* out = row_of<T>(call.out, layout.sample, sample);
    const float* given = all_vectors + sample * VECTORS * period;
    in_tiles(begin, end, period, [=](int64_t first, int64_t last, int64_t column) {
      const Step mean = vector(given + column), bias = vector(given + 3 * period + column);
      const Step scale = vector(given + period + column) * vector(given + 2 * period + column);
      down(first, last, column, period, [=](int64_t i, auto extent) {
        const Step y = (load<T>(x + i, extent) - mean) * scale + bias;
        store<T>(out + i, y * sigmoid(y), extent);
      });
    });
  });
  return 0;
}

// Whether the first pass leaves the gradient at y in the output for the second: where storing it costs no digits.
template <class T>
constexpr bool KEPT = sizeof(typename T::Element) == sizeof(float);

// Of each strip, for each column: the sum of the gradients at y, and that of their products with the normed elements.
template <class T>
void sums_of_strips(const GroupNorm& call, const Layout& layout, const float* vectors, float* sums) {
  const int64_t period = layout.period;
  layout.for_each_strip(call, [=](int64_t sample, int64_t number, int64_t begin, int64_t end) {
    const auto* grad = row_of<T>(call.grad, layout.sample, sample);
    const auto* x = row_of<T>(call.x, layout.sample, sample);
    auto* out = row_of<T>(call.out, layout.sample, sample);
    const float* of_sample = vectors + sample * VECTORS * period;
    float* to = sums + number * 2 * period;
    for (int64_t i = 0; i < 2 * period; ++i) to[i] = 0.0f;
    in_tiles(begin, end, period, [=](int64_t first, int64_t last, int64_t column) {
      const Step mean = vector(of_sample + column), rstd = vector(of_sample + period + column);
      const Step weight = vector(of_sample + 2 * period + column), bias = vector(of_sample + 3 * period + column);
      Step total = vector(to + column), product = vector(to + period + column);
      down(first, last, column, period, [=, &total, &product](int64_t i, auto extent) {
        const Step normed = (load<T>(x + i, extent) - mean) * rstd;
        // Zero in the padding.
        const Step there = silu_gradient(load<T>(grad + i, extent), normed * weight + bias);
        if constexpr (KEPT<T>) store<T>(out + i, there, extent);
        total = total + there;
        product = product + there * normed;
      });
      keep(to + column, total);
      keep(to + period + column, product);
    });
  });
}

template <class T>
int32_t backward(const GroupNorm& call) {
  const Layout layout(call);
  const int64_t period = layout.period, channels = layout.channels;
  const Scratch sums(call.batch * layout.strips * 2 * period), vectors(call.batch * VECTORS * period);
  const Scratch means(call.batch * 2 * period);
  const Sums columns(2 * call.batch * period), totals(2 * call.batch * channels);
  const Sums of_groups(2 * call.batch * layout.groups);
  for (const void* room : {static_cast<const void*>(sums.get()), static_cast<const void*>(vectors.get()),
                           static_cast<const void*>(means.get()), static_cast<const void*>(columns.get()),
                           static_cast<const void*>(totals.get()), static_cast<const void*>(of_groups.get())}) {
    if (room == nullptr) return -2;
  }
  for (int64_t sample = 0; sample < call.batch; ++sample) {
    spread_channels<T>(call, layout, sample, vectors.get() + sample * VECTORS * period);
  }
  sums_of_strips<T>(call, layout, vectors.get(), sums.get());
  share(call.batch, layout.strips * period, call.threads, [&](int64_t sample) {
    double *column = columns.get() + 2 * sample * period, *total = totals.get() + 2 * sample * channels;
    double* mean = of_groups.get() + 2 * sample * layout.groups;
    for (int64_t i = 0; i < 2 * period; ++i) column[i] = 0.0;
    for (int64_t strip = 0; strip < layout.strips; ++strip) {
      const float* from = sums.get() + (sample * layout.strips + strip) * 2 * period;
      for (int64_t i = 0; i < 2 * period; ++i) column[i] += static_cast<double>(from[i]);
    }
    for (int64_t i = 0; i < 2 * channels; ++i) total[i] = 0.0;
    for_each_column<T>(layout, [&](int64_t channel, int64_t at) {
      total[2 * channel] += column[at];
      total[2 * channel + 1] += column[period + at];
    });
    const double count = static_cast<double>(layout.sample / layout.groups);
    for (int64_t i = 0; i < 2 * layout.groups; ++i) mean[i] = 0.0;
    for (int64_t channel = 0; channel < channels; ++channel) {
      const double weight = static_cast<double>(weight_of(call, channel)) / count;
      mean[2 * layout.group_of(channel)] += weight * total[2 * channel];
      mean[2 * layout.group_of(channel) + 1] += weight * total[2 * channel + 1];
    }
    float* to = means.get() + sample * 2 * period;
    spread<T>(layout, to, [&](int64_t channel) { return mean[2 * layout.group_of(channel)]; });
    spread<T>(layout, to + period, [&](int64_t channel) { return mean[2 * layout.group_of(channel) + 1]; });
  });
  const float *all_vectors = vectors.get(), *all_means = means.get();
  layout.for_each_strip(call, [=](int64_t sample, int64_t, int64_t begin, int64_t end) {
    const auto* grad = row_of<T>(call.grad, layout.sample, sample);
    const auto* x = row_of<T>(call.x, layout.sample, sample);
    auto* out = row_of<T>(call.out, layout.sample, sample);
    const float* of_sample = all_vectors + sample * VECTORS * period;
    const float* of_means = all_means + sample * 2 * period;
    in_tiles(begin, end, period, [=](int64_t first, int64_t last, int64_t column) {
      const Step mean = vector(of_sample + column), rstd = vector(of_sample + period + column);
      const Step weight = vector(of_sample + 2 * period + column), bias = vector(of_sample + 3 * period + column);
      const Step total = vector(of_means + column), product = vector(of_means + period + column);
      down(first, last, column, period, [=](int64_t i, auto extent) {
        const Step normed = (load<T>(x + i, extent) - mean) * rstd;
        const Step there = KEPT<T> ? load<T>(out + i, extent)
                                   : silu_gradient(load<T>(grad + i, extent), normed * weight + bias);
        store<T>(out + i, (there * weight - total - normed * product) * rstd, extent);
      });
    });
  });
  for (int64_t channel = 0; channel < channels; ++channel) {
    double total = 0.0, product = 0.0;
    for (int64_t sample = 0; sample < call.batch; ++sample) {
      total += totals.get()[2 * (sample * channels + channel)];
      product += totals.get()[2 * (sample * channels + channel) + 1];
    }
    call.at_bias[channel] = static_cast<float>(total);
    call.at_weight[channel] = static_cast<float>(product);
  }
  return 0;
}

}  // namespace

int32_t run(const GroupNormLast& call) {
  return with_storage(call.dtype, [&](auto storage) {
    using T = decltype(storage);
    return call.grad == nullptr ? forward<T>(call) : backward<T>(call);
  });
}

}  // namespace LEAP_ISA
