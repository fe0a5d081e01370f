// The face of the WKV4 CPU kernels towards op.cpp. A state is three rows of C numbers: numerator and denominator, both
// in units of exp(p), and p.
#pragma once
#include <stdint.h>

namespace wkv4 {

constexpr int kCheckpoint = 32;  // tokens from one saved state to the next
// Channels of one task: whole lines of the cache. Fixed, so that the bits do not depend on the number of threads.
constexpr int kStrip = 64;

// Channels begin .. end - 1 of one sequence: a multiple of 16. All pointers are to the sequence's first element.
struct Task {
  int64_t T, C, begin, end;
  const float *w, *u;    // [C]: logarithm of the decay, bonus
  const void *k, *v;     // [T, C]
  const float* initial;  // [3, C]; null: nothing seen yet
  void* y;
  float* final;          // [3, C]
  float* checkpoints;    // states before tokens 0, 32, 64, ..., [3, C] each; null: save nothing
  const void* dy;
  const float* d_final;  // [3, C]: gradients of numerator and denominator, and of the exponent what is not through these; null: zeros
  void *dk, *dv;
  float *dw, *du;        // [C]: of this sequence
  float* d_initial;      // [3, C]
};

struct Kernels {
  void (*forward)(const Task&);
  void (*backward)(const Task&);
  void (*collect)(const float* parts, int64_t count, int64_t n, float* to);  // to[i] = sum of parts[j * n + i] over j; n a multiple of 16
};

Kernels kernels_plain(bool is_bf16);
Kernels kernels_avx2(bool is_bf16);
Kernels kernels_avx512(bool is_bf16);

}  // namespace wkv4
