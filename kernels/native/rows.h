// What kernels over rows (batch, rows, width) share: how rows go to threads, vectors of a sample that all its rows
// read, and sums over rows. Compiled once per instruction set, as lanes.h, and bound by the same rules.
//
// Sums over rows are made of fixed strips of rows, added in order, so they do not depend on the threads.
#pragma once

#include <type_traits>

#include "blocks.h"

namespace {

// Rows of a strip: their sums are kept in registers, and are written once.
constexpr int64_t STRIP = 16;
// Columns that are added up at a time.
constexpr int64_t COLUMNS = 8 * STEP;

inline int64_t steps_of(int64_t width) { return (width + STEP - 1) / STEP; }

// Calls work(i) for all i below `count`, each of `elements` elements.
template <class Work>
inline void share(int64_t count, int64_t elements, int32_t most, Work work) {
  in_parts(count, smaller(most, count * elements / ELEMENTS_PER_THREAD),
           [=](int64_t begin, int64_t end) __attribute__((noinline)) {
             for (int64_t i = begin; i < end; ++i) work(i);
           });
}

// Storage of tensors of one dtype, where no other takes part.
template <class Body>
inline int32_t with_storage(int32_t dtype, Body body) {
  return with_dtype(dtype, [&](auto format) {
    using F = decltype(format);
    return body(typename Beside<F, F>::Storage{});
  });
}

template <class T, class Void>
inline auto row_of(Void* tensor, int64_t stride, int64_t row) {
  using Element = typename T::Element;
  using Pointer = std::conditional_t<std::is_const_v<Void>, const Element*, Element*>;
  return static_cast<Pointer>(tensor) + row * stride;
}

// The lane that holds element i of a step of storage T.
template <class T>
inline int64_t lane(int64_t i) {
  if constexpr (std::is_same_v<T, Interleaved>) return (i & 1) * (STEP / 2) + i / 2;
  return i;
}

// Keeps the elements of a row, and sets to zero what pads its last step.
template <class T, class Extent>
inline Step inside(const Step& value, Extent extent) {
  if constexpr (std::is_same_v<Extent, Part>) {
    float ones[STEP] = {};
    for (int64_t i = 0; i < extent.count; ++i) ones[lane<T>(i)] = 1.0f;
    return value * load<Float32>(ones, Whole{});
  }
  return value;
}

// Adds up the lanes: halves fold onto each other, in the same order everywhere.
inline float fold(const Step& x) {
  float lanes[STEP];
  std::memcpy(lanes, x.part, sizeof(lanes));
#pragma GCC unroll 5
  for (int64_t half = STEP / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  }
  return lanes[0];
}

// Memory for floats; null where there is none left.
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : values_(static_cast<float*>(std::malloc(static_cast<size_t>(count) * sizeof(float)))) {}
  ~Scratch() { std::free(values_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* get() const { return values_; }

 private:
  float* values_;
};

// Writes `plus` + vector as floats, in the order of the lanes of storage T, padded with zeros to full steps.
template <class T>
inline int32_t widen_vector(const void* vector, int32_t dtype, int64_t width, float plus, float* to) {
  return with_dtype(dtype, [&](auto format) {
    using V = typename Beside<decltype(format), Float32>::Storage;
    const auto* from = static_cast<const typename V::Element*>(vector);
    sweep(width, false, [=](int64_t i, auto extent) {
      float in_order[STEP];
      store<Float32>(in_order, inside<V>(load<V>(from + i, extent) + all(plus), extent), Whole{});
      for (int64_t k = 0; k < STEP; ++k) to[i + lane<T>(k)] = in_order[k];
    });
    return 0;
  });
}

// The vectors of all samples, `stride` elements apart, likewise.
template <class T>
inline int32_t widen_vectors(const void* vectors, int64_t stride, int32_t dtype, int64_t batch, int64_t width,
                             float plus, float* to) {
  int32_t status = 0;
  const int64_t bytes = dtype == LEAP_FLOAT32 ? 4 : 2;
  for (int64_t sample = 0; sample < batch && status == 0; ++sample) {
    const char* from = static_cast<const char*>(vectors) + sample * stride * bytes;
    status = widen_vector<T>(from, dtype, width, plus, to + sample * steps_of(width) * STEP);
  }
  return status;
}

// Adds up the sums of a sample's `strips`, which are `pitch` floats apart, and writes them as a vector of `dtype` for
// each sample.
template <class T>
inline int32_t add_strips(const float* sums, int64_t strips, int64_t pitch, int64_t batch, int64_t width,
                          int32_t threads, void* out, int32_t dtype) {
  return with_dtype(dtype, [&](auto format) {
    using V = typename Beside<decltype(format), Float32>::Storage;
    const int64_t chunks = (width + COLUMNS - 1) / COLUMNS;
    share(batch * chunks, strips * COLUMNS, threads, [=](int64_t chunk) {
      const int64_t sample = chunk / chunks, begin = chunk % chunks * COLUMNS;
      const float* from = sums + sample * strips * pitch + begin;
      auto* to = static_cast<typename V::Element*>(out) + sample * width + begin;
      sweep(smaller(COLUMNS, width - begin), false, [=](int64_t i, auto extent) {
        Step total{};
        for (int64_t strip = 0; strip < strips; ++strip) {
          total = total + load<Float32>(from + strip * pitch + i, Whole{});
        }
        float lanes[STEP], in_order[STEP];
        store<Float32>(lanes, total, Whole{});
        for (int64_t k = 0; k < STEP; ++k) in_order[k] = lanes[lane<T>(k)];
        store<V>(to + i, load<Float32>(in_order, Whole{}), extent);
      });
    });
    return 0;
  });
}

}  // namespace
