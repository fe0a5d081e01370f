// The face of the WKV7 CPU kernels towards op.cpp. Layouts: tokens [rows, H, N], states [slot, H, N, N] (value rows, key columns).
#pragma once
#include <stdint.h>

namespace wkv7 {

constexpr int kCheckpoint = 64;  // tokens from one saved state to the next

// One head of one document. Its tokens are rows first .. first + length - 1 of the [rows, H, N] tensors.
struct Task {
  int64_t first, length, head, heads;
  const float* initial;  // state before the first token, [N, N]; null: zeros
  float* final;          // state after the last token, [N, N]
  float* checkpoints;    // states before tokens 0, 64, 128, ...: [H, N, N] a slot, from this document's first slot; null: save nothing
  const float* d_final;  // gradient of `final`; null: zeros
  float* d_initial;      // gradient of `initial`; null: not wanted
};

// Data pointers of whole tensors; the element type is float or bf16, `removed` (S_{t-1} a_t) is always float.
struct Tensors {
  const void *r, *w, *k, *v, *a, *b;
  void* y;
  float* removed;  // written by the forward when it saves, read by the backward
  const void* dy;
  void *dr, *dw, *dk, *dv, *da, *db;
};

struct Kernels {
  void (*forward)(const Task&, const Tensors&, void* scratch);
  void (*backward)(const Task&, const Tensors&, void* scratch);
  int64_t forward_scratch, backward_scratch;  // bytes, aligned to 64
};

// The kernels for one head size and element type; all null for a head size that is none of 16, 32, 64, 128.
Kernels kernels_plain(int64_t head_size, bool is_bf16);
Kernels kernels_avx2(int64_t head_size, bool is_bf16);
Kernels kernels_avx512(int64_t head_size, bool is_bf16);

}  // namespace wkv7
