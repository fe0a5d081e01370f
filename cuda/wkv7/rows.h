// Where the rows of one head lie in the tensors of a task of cpu.h, and fetching them ahead.
#pragma once
#include "../common/simd.h"
#include "cpu.h"

namespace {

using wkv7::Task;
using wkv7::Tensors;

template <int N, class T>
struct Rows {  // the rows of one head of a [tokens, H, N] tensor, counted from the document's first token
  T* data;
  int64_t stride;
  Rows(const void* tensor, const Task& task, int64_t head)  // head: counted from the task's first
      : data(static_cast<T*>(const_cast<void*>(tensor)) + (task.first * task.heads + task.head + head) * N), stride(task.heads * N) {}
  T* operator[](int64_t t) const { return data + t * stride; }
};

template <int N, class T>
INLINE void widen(float* to, const T* from) {
  for (int j = 0; j < N; j += W) store(to + j, load(from + j));
}

// A row as float: itself, or its copy in `to`.
template <int N>
INLINE const float* as_float(const float* row, float*) {
  return row;
}
template <int N>
INLINE const float* as_float(const bf16* row, float* to) {
  widen<N>(to, row);
  return to;
}

template <int N, class T>
INLINE void prefetch_row(const T* row) {
  for (size_t byte = 0; byte < N * sizeof(T); byte += 64) prefetch_line(reinterpret_cast<const char*>(row) + byte);
}

template <int N, class T>
struct ForwardRows {
  Rows<N, const T> r, w, k, v, a, b;
  Rows<N, T> y;
  Rows<N, float> removed;
  ForwardRows(const Tensors& io, const Task& task, int64_t head)
      : r(io.r, task, head), w(io.w, task, head), k(io.k, task, head), v(io.v, task, head), a(io.a, task, head), b(io.b, task, head),
        y(io.y, task, head), removed(io.removed, task, head) {}
  INLINE void prefetch(int64_t t) const {
    prefetch_row<N>(r[t]), prefetch_row<N>(w[t]), prefetch_row<N>(k[t]), prefetch_row<N>(v[t]), prefetch_row<N>(a[t]),
        prefetch_row<N>(b[t]);
  }
};

// Rows of a tensor that may be absent: zeros then.
template <int N, class T>
struct MaybeRows {
  Rows<N, const T> rows;
  bool given;
  MaybeRows(const void* tensor, const Task& task, int64_t head) : rows(tensor, task, head), given(tensor) {}
  INLINE vf at(int64_t t, int64_t j) const { return given ? load(rows[t] + j) : vf{}; }
  INLINE void prefetch(int64_t t) const {
    if (given) prefetch_row<N>(rows[t]);
  }
};

template <int N, class T>
struct Inputs {
  Rows<N, const T> r, w, k, v, a, b, dy;
  Rows<N, const float> removed;
  MaybeRows<N, T> more_dr, more_dk, more_dv;
  Inputs(const Tensors& io, const Task& task, int64_t head)
      : r(io.r, task, head), w(io.w, task, head), k(io.k, task, head), v(io.v, task, head), a(io.a, task, head), b(io.b, task, head),
        dy(io.dy, task, head), removed(io.removed, task, head), more_dr(io.more_dr, task, head), more_dk(io.more_dk, task, head),
        more_dv(io.more_dv, task, head) {}
  INLINE void prefetch(int64_t t) const {
    prefetch_row<N>(r[t]), prefetch_row<N>(w[t]), prefetch_row<N>(k[t]), prefetch_row<N>(v[t]);
    prefetch_row<N>(a[t]), prefetch_row<N>(b[t]), prefetch_row<N>(dy[t]), prefetch_row<N>(removed[t]);
    more_dr.prefetch(t), more_dk.prefetch(t), more_dv.prefetch(t);
  }
};

template <int N, class T>
struct Outputs {
  Rows<N, T> dr, dw, dk, dv, da, db;
  Outputs(const Tensors& io, const Task& task, int64_t head)
      : dr(io.dr, task, head), dw(io.dw, task, head), dk(io.dk, task, head), dv(io.dv, task, head), da(io.da, task, head),
        db(io.db, task, head) {}
};

}  // namespace
