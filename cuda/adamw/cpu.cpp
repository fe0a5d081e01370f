// AdamW in one pass over gradient, master, moments and rounded parameter; see cpu.h. Compiled once per instruction set.
#include "cpu.h"

#include <math.h>

#include "../common/simd.h"

namespace {

using adamw::Kernels;
using adamw::Piece;
using adamw::Rates;

// Denormal numbers are zero, read and written, while one lives.
class NoDenormals {
#if defined(__x86_64__)
  const unsigned before = _mm_getcsr();

 public:
  NoDenormals() { _mm_setcsr(before | 0x8040); }
  ~NoDenormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
  uint64_t before;

 public:
  NoDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before));
    asm volatile("msr fpcr, %0" ::"r"(before | (uint64_t(1) << 24)));
  }
  ~NoDenormals() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#endif
};

template <class G, bool ROUNDED>
INLINE void update_vector(float* p, float* m, float* v, const G* g, bf16* rounded, const Rates& r) {
  const vf grad = load(g) * r.scale;
  const vf avg = load(m) * r.beta1 + grad * r.rest1;
  const vf square = load(v) * r.beta2 + grad * grad * r.rest2;
  const vf next = load(p) * r.keep - r.step * avg / (root(square) * r.root + r.eps);
  store(m, avg);
  store(v, square);
  store(p, next);
  if constexpr (ROUNDED) store(rounded, next);
}

template <class G, bool ROUNDED>
void update_as(const Piece& piece, const Rates& rates) {
  const NoDenormals here;
  const Rates r = rates;
  const G* g = static_cast<const G*>(piece.grad);
  bf16* rounded = static_cast<bf16*>(piece.rounded);
  int64_t i = 0;
  for (; i + W <= piece.count; i += W)
    update_vector<G, ROUNDED>(piece.master + i, piece.exp_avg + i, piece.exp_avg_sq + i, g + i, ROUNDED ? rounded + i : nullptr, r);
  if (const int64_t left = piece.count - i; left > 0) {
    float p[W] = {}, m[W] = {}, v[W] = {};
    G last[W] = {};
    bf16 out[W];
    memcpy(p, piece.master + i, left * 4);
    memcpy(m, piece.exp_avg + i, left * 4);
    memcpy(v, piece.exp_avg_sq + i, left * 4);
    memcpy(last, g + i, left * sizeof(G));
    update_vector<G, ROUNDED>(p, m, v, last, out, r);
    memcpy(piece.master + i, p, left * 4);
    memcpy(piece.exp_avg + i, m, left * 4);
    memcpy(piece.exp_avg_sq + i, v, left * 4);
    if constexpr (ROUNDED) memcpy(rounded + i, out, left * 2);
  }
}

void update(const Piece& piece, const Rates& rates) {
  if (piece.bf16_grad)
    piece.rounded ? update_as<bf16, true>(piece, rates) : update_as<bf16, false>(piece, rates);
  else
    piece.rounded ? update_as<float, true>(piece, rates) : update_as<float, false>(piece, rates);
}

// In fp32 over a few numbers a lane, then in double.
template <class G>
double squares(const G* g, int64_t count) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += 128 * W) {
    const int64_t n = count - begin < 128 * W ? count - begin : 128 * W;
    const G* from = g + begin;
    vf sums[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= n; i += 4 * W)
      for (int j = 0; j < 4; j++) {
        const vf x = load(from + i + j * W);
        sums[j] += x * x;
      }
    for (; i + W <= n; i += W) {
      const vf x = load(from + i);
      sums[0] += x * x;
    }
    if (i < n) {
      G last[W] = {};
      memcpy(last, from + i, (n - i) * sizeof(G));
      const vf x = load(last);
      sums[0] += x * x;
    }
    for (const vf& sum : sums)
      for (int j = 0; j < W; j++) total += sum[j];
  }
  return total;
}

double sum_of_squares(const void* grad, bool is_bf16, int64_t count) {
  return is_bf16 ? squares(static_cast<const bf16*>(grad), count) : squares(static_cast<const float*>(grad), count);
}

}  // namespace

namespace adamw {

Kernels KERNELS_OF(ISA)() { return {update, sum_of_squares}; }

}  // namespace adamw
