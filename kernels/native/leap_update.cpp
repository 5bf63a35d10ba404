// leap_update over whole tensors: cuts them into blocks, shares the blocks out to threads, adds up the distances.
//
// Blocks have a fixed size, whatever the number of threads; each has its own partial sum, and those of a sample are
// added in order afterwards. So a distance has the same bits on any thread count.

#include <algorithm>
#include <memory>
#include <new>

#include "isa.h"
#include "leap_native.h"
#include "leap_update_blocks.h"

namespace {

constexpr int64_t BLOCK = 8192;

struct Shape {
  int64_t batch, per_sample, blocks;
  int threads;

  Shape(int64_t batch_, int64_t per_sample_, int32_t threads_)
      : batch(batch_), per_sample(per_sample_), blocks((per_sample_ + BLOCK - 1) / BLOCK),
        threads(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads_, batch_ * blocks)))) {}
};

// Calls work(block number, sample, first element in the tensor, count) for every block.
template <class Work>
void for_each_block(const Shape& shape, Work work) {
#pragma omp parallel for schedule(static) num_threads(shape.threads) if (shape.threads > 1)
  for (int64_t block = 0; block < shape.batch * shape.blocks; ++block) {
    const int64_t sample = block / shape.blocks;
    const int64_t within = (block % shape.blocks) * BLOCK;
    work(block, sample, sample * shape.per_sample + within, std::min(BLOCK, shape.per_sample - within));
  }
}

const LeapUpdateBlocks* blocks_for(int32_t dtype) {
  if (dtype < 0 || dtype > 2) return nullptr;
#if defined(__x86_64__)
  if (leap_isa_in_use() == Isa::avx512) return &leap_update_avx512[dtype];
  if (leap_isa_in_use() == Isa::avx2) return &leap_update_avx2[dtype];
#endif
  return &leap_update_baseline[dtype];
}

}  // namespace

int32_t leap_update_forward(const void* x, const void* velocity, const void* target, const float* delta, void* out,
                            float* distance, int64_t batch, int64_t per_sample, int32_t dtype, int32_t threads) {
  const LeapUpdateBlocks* inner = blocks_for(dtype);
  if (inner == nullptr) return -1;
  const Shape shape(batch, per_sample, threads);
  std::unique_ptr<double[]> partial(new (std::nothrow) double[static_cast<size_t>(batch * shape.blocks)]);
  if (!partial) return -2;
  for_each_block(shape, [&](int64_t block, int64_t sample, int64_t begin, int64_t count) {
    partial[block] = inner->forward(x, velocity, target, out, begin, count, delta[sample]);
  });
  for (int64_t sample = 0; target != nullptr && sample < batch; ++sample) {
    double sum = 0.0;
    for (int64_t block = 0; block < shape.blocks; ++block) sum += partial[sample * shape.blocks + block];
    distance[sample] = static_cast<float>(sum / static_cast<double>(per_sample));
  }
  return 0;
}

int32_t leap_update_backward(const void* grad, const float* delta, void* grad_velocity, int64_t batch,
                             int64_t per_sample, int32_t dtype, int32_t threads) {
  const LeapUpdateBlocks* inner = blocks_for(dtype);
  if (inner == nullptr) return -1;
  for_each_block(Shape(batch, per_sample, threads), [&](int64_t, int64_t sample, int64_t begin, int64_t count) {
    inner->backward(grad, grad_velocity, begin, count, delta[sample]);
  });
  return 0;
}
