// Philox4x32-7, the counter-based generator of Salmon et al., 2011. Compiled once per instruction set, as lanes.h.
#pragma once

#include "lanes.h"

namespace {

// A 32-bit word of the state sits in the low half of each 64-bit lane, because that is what the processors'
// 32 x 32 -> 64 bit multiplications take; the high half holds anything.
#if defined(__AVX512F__)
constexpr int64_t WIDTH = 8;
#elif defined(__AVX2__)
constexpr int64_t WIDTH = 4;
#else
constexpr int64_t WIDTH = 2;
#endif
typedef uint64_t Longs __attribute__((vector_size(8 * WIDTH)));

constexpr int64_t NUMBERS = 8;  // 16-bit numbers that one counter draws
constexpr int64_t UNROLL = 2;   // independent vectors, which hide the latency of the multiplications

inline Longs multiply(Longs words, uint32_t factor) {
#if defined(__AVX512F__)
  return bits<Longs>(_mm512_mul_epu32(bits<__m512i>(words), _mm512_set1_epi64(factor)));
#elif defined(__AVX2__)
  return bits<Longs>(_mm256_mul_epu32(bits<__m256i>(words), _mm256_set1_epi64x(factor)));
#elif defined(__SSE2__)
  return bits<Longs>(_mm_mul_epu32(bits<__m128i>(words), _mm_set1_epi64x(factor)));
#else
  return (words & 0xffffffffu) * factor;
#endif
}

struct Interleave {
  Longs low, high;
};

// Takes turns between two vectors, within each 128 bits: low has the first 64 of every 128, high the second.
inline Interleave interleave(Longs x, Longs y) {
#if defined(__AVX512F__)
  const __m512i a = bits<__m512i>(x), b = bits<__m512i>(y);
  return {bits<Longs>(_mm512_unpacklo_epi64(a, b)), bits<Longs>(_mm512_unpackhi_epi64(a, b))};
#elif defined(__AVX2__)
  const __m256i a = bits<__m256i>(x), b = bits<__m256i>(y);
  return {bits<Longs>(_mm256_unpacklo_epi64(a, b)), bits<Longs>(_mm256_unpackhi_epi64(a, b))};
#else
  return {Longs{x[0], y[0]}, Longs{x[1], y[1]}};
#endif
}

// Writes the 16 bytes that each of `count` counters draws, from `counter` on: four 32-bit words, little-endian. `count`
// is rounded up to a multiple of UNROLL * WIDTH.
inline void draw(uint64_t seed, uint64_t counter, int64_t count, uint16_t* numbers) {
  Longs first;
  // The order in which `interleave` leaves the counters side by side.
  for (int64_t lane = 0; lane < WIDTH; ++lane) {
    first[lane] = counter + static_cast<uint64_t>(lane / 2 + (lane % 2) * (WIDTH / 2));
  }
  for (int64_t done = 0; done < count; done += UNROLL * WIDTH) {
    Longs c0[UNROLL], c1[UNROLL], c2[UNROLL], c3[UNROLL];
    for (int64_t u = 0; u < UNROLL; ++u) {
      c0[u] = first + static_cast<uint64_t>(done + u * WIDTH);
      c1[u] = c0[u] >> 32;
      c2[u] = c3[u] = Longs{};
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 7; ++round) {
      for (int64_t u = 0; u < UNROLL; ++u) {
        const Longs product0 = multiply(c0[u], 0xD2511F53u), product1 = multiply(c2[u], 0xCD9E8D57u);
        c0[u] = (product1 >> 32) ^ c1[u] ^ static_cast<uint64_t>(key0);
        c1[u] = product1;
        c2[u] = (product0 >> 32) ^ c3[u] ^ static_cast<uint64_t>(key1);
        c3[u] = product0;
      }
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    for (int64_t u = 0; u < UNROLL; ++u) {
      const Interleave words =
          interleave((c0[u] & 0xffffffffu) | (c1[u] << 32), (c2[u] & 0xffffffffu) | (c3[u] << 32));
      std::memcpy(numbers + NUMBERS * (done + u * WIDTH), &words, sizeof(words));
    }
  }
}

// Drawn by the piece, so that reading memory and the arithmetic of the draws overlap.
constexpr int64_t PIECE = 1024;
using Numbers = uint16_t[PIECE + (UNROLL * WIDTH + 1) * NUMBERS];

// Draws the numbers of `count` positions, at most PIECE, from `position` on, and returns where the first one is.
inline const uint16_t* draw(uint64_t seed, int64_t position, int64_t count, Numbers& numbers) {
  const uint64_t first = static_cast<uint64_t>(position);
  const int64_t skip = static_cast<int64_t>(first % NUMBERS);
  draw(seed, first / NUMBERS, (skip + count + NUMBERS - 1) / NUMBERS, &numbers[0]);
  return numbers + skip;
}

}  // namespace
