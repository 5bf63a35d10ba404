// Tests of the C interface without Python: every function but one, in every pair of formats, against plain loops in double.

#include "tensor.h"

namespace {

const float DELTA[] = {-0.5f, 0.3f, -0.81f}, SCALE[] = {3.5f, 1.0f, 0.0f};

void test_euler(Shape s, int32_t dtype, int32_t other) {
  Tensor x = filled(dtype, s.count(), 1), v = filled(other, s.count(), 2), u = filled(other, s.count(), 3);
  Tensor out(dtype, s.count()), guided(dtype, s.count());
  expect(0 == leap_euler_step(x.data(), v.data(), nullptr, DELTA, nullptr, out.data(), s.batch, s.per_sample, dtype,
                              other, s.threads), "euler status", dtype, other, s.count());
  expect(0 == leap_euler_step(x.data(), v.data(), u.data(), DELTA, SCALE, guided.data(), s.batch, s.per_sample, dtype,
                              other, s.threads), "guided status", dtype, other, s.count());
  for (int64_t i = 0; i < s.count(); ++i) {
    const double d = DELTA[i / s.per_sample], g = SCALE[i / s.per_sample];
    expect(close(out.at(i), x.at(i) + d * v.at(i), 8, dtype), "euler", dtype, other, i);
    const double velocity = u.at(i) + g * (v.at(i) - u.at(i));
    expect(close(guided.at(i), x.at(i) + d * velocity, 40, dtype), "guided", dtype, other, i);
  }
}

void test_scale(Shape s, int32_t dtype, int32_t other) {
  Tensor grad = filled(dtype, s.count(), 4), out(other, s.count()), first(other, s.count()), second(other, s.count());
  leap_scale(grad.data(), DELTA, out.data(), nullptr, nullptr, s.batch, s.per_sample, dtype, other, s.threads);
  leap_scale(grad.data(), DELTA, first.data(), SCALE, second.data(), s.batch, s.per_sample, dtype, other, s.threads);
  expect(out == first, "scale once and twice", dtype, other, s.count());
  for (int64_t i = 0; i < s.count(); ++i) {
    expect(close(out.at(i), DELTA[i / s.per_sample] * grad.at(i), 4, other), "scale", dtype, other, i);
    expect(close(second.at(i), SCALE[i / s.per_sample] * grad.at(i), 14, other), "second scale", dtype, other, i);
  }
}

void test_distances(Shape s, int32_t dtype, int32_t other) {
  Tensor x_k = filled(dtype, s.count(), 5), v_k = filled(other, s.count(), 6), x_j = filled(dtype, s.count(), 7);
  Tensor v_j = filled(other, s.count(), 8), x_end = filled(dtype, s.count(), 9), out(dtype, s.count());
  float first[3], second[3], connector[3];
  leap_distances(x_k.data(), v_k.data(), x_j.data(), v_j.data(), x_end.data(), DELTA, SCALE, first, second, s.batch,
                 s.per_sample, dtype, other, s.threads);
  leap_connector(x_k.data(), v_k.data(), x_j.data(), DELTA, out.data(), connector, s.batch, s.per_sample, dtype, other,
                 s.threads);
  for (int64_t sample = 0; sample < s.batch; ++sample) {
    double j = 0, end = 0, pinned = 0;
    for (int64_t i = sample * s.per_sample; i < (sample + 1) * s.per_sample; ++i) {
      j += std::fabs(x_j.at(i) - (x_k.at(i) - DELTA[sample] * v_k.at(i)));
      end += std::fabs(x_end.at(i) - (x_j.at(i) - SCALE[sample] * v_j.at(i)));
      pinned += std::fabs(x_j.at(i) - (x_k.at(i) + DELTA[sample] * v_k.at(i)));
      expect(out.at(i) == x_j.at(i), "connector", dtype, other, i);
    }
    const double n = static_cast<double>(s.per_sample);
    expect(close(first[sample], j / n, 16, LEAP_FLOAT32), "distance j", dtype, other, sample);
    expect(close(second[sample], end / n, 40, LEAP_FLOAT32), "distance end", dtype, other, sample);
    expect(close(connector[sample], pinned / n, 16, LEAP_FLOAT32), "connector distance", dtype, other, sample);
  }
}

void test_combine(Shape s, int32_t dtype, int32_t other, float max_ratio) {
  Tensor direct = filled(dtype, s.count(), 10), nested = filled(other, s.count(), 11), out(dtype, s.count());
  float direct_norm[3], nested_norm[3];
  leap_combine(direct.data(), nested.data(), DELTA, 0.3f, max_ratio, out.data(), direct_norm, nested_norm, s.batch,
               s.per_sample, dtype, other, s.threads);
  for (int64_t sample = 0; sample < s.batch; ++sample) {
    double d = 0, n = 0;
    for (int64_t i = sample * s.per_sample; i < (sample + 1) * s.per_sample; ++i) {
      d += direct.at(i) * direct.at(i);
      n += nested.at(i) * nested.at(i);
    }
    d = std::sqrt(d), n = std::sqrt(n);
    expect(close(direct_norm[sample], d, d, LEAP_FLOAT32), "direct norm", dtype, other, sample);
    expect(close(nested_norm[sample], n, n, LEAP_FLOAT32), "nested norm", dtype, other, sample);
    const double share = max_ratio < 0 || n == 0 ? 0.3 : 0.3 * std::fmin(1.0, max_ratio * d / n);
    for (int64_t i = sample * s.per_sample; i < (sample + 1) * s.per_sample; ++i) {
      const double want = DELTA[sample] * (direct.at(i) + share * nested.at(i));
      expect(close(out.at(i), want, 16, dtype), "combine", dtype, other, i);
    }
  }
}

void test_ema(Shape s, int32_t dtype, int32_t other) {
  Tensor average = filled(dtype, s.count(), 12), weights = filled(other, s.count(), 13);
  const Tensor before = average;
  leap_ema_update(average.data(), weights.data(), 0.25f, s.count(), dtype, other, s.threads);
  for (int64_t i = 0; i < s.count(); ++i) {
    const double want = 0.75 * before.at(i) + 0.25 * weights.at(i);
    expect(close(average.at(i), want, 12, dtype), "ema", dtype, other, i);
  }
}

void test_accumulate(Shape s, int32_t dtype, int32_t other) {
  Tensor total = filled(dtype, s.count(), 14), value = filled(other, s.count(), 15);
  const Tensor before = total;
  expect(0 == leap_accumulate(total.data(), value.data(), s.count(), dtype, other, s.threads), "sum status", 0, 0, 0);
  for (int64_t i = 0; i < s.count(); ++i) {
    expect(close(total.at(i), before.at(i) + value.at(i), 4, dtype), "accumulate", dtype, other, i);
  }
}

void test_loss() {
  const float reward[] = {0.2f, 0.5f, 0.9f}, distances[] = {0.05f, 0.3f, 0.2f, 0.4f, 0.01f, 0.2f};
  float loss, weight[3];
  expect(0 == leap_weighted_loss(reward, distances, 0.6f, 0.1f, &loss, weight, 2, 3, 2), "loss status", 0, 0, 0);
  const double want[] = {2.0, 2.5, 2.5};
  for (int i = 0; i < 3; ++i) expect(close(weight[i], want[i], 4, LEAP_FLOAT32), "weight", i, 0, 0);
  expect(close(loss, (2.0 * 0.4 + 2.5 * 0.1) / 3, 4, LEAP_FLOAT32), "loss", 0, 0, 0);
}

void test_nothing() {
  float some[3];
  uint16_t half = 7;
  expect(0 == leap_combine(some, some, some, 0.3f, 0.5f, some, some, some, 0, 0, 0, 0, 2), "no samples", 0, 0, 0);
  expect(0 == leap_combine(some, some, some, 0.3f, 0.5f, some, some, some, 1, 0, 0, 0, 2), "no elements", 1, 0, 0);
  expect(0 == leap_accumulate(some, some, 0, 0, 0, 2), "nothing to add", 0, 0, 0);
  expect(0 == leap_ema_update(some, some, 0.5f, 0, 0, 0, 2), "no weights", 0, 0, 0);
  expect(0 == leap_stochastic_round(some, &half, 1, 0, 0, 2) && half == 7, "nothing to round", 0, 0, 0);
}

// ---- stochastic rounding ---------------------------------------------------------------------------------------

// Number p of the generator, by the definition: counter p / 8, 16-bit number p % 8.
uint32_t drawn(uint64_t seed, uint64_t position) {
  const uint64_t counter = position / 8;
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    std::memcpy(c, next, sizeof(c));
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (c[position % 8 / 2] >> (position % 2 ? 16 : 0)) & 0xffffu;
}

void test_round(Shape s, int64_t offset) {
  const uint64_t seed = 0xfedcba9876543210u;
  Tensor from(LEAP_FLOAT32, s.count()), to(LEAP_BFLOAT16, s.count());
  std::vector<uint32_t> words(static_cast<size_t>(s.count()));
  for (size_t i = 0; i < words.size(); ++i) words[i] = static_cast<uint32_t>(i) * 2654435761u;
  std::memcpy(from.data(), words.data(), 4 * words.size());
  leap_stochastic_round(static_cast<float*>(from.data()), to.data(), seed, offset, s.count(), s.threads);
  for (size_t i = 0; i < words.size(); ++i) {
    uint32_t want = words[i] + drawn(seed, static_cast<uint64_t>(offset) + i);
    if ((want & 0x7f800000u) == 0x7f800000u) want = words[i];
    if ((words[i] & 0x7fffffffu) > 0x7f800000u) want = words[i] | 0x400000u;
    uint16_t got;
    std::memcpy(&got, static_cast<unsigned char*>(to.data()) + 2 * i, 2);
    expect(got == want >> 16, "round", offset, s.count(), static_cast<long long>(i));
  }
}

}  // namespace

