// How thirty-two elements are loaded from and stored to float, bfloat16 and half, and loops over a run of them. Compiled
// once per instruction set, as arithmetic.h, and bound by the same rules.
#pragma once

#include "arithmetic.h"

namespace {

// ---- sixteen-bit formats ---------------------------------------------------------------------------------------

struct BFloat16 {
  static Floats widen(Halves halves) { return bits<Floats>(__builtin_convertvector(halves, Words) << 16); }
  static Halves narrow(Floats value) { return __builtin_convertvector(rounded(value) >> 16, Halves); }

  // Rounds to nearest even, into the upper half. NaN becomes the quiet NaN that PyTorch writes.
  static Words rounded(Floats value) {
    const Words word = bits<Words>(value);
    const Words nearest = word + 0x7fffu + ((word >> 16) & 1u);
    return value == value ? nearest : all(0x7fc00000u);
  }

  // Adds a random number below the cut and keeps what is above it. What would carry into an infinite exponent is cut
  // without it: so infinity stays, and a finite value stays finite. NaN stays by its quiet bit.
  static Halves round_off(Floats value, Halves random) {
    const Words word = bits<Words>(value);
    const Words rounded = word + __builtin_convertvector(random, Words);
    const Words kept = (rounded & 0x7f800000u) == 0x7f800000u ? word : rounded;
    return __builtin_convertvector((value == value ? kept : word | 0x400000u) >> 16, Halves);
  }
};

struct Float16 {
  // Every processor with AVX2 converts halves itself.
#if defined(__AVX512F__)
  static Floats widen(Halves halves) { return bits<Floats>(_mm512_cvtph_ps(bits<__m256i>(halves))); }
  static Halves nearest(Floats value) { return bits<Halves>(_mm512_cvtps_ph(bits<__m512>(value), 0)); }
#elif defined(__F16C__)
  static Floats widen(Halves halves) { return bits<Floats>(_mm256_cvtph_ps(bits<__m128i>(halves))); }
  static Halves nearest(Floats value) { return bits<Halves>(_mm256_cvtps_ph(bits<__m256>(value), 0)); }
#else
  // Shift the fields into a float's place and add the difference of the exponent biases (112). Infinity and NaN
  // get it twice. A subnormal is built as 2^-14 * (1 + fraction) and loses its 2^-14 by an exact subtraction.
  static Floats widen(Halves halves) {
    const Words half = __builtin_convertvector(halves, Words);
    const Words bias = all(112u << 23);
    const Words smallest_normal = bias + (1u << 23);
    const Words magnitude = (half & 0x7fffu) << 13;
    const Words exponent = half & 0x7c00u;
    const Words normal = magnitude + bias;
    const Words subnormal =
        bits<Words>(bits<Floats>(magnitude + smallest_normal) - bits<Floats>(smallest_normal));
    const Words finite = exponent == 0u ? subnormal : normal;
    return bits<Floats>(((half & 0x8000u) << 16) | (exponent == 0x7c00u ? normal + bias : finite));
  }

  // Rounds to nearest even. A result below 2^-14 is rounded by adding 0.5, whose last place is a half's 2^-24.
  static Halves nearest(Floats value) {
    const Words word = bits<Words>(value);
    const Words magnitude = word & 0x7fffffffu;
    const Words one_half = all(0x3f000000u);
    const Words normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const Words subnormal = bits<Words>(bits<Floats>(magnitude) + bits<Floats>(one_half)) - one_half;
    const Words finite = magnitude < 0x38800000u ? subnormal : normal;
    const Words half = ((word >> 16) & 0x8000u) | (magnitude >= 0x477ff000u ? all(0x7c00u) : finite);
    return __builtin_convertvector(half, Halves);
  }
#endif

