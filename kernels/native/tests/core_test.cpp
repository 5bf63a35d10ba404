// Tests of the C interface without Python: every function, in every pair of formats, against plain loops in double.
//
// Buffers have exactly the size they need, on addresses that are odd multiples of an element: a sanitizer build sees
// every step outside them.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "leap_native.h"

namespace {

int failures = 0;

void expect(bool held, const char* what, long long a, long long b, long long c) {
  if (held) return;
  std::printf("FAILED: %s (%lld, %lld, %lld)\n", what, a, b, c);
  ++failures;
}

// ---- tensors ---------------------------------------------------------------------------------------------------

size_t width(int32_t dtype) { return dtype == LEAP_FLOAT32 ? 4 : 2; }

// Half the distance between neighbours, in units of the value.
double unit(int32_t dtype) {
  return std::ldexp(1.0, dtype == LEAP_FLOAT32 ? -24 : dtype == LEAP_BFLOAT16 ? -8 : -11);
}

class Tensor {
 public:
  Tensor(int32_t dtype, int64_t count) : dtype_(dtype), bytes_(width(dtype) * static_cast<size_t>(count + 1)) {
    bytes_.shrink_to_fit();
  }

  // One element in: aligned to the element, and to nothing else.
  void* data() { return bytes_.data() + width(dtype_); }

  double at(int64_t i) const {
    const unsigned char* address = bytes_.data() + width(dtype_) * static_cast<size_t>(i + 1);
    if (dtype_ == LEAP_FLOAT32) {
      float value;
      std::memcpy(&value, address, 4);
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, address, 2);
    const int mantissa_bits = dtype_ == LEAP_BFLOAT16 ? 7 : 10, bias = dtype_ == LEAP_BFLOAT16 ? 127 : 15;
    const int exponent = (bits & 0x7fff) >> mantissa_bits;
    const int fraction = bits & ((1 << mantissa_bits) - 1);
    const double value = exponent == 0 ? std::ldexp(fraction, 1 - bias - mantissa_bits)
                                       : std::ldexp(fraction + (1 << mantissa_bits), exponent - bias - mantissa_bits);
    return bits & 0x8000 ? -value : value;
  }

  // Sixteenths between -4 and 4: exact in every format, and so are their bits by hand.
  void fill(uint32_t seed) {
    const int64_t count = static_cast<int64_t>(bytes_.size() / width(dtype_)) - 1;
    for (int64_t i = 0; i < count; ++i) {
      seed = seed * 1664525u + 1013904223u;
      const float value = static_cast<float>(static_cast<int>(seed >> 25) - 64) / 16.0f;
      uint32_t word;
      std::memcpy(&word, &value, 4);
      unsigned char* address = bytes_.data() + width(dtype_) * static_cast<size_t>(i + 1);
      if (dtype_ == LEAP_FLOAT32) {
        std::memcpy(address, &word, 4);
        continue;
      }
      uint16_t bits = static_cast<uint16_t>(word >> 16);
      if (dtype_ == LEAP_FLOAT16) {
        const uint32_t magnitude = value == 0.0f ? 0 : ((word & 0x7fffffffu) >> 13) - (112u << 10);
        bits = static_cast<uint16_t>(((word >> 16) & 0x8000u) | magnitude);
      }
      std::memcpy(address, &bits, 2);
    }
  }

  int32_t dtype() const { return dtype_; }
  bool operator==(const Tensor& other) const { return bytes_ == other.bytes_; }

 private:
  int32_t dtype_;
  std::vector<unsigned char> bytes_;
};

Tensor filled(int32_t dtype, int64_t count, uint32_t seed) {
  Tensor tensor(dtype, count);
  tensor.fill(seed);
  return tensor;
}

bool close(double got, double want, double scale, int32_t dtype) {
  return std::fabs(got - want) <= unit(dtype) * std::fabs(want) + 8 * unit(LEAP_FLOAT32) * scale;
}

// ---- what the functions should compute -------------------------------------------------------------------------

struct Shape {
  int64_t batch, per_sample;
  int32_t threads;
  int64_t count() const { return batch * per_sample; }
};

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

// ---- AdamW on bytes ----------------------------------------------------------------------------------------------

// Maps of even steps: entry i is i / 255, or from -1 on. The nearest to place p of 65536 is found by hand.
struct Bytes {
  float map[256];
  std::vector<uint8_t> table;

