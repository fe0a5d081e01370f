// Loops of the optimizer (cpu.cpp) for op.cpp. Values below the smallest normal number count as zero: a moment that fades away would
// otherwise end as a denormal number, which rounding never lets go and which slows processors down a hundredfold.
#pragma once
#include <stdint.h>

namespace adamw {

// A piece of a parameter: `master` and the moments are fp32; gradient bf16 or fp32; `rounded` is the bf16 parameter, or null.
struct Piece {
  float *master, *exp_avg, *exp_avg_sq;
  const void* grad;
  void* rounded;
  int64_t count;
  bool bf16_grad;
};

// What is the same for a whole parameter. keep = 1 - lr * weight decay; scale multiplies the gradient.
struct Rates {
  // rest = 1 - beta, step = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t)
  float keep, beta1, rest1, beta2, rest2, step, root, eps, scale;
};

struct Kernels {
  void (*update)(const Piece&, const Rates&);
  double (*sum_of_squares)(const void* grad, bool is_bf16, int64_t count);
};

Kernels kernels_plain();
Kernels kernels_avx2();
Kernels kernels_avx512();

}  // namespace adamw
