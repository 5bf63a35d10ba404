#include "isa.h"

#include <cstdlib>
#include <string>

#include "leap_native.h"

namespace {

Isa detect() {
#if defined(__x86_64__)
  const char* asked = std::getenv("LEAP_NATIVE_ISA");
  const std::string cap = asked == nullptr ? "avx512" : asked;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && cap == "avx512") return Isa::avx512;
  if (avx2 && cap != "baseline") return Isa::avx2;
#endif
  return Isa::baseline;
}

}  // namespace

Isa leap_isa_in_use() {
  static const Isa isa = detect();
  return isa;
}

int32_t leap_abi() { return LEAP_ABI; }

const char* leap_isa() {
  switch (leap_isa_in_use()) {
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "baseline";
  }
}

int32_t leap_has_openmp() {
#if defined(_OPENMP)
  return 1;
#else
  return 0;
#endif
}
