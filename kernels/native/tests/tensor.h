// What the tests of the C interface share: tensors, and how near a result has to be.
//
// Buffers have exactly the size they need, on addresses that are odd multiples of an element: a sanitizer build sees
// every step outside them.
#pragma once

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

struct Shape {
  int64_t batch, per_sample;
  int32_t threads;
  int64_t count() const { return batch * per_sample; }
};

const Shape SHAPES[] = {{1, 1, 1}, {3, 31, 1}, {2, 33, 4}, {1, 8193, 2}, {3, 40001, 3}};

int report() {
  std::printf("%s: %s\n", leap_isa(), failures == 0 ? "passed" : "failed");
  return failures == 0 ? 0 : 1;
}

}  // namespace
