// Test of leap_adamw_8bit_step without Python, in every pair of formats, against a plain loop in double.

#include "tensor.h"

namespace {

// A map of even steps from `lowest` to 1, and the table of the nearest entries.
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
  for (const Shape& shape : SHAPES) {
    for (int32_t dtype = 0; dtype < 2; ++dtype) {
      for (int32_t other = 0; other < 2; ++other) {
        for (int64_t offset : {int64_t{0}, int64_t{3}, (int64_t{1} << 35) - 5}) {
          test_adamw(shape, dtype, other, offset);
        }
      }
    }
  }
  for (int32_t dtype : {LEAP_FLOAT16, LEAP_FLOAT32}) {
    float value = 0;
    uint8_t code = 0;
    expect(-1 == leap_adamw_8bit_step(&value, &value, &code, &value, &code, &value, &value, &code, &value, &code, 0, 0,
                                      0, 0, 0, 0, 0, 0, 0, 0, 0, 1, dtype, LEAP_FLOAT16, 1), "half", dtype, 0, 0);
  }
  return report();
}
