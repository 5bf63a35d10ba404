// Sixteen floats at a time, in GCC/Clang vector extensions, and their conversions to and from storage types.
//
// The lane count is the same on every instruction set (a narrower machine splits the vector), so a sum over lanes
// adds in the same order, and gives the same bits, everywhere. Files that include this are compiled once per
// instruction set; the unnamed namespace keeps the linker from sharing one copy between them.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t LANES = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Comparisons give all-ones lanes, so selection is masking.
inline Words select(Words mask, Words yes, Words no) { return (mask & yes) | (~mask & no); }

inline Floats absolute(Floats value) { return bits<Floats>(bits<Words>(value) & 0x7fffffffu); }

struct Float32 {
  using Element = float;
  using Raw = Floats;

  static Floats widen(Floats raw) { return raw; }
  static Floats narrow(Floats value) { return value; }
};

struct BFloat16 {
  using Element = uint16_t;
  using Raw = Halves;

  static Floats widen(Halves raw) { return bits<Floats>(__builtin_convertvector(raw, Words) << 16); }

  // Round to nearest even; NaN becomes the quiet NaN that PyTorch writes.
  static Halves narrow(Floats value) {
    const Words word = bits<Words>(value);
    const Words rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    const Words is_nan = (Words)((word & 0x7fffffffu) > 0x7f800000u);
    return __builtin_convertvector(select(is_nan, (word & 0u) + 0x7fc0u, rounded), Halves);
  }
};

struct Float16 {
  using Element = uint16_t;
  using Raw = Halves;

  // Shift the fields into a float's place and add the difference of the exponent biases (112). Infinity and NaN
  // get it twice. A subnormal is built as 2^-14 * (1 + fraction) and loses its 2^-14 by an exact subtraction.
  static Floats widen(Halves raw) {
    const Words half = __builtin_convertvector(raw, Words);
    const Words sign = (half & 0x8000u) << 16;
    const Words magnitude = (half & 0x7fffu) << 13;
    const Words exponent = half & 0x7c00u;
    const Words bias = (half & 0u) + (112u << 23);
    const Words smallest_normal = bias + (1u << 23);
    const Words normal = magnitude + bias;
    const Words special = normal + bias;
    const Words subnormal =
        bits<Words>(bits<Floats>(magnitude + smallest_normal) - bits<Floats>(smallest_normal));
    const Words finite = select((Words)(exponent == 0u), subnormal, normal);
    return bits<Floats>(sign | select((Words)(exponent == 0x7c00u), special, finite));
  }

  // Round to nearest even. A result below 2^-14 is rounded by adding 0.5, whose last place is a half's 2^-24.
  static Halves narrow(Floats value) {
    const Words word = bits<Words>(value);
    const Words sign = (word >> 16) & 0x8000u;
    const Words magnitude = word & 0x7fffffffu;
    const Words none = word & 0u;
    const Words one_half = none + 0x3f000000u;
    const Words normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const Words subnormal = bits<Words>(bits<Floats>(magnitude) + bits<Floats>(one_half)) - one_half;
    Words result = select((Words)(magnitude < 0x38800000u), subnormal, normal);
    result = select((Words)(magnitude >= 0x477ff000u), none + 0x7c00u, result);
    result = select((Words)(magnitude > 0x7f800000u), none + 0x7e00u, result);
    return __builtin_convertvector(sign | result, Halves);
  }
};

template <class T>
inline typename T::Raw load(const typename T::Element* from) {
  typename T::Raw raw;
  std::memcpy(&raw, from, sizeof(raw));
  return raw;
}

template <class T>
inline void store(typename T::Element* to, typename T::Raw raw) {
  std::memcpy(to, &raw, sizeof(raw));
}

}  // namespace
