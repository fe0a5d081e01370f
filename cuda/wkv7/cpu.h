// The face of the WKV7 CPU kernels towards op.cpp. Layouts: tokens [rows, H, N], states [slot, H, N, N] (value rows, key columns).
#pragma once
#include <stdint.h>

namespace wkv7 {

constexpr int kCheckpoint = 64;  // tokens from one saved state to the next
constexpr int kGroup = 8;        // the most heads of one task

// Heads head .. head + count - 1 of one document. Its tokens are rows first .. first + length - 1 of the [rows, H, N] tensors.
// A task goes through its heads stretch by stretch, kCheckpoint tokens of each: a head's rows lie H N apart, nearly a page of memory each,
// and the pages are still known to the core's translation buffers when the heads beside it need them.
struct Task {
  int64_t first, length, head, count, heads;
  const float* initial;  // states before the first token, [count, N, N]; null: zeros
  float* final;          // states after the last token, [count, N, N]
  float* checkpoints;    // states before tokens 0, 64, 128, ...: [H, N, N] a slot, from this document's first slot; null: save nothing
  // Backward: the document's tokens that it is about; begin is a multiple of kCheckpoint, so is end unless it is `length`
  int64_t begin, end;
  const float* d_end;    // gradients of the states after token end - 1, [count, N, N]; null: zeros
  float* d_begin;        // gradients of the states before token begin, [count, N, N]; null: not wanted
  float* d_checkpoints;  // scan: gradients of the checkpoints, the same layout
  int64_t value;         // forward_slab, scan (of one head): the first of its value channels
};

// Data pointers of whole tensors; the element type is float or bf16, `removed` (S_{t-1} a_t) is always float.
struct Tensors {
  const void *r, *w, *k, *v, *a, *b;
  void* y;
  float* removed;  // written by the forward when it saves, read by the backward
  const void* dy;
  void *dr, *dw, *dk, *dv, *da, *db;
  // What other uses of r, k and v have given, which dr, dk and dv then include; each may be null: nothing
  const void *more_dr, *more_dk, *more_dv;
};

using Kernel = void (*)(const Task&, const Tensors&, void* scratch);

// A head's tokens follow from one another, but its value channels never meet in the state nor in the state's gradient, and the
// states are known at the checkpoints. So where heads are fewer than threads, slabs of channels go forward side by side; backward,
// `scan` carries the gradient of the state alone through each slab, and then all stretches between checkpoints are `backward`s of
// their own. The same arithmetic gives each number either way: the bits do not depend on the choice.
struct Kernels {
  Kernel forward, forward_slab, backward, scan;
  int64_t forward_scratch, backward_scratch, scan_scratch;  // bytes, aligned to 64
  int64_t slab;                                             // value channels of one forward_slab or scan
};

// The kernels for one head size and element type; all null for a head size that is none of 16, 32, 64, 128.
Kernels kernels_plain(int64_t head_size, bool is_bf16);
Kernels kernels_avx2(int64_t head_size, bool is_bf16);
Kernels kernels_avx512(int64_t head_size, bool is_bf16);

}  // namespace wkv7
