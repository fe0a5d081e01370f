// Loops of the elementwise parts of a block (cpu.cpp) for op.cpp. Rows are tokens, all batch rows after one another; every loop takes rows
// begin .. end - 1. All arrays have the element type of the kernels; gradients of parameters are added to `sums`, fp32, a row of C each.
#pragma once
#include <stdint.h>

namespace fused {

constexpr int kMost = 8;  // blends of one token_mix

// out[j] = x + (x of the token before - x) * mix[j]
struct TokenMix {
  int64_t T, C, n;
  const void *x, *last;  // last [B, C]: the tokens before the first ones; null: zeros
  const void* mix[kMost];
  void* out[kMost];
  const void* dout[kMost];
  void *dx, *dlast;  // dlast null: not wanted
};

// What lies between the projections and the wkv7 operator; rwkvlm/ops/fused/reference.py has the formulas.
struct Prepare {
  int64_t C, N;
  const void *w_low, *k, *a_low, *v, *v_first, *v_low;  // v_first null: no value residual
  const void *w0, *k_k, *k_a, *a0, *v0;
  void *w, *k_out, *v_out, *a, *b;
  const void *dw, *dk_out, *dv_out, *da, *db;
  const void* more_dv_first;  // what other uses of v_first have given, which dv_first then includes; null: nothing
  void *dk, *da_low, *dv, *dv_first, *dv_low;
  enum Sum { w0_sum, k_k_sum, k_a_sum, a0_sum, v0_sum, sums };
};

// What lies between the operator and the output projection.
struct Finish {
  int64_t C, N;
  float eps;
  const void *y, *r, *k, *v, *g;
  const void *weight, *bias, *r_k;
  void* out;
  const void* dout;
  void *dy, *dr, *dk, *dv, *dg;
  enum Sum { weight_sum, bias_sum, r_k_sum, sums };
};

struct Kernels {
  void (*token_mix)(const TokenMix&, int64_t begin, int64_t end);
  void (*token_mix_backward)(const TokenMix&, int64_t begin, int64_t end, float* sums);
  void (*prepare)(const Prepare&, int64_t begin, int64_t end);
  void (*prepare_backward)(const Prepare&, int64_t begin, int64_t end, float* sums);
  void (*finish)(const Finish&, int64_t begin, int64_t end);
  void (*finish_backward)(const Finish&, int64_t begin, int64_t end, float* sums);
  void (*relu_square)(const void* x, void* y, int64_t count);
  void (*relu_square_backward)(const void* dy, const void* y, void* dx, int64_t count);
  void (*collect)(const float* parts, int64_t count, int64_t stride, int64_t n, void* to);  // to[i] = sum of parts[j * stride + i] over j
};

Kernels kernels_plain(bool is_bf16);
Kernels kernels_avx2(bool is_bf16);
Kernels kernels_avx512(bool is_bf16);

}  // namespace fused
