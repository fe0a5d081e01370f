// Which build of a SIMD source runs. native.py compiles every cpu.cpp once per instruction set, with ISA defined as
// plain, avx2 or avx512 (only plain where the machine is not x86-64); the choice is made at run time, so that a cache
// directory shared between machines never meets an illegal instruction.
#pragma once
#include <stdint.h>

#include <atomic>

namespace isa {

enum Level : int { plain = 0, avx2 = 1, avx512 = 2 };

inline Level of_this_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2;
#endif
  return plain;
}

// The level in use; a test lowers it to reach the other builds.
inline std::atomic<int>& level() {
  static std::atomic<int> in_use{of_this_machine()};
  return in_use;
}

// For the operators NAME_limit_isa, by which tests do this.
inline int64_t limit_level(int64_t limit) {
  const int best = of_this_machine();
  return level() = limit < best ? int(limit) : best;
}

}  // namespace isa

// name_plain, name_avx2 or name_avx512 (KERNELS_OF in simd.h), whichever is in use, called with the arguments that follow.
#if defined(__x86_64__)
#define OF_ISA_IN_USE(name, ...)                                  \
  (isa::level() == isa::avx512 ? name##_avx512(__VA_ARGS__)       \
   : isa::level() == isa::avx2 ? name##_avx2(__VA_ARGS__)         \
                               : name##_plain(__VA_ARGS__))
#else
#define OF_ISA_IN_USE(name, ...) name##_plain(__VA_ARGS__)
#endif