  explicit Bytes(float lowest) : table(65536) {
    for (int i = 0; i < 256; ++i) map[i] = lowest + (1.0f - lowest) * static_cast<float>(i) / 255.0f;
    for (size_t place = 0; place < table.size(); ++place) {
      const double x = static_cast<double>(place) / 32767.5 - 1;
      table[place] = static_cast<uint8_t>(std::lround(std::fmax(0.0, (x - lowest) / (1 - lowest)) * 255));
    }
  }
};

// Each group has moments of a size of its own: another group's largest magnitude would show.
void test_adamw(Shape s, int32_t dtype, int32_t other, int64_t offset) {
  const Bytes maps[] = {Bytes(-1.0f), Bytes(0.0f)};
  const uint64_t seed = 77;
  const float keep[] = {0.9f, 0.99f}, scale = 0.5f, rate = 0.01f, root = 0.3f, eps = 0.01f, decay = 0.02f;
  const int64_t count = s.count(), groups = (count + 255) / 256;
  Tensor parameter = filled(dtype, count, 14), gradient = filled(other, count, 15), rounded(LEAP_BFLOAT16, count);
  Tensor stepped = parameter;
  std::vector<uint8_t> codes[2];
  std::vector<float> absmax[2], exact(static_cast<size_t>(count));
  for (int n = 0; n < 2; ++n) {
    for (int64_t i = 0; i < count; ++i) codes[n].push_back(static_cast<uint8_t>(i * 37 + n));
    for (int64_t g = 0; g < groups; ++g) absmax[n].push_back(static_cast<float>(1 + g % 5));
  }
  std::vector<uint8_t> old_codes[] = {codes[0], codes[1]};
  std::vector<float> old_absmax[] = {absmax[0], absmax[1]};
  expect(0 == leap_adamw_8bit_step(stepped.data(), gradient.data(), codes[0].data(), absmax[0].data(), codes[1].data(),
                                   absmax[1].data(), maps[0].map, maps[0].table.data(), maps[1].map,
                                   maps[1].table.data(), keep[0], 0.1f, keep[1], 0.01f, scale, rate, root, eps, decay,
                                   seed, offset, count, dtype, other, s.threads), "adamw status", dtype, other, count);
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t first = group * 256, last = first + 256 < count ? first + 256 : count;
    double largest[2] = {};
    for (bool measured : {false, true}) {
      for (int64_t i = first; i < last; ++i) {
        const size_t at = static_cast<size_t>(i), in = static_cast<size_t>(group);
        const double g = scale * gradient.at(i), old = parameter.at(i);
        double moments[2];
        for (int n = 0; n < 2; ++n) {
          const double kept = keep[n] * static_cast<double>(maps[n].map[old_codes[n][at]] * old_absmax[n][in]);
          moments[n] = kept + (n == 0 ? 0.1 * g : 0.01 * g * g);
          if (!measured) largest[n] = std::fmax(largest[n], std::fabs(moments[n]));
          // Half a step of the map, and as much as a place of the table covers.
          const double x = static_cast<double>(maps[n].map[codes[n][at]]), slack = (n == 0 ? 1.0 : 0.5) / 255 + 4e-5;
          if (measured) expect(std::fabs(x - moments[n] / largest[n]) < slack, "code", n, count, i);
        }
        if (measured) continue;
        const double change = rate * moments[0] / (std::sqrt(moments[1]) / root + eps) + decay * old;
        exact[at] = static_cast<float>(old - change);
        if (dtype == LEAP_FLOAT32) expect(close(stepped.at(i), old - change, 8, dtype), "adamw", dtype, other, i);
      }
    }
    for (int n = 0; n < 2; ++n) {
      expect(close(absmax[n][static_cast<size_t>(group)], largest[n], 8, LEAP_FLOAT32), "absmax", n, count, group);
    }
  }
  if (dtype == LEAP_FLOAT32) return;
  // Where float and double differ in the last bit, the carry may differ: rarely.
  leap_stochastic_round(exact.data(), rounded.data(), seed, offset, count, 1);
  int64_t different = 0;
  for (int64_t i = 0; i < count; ++i) different += stepped.at(i) != rounded.at(i);
  expect(different <= 1 + count / 1000, "rounding of adamw", offset, count, different);
}

}  // namespace

int main() {
  expect(leap_abi() == LEAP_ABI, "interface", leap_abi(), LEAP_ABI, 0);
  const Shape shapes[] = {{1, 1, 1}, {3, 31, 1}, {2, 33, 4}, {1, 8193, 2}, {3, 40001, 3}};
  for (const Shape& shape : shapes) {
    for (int32_t dtype = 0; dtype < 3; ++dtype) {
      for (int32_t other = 0; other < 3; ++other) {
        test_euler(shape, dtype, other);
        test_scale(shape, dtype, other);
        test_distances(shape, dtype, other);
        for (float max_ratio : {-1.0f, 0.0f, 0.5f, 100.0f}) test_combine(shape, dtype, other, max_ratio);
        test_ema(shape, dtype, other);
      }
    }
    for (int64_t offset : {int64_t{0}, int64_t{3}, (int64_t{1} << 35) - 5}) {
      test_round(shape, offset);
      for (int32_t dtype = 0; dtype < 2; ++dtype) {
        for (int32_t other = 0; other < 2; ++other) test_adamw(shape, dtype, other, offset);
      }
    }
  }
  test_loss();
  float value = 0;
  test_nothing();
  expect(-1 == leap_ema_update(&value, &value, 0.5f, 1, 3, 0, 1), "unknown dtype", 3, 0, 0);
  expect(-1 == leap_ema_update(&value, &value, 0.5f, 1, 0, -1, 1), "unknown dtype", 0, -1, 0);
  for (int32_t dtype : {LEAP_FLOAT16, LEAP_FLOAT32}) {
    uint8_t code = 0;
    expect(-1 == leap_adamw_8bit_step(&value, &value, &code, &value, &code, &value, &value, &code, &value, &code, 0, 0,
                                      0, 0, 0, 0, 0, 0, 0, 0, 0, 1, dtype, LEAP_FLOAT16, 1), "half", dtype, 0, 0);
  }
  std::printf("%s: %s\n", leap_isa(), failures == 0 ? "passed" : "failed");
  return failures == 0 ? 0 : 1;
}