int main() {
  expect(leap_abi() == LEAP_ABI, "interface", leap_abi(), LEAP_ABI, 0);
  for (const Shape& shape : SHAPES) {
    for (int32_t dtype = 0; dtype < 3; ++dtype) {
      for (int32_t other = 0; other < 3; ++other) {
        test_euler(shape, dtype, other);
        test_scale(shape, dtype, other);
        test_distances(shape, dtype, other);
        for (float max_ratio : {-1.0f, 0.0f, 0.5f, 100.0f}) test_combine(shape, dtype, other, max_ratio);
        test_ema(shape, dtype, other);
        test_accumulate(shape, dtype, other);
      }
    }
    for (int64_t offset : {int64_t{0}, int64_t{3}, (int64_t{1} << 35) - 5}) test_round(shape, offset);
  }
  test_loss();
  float value = 0;
  test_nothing();
  expect(-1 == leap_ema_update(&value, &value, 0.5f, 1, 3, 0, 1), "unknown dtype", 3, 0, 0);
  expect(-1 == leap_ema_update(&value, &value, 0.5f, 1, 0, -1, 1), "unknown dtype", 0, -1, 0);
  expect(-1 == leap_accumulate(&value, &value, 1, 0, 3, 1), "unknown dtype", 0, 3, 0);
  return report();
}