  // The same NaN on every instruction set.
  static Halves narrow(Floats value) {
    const Halves is_nan = __builtin_convertvector((Words)(value != value), Halves);
    return (nearest(value) & ~is_nan) | (is_nan & 0x7e00u);
  }
};

// ---- storage: a step in memory ---------------------------------------------------------------------------------

struct Float32 {
  using Element = float;
  using Raw = Step;

  static Step widen(const Raw& raw) { return raw; }
  static Raw narrow(const Step& value) { return value; }
};

// Element after element, as Float32.
template <class Format>
struct InOrder {
  using Element = uint16_t;
  using Raw = Parts<Halves, PARTS>;

  static Step widen(const Raw& raw) {
    return each([&](int64_t p) { return Format::widen(raw.part[p]); });
  }
  static Raw narrow(const Step& value) {
    return each([&](int64_t p) { return Format::narrow(value.part[p]); });
  }
};

using Brain = InOrder<BFloat16>;

// bfloat16 with the even elements in the first half of the registers and the odd ones in the second: no lane moves,
// which is what the conversion of InOrder waits for.
struct Interleaved {
  using Element = uint16_t;
  using Raw = Parts<Words, PARTS / 2>;

  static Step widen(const Raw& raw) {
    return each([&](int64_t p) {
      return bits<Floats>(p < PARTS / 2 ? raw.part[p] << 16 : raw.part[p - PARTS / 2] & 0xffff0000u);
    });
  }
  static Raw narrow(const Step& value) {
    return each<PARTS / 2>([&](int64_t p) {
      const Words even = BFloat16::rounded(value.part[p]), odd = BFloat16::rounded(value.part[PARTS / 2 + p]);
      return (even >> 16) | (odd & 0xffff0000u);
    });
  }
};

// How tensors of format `A` are stored in an operation that also has tensors of `B`: both need the same order.
template <class A, class B>
struct Beside {
  using Storage = InOrder<A>;
};
template <class B>
struct Beside<Float32, B> {
  using Storage = Float32;
};
template <>
struct Beside<BFloat16, BFloat16> {
  using Storage = Interleaved;
};

// ---- loops over a run of elements ------------------------------------------------------------------------------

template <class Vector>
inline void stream(void* to, Vector vector) {
#if defined(__AVX512F__)
  if constexpr (sizeof(vector) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), bits<__m512i>(vector));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(vector) == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), bits<__m256i>(vector));
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(vector) == 16) return _mm_stream_si128(static_cast<__m128i*>(to), bits<__m128i>(vector));
  if constexpr (sizeof(vector) == 8) return _mm_stream_si64(static_cast<long long*>(to), bits<long long>(vector));
#endif
  std::memcpy(to, &vector, sizeof(vector));
}

// A full step.
struct Whole {
  template <class Vector, int64_t COUNT>
  void read(const void* from, Parts<Vector, COUNT>& raw) const {
    raw = each<COUNT>([from](int64_t p) {
      Vector vector;
      std::memcpy(&vector, static_cast<const char*>(from) + p * sizeof(vector), sizeof(vector));
      return vector;
    });
  }
  template <class Vector, int64_t COUNT>
  void write(void* to, const Parts<Vector, COUNT>& raw) const {
    char* bytes = static_cast<char*>(to);
    each<COUNT>([&](int64_t p) { return std::memcpy(bytes + p * sizeof(Vector), &raw.part[p], sizeof(Vector)); });
  }
};

// A full step, written past the caches, to an address aligned to 64 bytes.
struct Streamed : Whole {
  template <class Vector, int64_t COUNT>
  void write(void* to, const Parts<Vector, COUNT>& raw) const {
    char* bytes = static_cast<char*>(to);
    each<COUNT>([&](int64_t p) { return stream(bytes + p * sizeof(Vector), raw.part[p]), 0; });
  }
};

