// How a kernel goes over its tensors: in blocks, shared out to threads, with sums that do not depend on the threads.
//
// Blocks have a fixed size, whatever the number of threads; each has its own partial sums, and those of a sample are
// added in order afterwards. Compiled once per instruction set, as lanes.h, and bound by the same rules.
#pragma once

#include <cstdlib>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "calls.h"
#include "lanes.h"
#include "leap_native.h"

namespace {

constexpr int64_t BLOCK = 8192;
// Waking a thread costs microseconds: about as much as one thread needs for this many elements.
constexpr int64_t ELEMENTS_PER_THREAD = 4 * BLOCK;
// A result this large would only push everything else out of the caches; writing past them also saves reading the
// lines first.
constexpr int64_t STREAMED_BYTES = int64_t{16} << 20;

inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
inline int64_t larger(int64_t x, int64_t y) { return x > y ? x : y; }

// Calls work(begin, end) for parts of 0 to `count`, one for each thread. A single one is no team of OpenMP, which takes
// as long to call together as a thousand elements.
template <class Work>
inline void in_parts(int64_t count, int64_t threads, Work work) {
#if defined(_OPENMP)
  if (threads > 1) {
#pragma omp parallel num_threads(static_cast<int>(threads))
    {
      const int64_t members = omp_get_num_threads(), member = omp_get_thread_num();
      work(count * member / members, count * (member + 1) / members);
    }
    return;
  }
#endif
  (void)threads;
  work(0, count);
}

struct Block {
  int64_t number, sample, begin, count;
};

class Blocks {
 public:
  explicit Blocks(const Size& size) : size_(size), per_sample_((size.per_sample + BLOCK - 1) / BLOCK) {}

  int64_t count() const { return size_.batch * per_sample_; }

  // Adds up the sums of a sample's blocks, `stride` values apart.
  double sum_of(const double* sums, int64_t sample, int64_t stride) const {
    double total = 0.0;
    for (int64_t block = 0; block < per_sample_; ++block) total += sums[(sample * per_sample_ + block) * stride];
    return total;
  }

  // Calls work(block) for every block of samples first to last.
  template <class Work>
  void for_each(int64_t first, int64_t last, Work work) const {
    const int64_t most = (last - first) * size_.per_sample / ELEMENTS_PER_THREAD;
    // Compiled once, for one thread and for several.
    const auto part = [=, *this](int64_t begin, int64_t end) __attribute__((noinline)) {
      for (int64_t block = first * per_sample_ + begin; block < first * per_sample_ + end; ++block) {
        const int64_t sample = block / per_sample_;
        const int64_t within = (block % per_sample_) * BLOCK;
        work(Block{block, sample, sample * size_.per_sample + within, smaller(BLOCK, size_.per_sample - within)});
      }
#if defined(__x86_64__)
      // Streamed stores keep no order of their own; the other threads must find them.
      _mm_sfence();
#endif
    };
    in_parts((last - first) * per_sample_, smaller(size_.threads, most), part);
  }

  template <class Work>
  void for_each(Work work) const {
    for_each(0, size_.batch, work);
  }

 private:
  Size size_;
  int64_t per_sample_;
};

// Memory for the sums of blocks; null where there is none left.
class Sums {
 public:
  explicit Sums(int64_t count)
      : values_(static_cast<double*>(std::malloc(static_cast<size_t>(count) * sizeof(double)))) {}
  ~Sums() { std::free(values_); }
  Sums(const Sums&) = delete;
  Sums& operator=(const Sums&) = delete;

  double* get() const { return values_; }

 private:
  double* values_;
};

template <class T>
inline const typename T::Element* at(const void* tensor, const Block& block) {
  return static_cast<const typename T::Element*>(tensor) + block.begin;
}

template <class T>
inline typename T::Element* at(void* tensor, const Block& block) {
  return static_cast<typename T::Element*>(tensor) + block.begin;
}

// Whether to stream a block of an output of the given size.
template <class T>
inline bool streamed(const typename T::Element* to, const Size& size) {
  const int64_t bytes = size.batch * size.per_sample * static_cast<int64_t>(sizeof(*to));
  return bytes >= STREAMED_BYTES && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

// Calls body(Storage of `first`, Storage of `second`); -1 if one is no LeapDtype.
template <class Body>
inline int32_t with_dtype(int32_t dtype, Body body) {
  switch (dtype) {
    case LEAP_FLOAT32: return body(Float32{});
    case LEAP_BFLOAT16: return body(BFloat16{});
    case LEAP_FLOAT16: return body(Float16{});
    default: return -1;
  }
}

template <class Body>
inline int32_t with_dtypes(int32_t first, int32_t second, Body body) {
  return with_dtype(first, [&](auto a) {
    return with_dtype(second, [&](auto b) {
      using A = decltype(a);
      using B = decltype(b);
      return body(typename Beside<A, B>::Storage{}, typename Beside<B, A>::Storage{});
    });
  });
}

}  // namespace
