// SIMD loops of the head and its loss (cpu.cpp), one set for each element type, for head_ce.cpp.
//
// A "unit" is 32 bits: one fp32, or two bf16 that stand next to each other in the inner dimension of a matrix product. In units
// both types look alike: a right operand [depth, columns] is packed as [depth / pair, columns] units, pair = 1 or 2.
#pragma once
#include <stdint.h>

namespace loss {

// Per token, over the rows seen so far: sum of e, largest logit, and its row.
struct Totals {
  float* sum;
  float* top;
  int32_t* top_row;
};

// Logits [rows, width], row `row` of the vocabulary first.
struct Logits {
  const float* data;
  int64_t stride, row, rows, width;
  const float* m;    // [width]
  const char* ahead; // memory that will be needed next, fetched on the way
  int64_t ahead_bytes;
};

struct Kernels {
  // The transpose of [rows, columns] units.
  void (*transpose)(const void* from, int64_t from_stride, int64_t rows, int64_t columns, void* to, int64_t to_stride);
  // to [columns, rows] = the transpose of from [rows, columns], elements; an odd last row of bf16 is followed by zeros. Strides in units.
  void (*turn)(const void* from, int64_t rows, int64_t columns, void* to, int64_t to_stride);
  // e = exp(logits - m), added to `totals`, and written as a right operand [rows / pair, width] unless e is null.
  void (*softmax)(const Logits&, Totals totals, void* e);
  // The right operand's [rows / 2, width] of bf16 as a left operand [rows, width].
  void (*split)(const uint32_t* e, int64_t rows, int64_t width, void* to);
  // to [W, columns]: to[i][c] = scale[i] * the sum over the parts of from[part][c][i], for W tokens i.
  void (*collect)(const float* from, int64_t parts, int64_t part_stride, int64_t columns, int64_t width, const float* scale, float* to);
  // The right operand's rows of x * scale, two for bf16; `count` of them exist, the others are zero.
  void (*scale_rows)(const void* x, int64_t count, int64_t columns, const float* scale, void* to);
  void (*add_scaled)(float* to, const void* from, float factor, int64_t n);
  float (*dot)(const void* a, const void* b, int64_t n);
  void (*narrow)(const float* from, void* to, int64_t n);
  int64_t lanes; // W
};

Kernels kernels_plain(bool is_bf16);
Kernels kernels_avx2(bool is_bf16);
Kernels kernels_avx512(bool is_bf16);

}  // namespace loss