// The first `count` elements of a step. What is read is padded with zeros, which add nothing to a sum.
struct Part {
  int64_t count;

#if defined(__AVX512BW__) && defined(__AVX512VL__)
  // Registers are read and written under a mask: through memory, a load would wait for the stores before it.
  template <class Vector, int64_t COUNT>
  void read(const void* from, Parts<Vector, COUNT>& raw) const {
    const char* bytes = static_cast<const char*>(from);
    raw = each<COUNT>([&](int64_t p) {
      const uint32_t mask = halves_in<Vector, COUNT>(p);
      const char* at = bytes + p * static_cast<int64_t>(sizeof(Vector));
      if constexpr (sizeof(Vector) == 64) return bits<Vector>(_mm512_maskz_loadu_epi16(mask, at));
      if constexpr (sizeof(Vector) == 32) {
        return bits<Vector>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), at));
      }
    });
  }
  template <class Vector, int64_t COUNT>
  void write(void* to, const Parts<Vector, COUNT>& raw) const {
    char* bytes = static_cast<char*>(to);
    each<COUNT>([&](int64_t p) {
      const uint32_t mask = halves_in<Vector, COUNT>(p);
      char* at = bytes + p * static_cast<int64_t>(sizeof(Vector));
      if constexpr (sizeof(Vector) == 64) _mm512_mask_storeu_epi16(at, mask, bits<__m512i>(raw.part[p]));
      if constexpr (sizeof(Vector) == 32) {
        _mm256_mask_storeu_epi16(at, static_cast<__mmask16>(mask), bits<__m256i>(raw.part[p]));
      }
      return 0;
    });
  }

 private:
  // A bit for every two bytes of register p that belong to the elements.
  template <class Vector, int64_t COUNT>
  uint32_t halves_in(int64_t p) const {
    constexpr int64_t HALVES = static_cast<int64_t>(sizeof(Vector)) / 2;
    static_assert(HALVES * COUNT % STEP == 0, "elements of two bytes or more");
    const int64_t there = count * (HALVES * COUNT / STEP) - p * HALVES;
    const int64_t within = there < 0 ? 0 : there > HALVES ? HALVES : there;
    return static_cast<uint32_t>((uint64_t{1} << within) - 1);
  }
#else
  template <class Raw>
  void read(const void* from, Raw& raw) const {
    char padded[sizeof(raw)] = {};
    std::memcpy(padded, from, sizeof(raw) / STEP * static_cast<uint64_t>(count));
    Whole{}.read(padded, raw);
  }
  template <class Raw>
  void write(void* to, const Raw& raw) const {
    char padded[sizeof(raw)];
    Whole{}.write(padded, raw);
    std::memcpy(to, padded, sizeof(raw) / STEP * static_cast<uint64_t>(count));
  }
#endif
};

template <class T, class Extent>
inline typename T::Raw read(const typename T::Element* from, Extent extent) {
  typename T::Raw raw;
  extent.read(from, raw);
  return raw;
}

template <class T, class Extent>
inline Step load(const typename T::Element* from, Extent extent) {
  return T::widen(read<T>(from, extent));
}

template <class T, class Extent>
inline void store(typename T::Element* to, const Step& value, Extent extent) {
  extent.write(to, T::narrow(value));
}

// Rounds to bfloat16 by the numbers at `random`, one for each element.
template <class Extent>
inline void store_rounded_off(uint16_t* to, const Step& value, const uint16_t* random, Extent extent) {
  const Brain::Raw numbers = read<Brain>(random, extent);
  extent.write(to, each([&](int64_t p) { return BFloat16::round_off(value.part[p], numbers.part[p]); }));
}

// Calls body(first element of the step, its extent) for all steps of `count` elements.
template <class Body>
[[gnu::flatten]] inline void sweep(int64_t count, bool streamed, Body body) {
  int64_t i = 0;
  if (streamed) {
    for (; i + STEP <= count; i += STEP) body(i, Streamed{});
  } else {
    for (; i + STEP <= count; i += STEP) body(i, Whole{});
  }
  if (i < count) body(i, Part{count - i});
}

}  // namespace
