// The inner loops of leap_update over one block of elements, compiled once per instruction set.
#pragma once

#include <cstdint>

struct LeapUpdateBlocks {
  // Writes xhat or, where target is not null, target to out, and returns the block's sum of |target - xhat| (0
  // without a target). Elements begin to begin + count.
  double (*forward)(const void* x, const void* velocity, const void* target, void* out, int64_t begin,
                    int64_t count, float delta);
  // Writes -delta * grad to out.
  void (*backward)(const void* grad, void* out, int64_t begin, int64_t count, float delta);
};

// One entry per LeapDtype.
extern const LeapUpdateBlocks leap_update_baseline[3];
#if defined(__x86_64__)
extern const LeapUpdateBlocks leap_update_avx2[3];
extern const LeapUpdateBlocks leap_update_avx512[3];
#endif
