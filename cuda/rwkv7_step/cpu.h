// The face of the SIMD parts of the single-token step towards step.cpp. All activations and vectors are float.
#pragma once
#include <stdint.h>

namespace rwkv7_step {

// A row-major matrix of float or bf16, after Kernels' element type.
struct Matrix {
  const void* data;
  int64_t rows, columns;
};

// The [C] vectors of a block; the order is that of VECTORS in rwkvlm/ops/rwkv7_step.py.
struct Vectors {
  const float *ln1_weight, *ln1_bias, *x_r, *x_w, *x_k, *x_v, *x_a, *x_g, *w0, *a0, *v0, *k_k, *k_a, *r_k, *ln_x_weight, *ln_x_bias,
      *ln2_weight, *ln2_bias, *ffn_x_k;
};

// What one head of time mixing reads and writes.
struct Head {
  int64_t size, first;                 // channels, and the first of them
  const Vectors* vectors;
  Matrix w2, a2, v2, g2;               // [C, rank]
  const float *w1, *a1, *v1, *g1;      // [rank], after their activations; v1 null: no value residual
  const float *r, *k, *v;              // [C]
  float* v_first;                      // [C], written where v1 is null
  const float* state;                  // [N, N] before the token
  float *next, *out;                   // [N, N] after it; [C] what the output matrix reads
};

struct Kernels {
  // y[i] = row first + i of the matrix times x, up to row last - 1.
  void (*multiply)(const Matrix&, const float* x, float* y, int64_t first, int64_t last);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float* y, int64_t channels);
  // y = x + (last - x) * mix
  void (*blend)(const float* x, const float* last, const float* mix, float* y, int64_t channels);
  void (*head)(const Head&);
};

constexpr int64_t kMaxHead = 128;

Kernels kernels_plain(bool is_bf16);
Kernels kernels_avx2(bool is_bf16);
Kernels kernels_avx512(bool is_bf16);

}  // namespace rwkv7_step
