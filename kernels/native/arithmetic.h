// Thirty-two elements at a time, in GCC/Clang vector extensions: arithmetic on floats.
//
// The number is the same on every instruction set (a narrower machine needs more registers for them), so a sum over
// lanes adds in the same order, and gives the same bits, everywhere. Files that include this are compiled once per
// instruction set: everything here is in an unnamed namespace and calls no inline function of the standard library,
// or the linker could hand an AVX copy to code that must run anywhere.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// One register: compilers keep wider vectors in memory.
#if defined(__AVX512F__)
constexpr int64_t REGISTER = 64;
#elif defined(__AVX2__)
constexpr int64_t REGISTER = 32;
#else
constexpr int64_t REGISTER = 16;
#endif
typedef float Floats __attribute__((vector_size(REGISTER)));
typedef uint32_t Words __attribute__((vector_size(REGISTER)));
typedef uint16_t Halves __attribute__((vector_size(REGISTER / 2)));
typedef int32_t Integers __attribute__((vector_size(REGISTER)));

constexpr int64_t STEP = 32;
constexpr int64_t PARTS = STEP * 4 / REGISTER;

template <class Vector, int64_t COUNT>
struct Parts {
  Vector part[COUNT];
};
using Step = Parts<Floats, PARTS>;

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Words all(uint32_t word) { return Words{} + word; }

// Returns {function(0), function(1), ...}. Unrolled from the start, not by a late pass: or the parts stay in memory.
template <int64_t... P, class Function>
inline auto list(std::integer_sequence<int64_t, P...>, Function function) {
  return Parts<decltype(function(0)), sizeof...(P)>{{function(P)...}};
}

template <int64_t COUNT = PARTS, class Function>
inline auto each(Function function) {
  return list(std::make_integer_sequence<int64_t, COUNT>{}, function);
}

inline Step operator+(const Step& x, const Step& y) {
  return each([&](int64_t p) { return x.part[p] + y.part[p]; });
}
inline Step operator-(const Step& x, const Step& y) {
  return each([&](int64_t p) { return x.part[p] - y.part[p]; });
}
inline Step operator*(const Step& x, const Step& y) {
  return each([&](int64_t p) { return x.part[p] * y.part[p]; });
}
inline Step operator*(const Step& x, float factor) {
  return each([&](int64_t p) { return x.part[p] * factor; });
}
inline Step operator/(const Step& x, const Step& y) {
  return each([&](int64_t p) { return x.part[p] / y.part[p]; });
}
inline Step absolute(const Step& x) {
  return each([&](int64_t p) { return bits<Floats>(bits<Words>(x.part[p]) & 0x7fffffffu); });
}

inline Step all(float value) {
  return each([&](int64_t) { return Floats{} + value; });
}

inline Step square_root(const Step& x) {
  return each([&](int64_t p) {
#if defined(__AVX512F__)
    return bits<Floats>(_mm512_sqrt_ps(bits<__m512>(x.part[p])));
#elif defined(__AVX2__)
    return bits<Floats>(_mm256_sqrt_ps(bits<__m256>(x.part[p])));
#elif defined(__SSE2__)
    return bits<Floats>(_mm_sqrt_ps(bits<__m128>(x.part[p])));
#else
    Floats root;
    for (uint64_t lane = 0; lane < sizeof(root) / 4; ++lane) root[lane] = __builtin_sqrtf(x.part[p][lane]);
    return root;
#endif
  });
}

// x * y + z, rounded once.
inline Step multiply_add(const Step& x, const Step& y, const Step& z) {
  return each([&](int64_t p) {
    const Floats a = x.part[p], b = y.part[p], c = z.part[p];
#if defined(__AVX512F__)
    return bits<Floats>(_mm512_fmadd_ps(bits<__m512>(a), bits<__m512>(b), bits<__m512>(c)));
#elif defined(__FMA__)
    return bits<Floats>(_mm256_fmadd_ps(bits<__m256>(a), bits<__m256>(b), bits<__m256>(c)));
#else
    Floats sum;
    for (uint64_t lane = 0; lane < sizeof(sum) / 4; ++lane) sum[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
    return sum;
#endif
  });
}

inline double sum(const Step& x) {
  float lanes[STEP];
  std::memcpy(lanes, x.part, sizeof(lanes));
  double total = 0.0;
  for (float lane : lanes) total += static_cast<double>(lane);
  return total;
}

}  // namespace
