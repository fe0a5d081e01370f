// One token of RWKV-7 on the CPU: the parts that step.cpp strings together. Compiled once per instruction set (common/isa.h).
//
// A token reads every weight once, so that the products run at the speed of memory: rows one after the other as they lie there,
// fetched ahead. bf16 weights are widened on the way and multiplied in float: half the bytes, the same result.
#include "cpu.h"

#include <cmath>

#include "../common/simd.h"

namespace {

using rwkv7_step::Head;
using rwkv7_step::kMaxHead;
using rwkv7_step::Matrix;

constexpr int64_t kAhead = 4096;  // bytes between what is multiplied and what is fetched
constexpr int64_t kPanel = 4096;  // columns that a pass over the rows takes
constexpr float kDecayScale = -0.60653065971263342f;  // -exp(-1/2)

template <int H>
INLINE vf fold(vf x) {  // every lane becomes the sum over all lanes
  if constexpr (H == 0) {
    return x;
  } else {
    vf other = x;
    swap_blocks<H>(x, other);  // of two copies: the lower halves in x, the upper in other
    return fold<H / 2>(x + other);
  }
}
INLINE float sum(vf x) { return fold<W / 2>(x)[0]; }

// 2 W numbers of a row and the order in which they come: as they lie in memory, but of bf16 the even ones first, since a pair of
// them in 32 bits takes one instruction each to widen. Widening them in their order costs a tenth of the speed of memory.
INLINE void load_pair(const float* p, vf& x, vf& y) {
  x = load(p);
  y = load(p + W);
}
INLINE void load_pair(const bf16* p, vf& x, vf& y) {
  vu both;
  memcpy(&both, p, sizeof both);
  x = (vf)(both << 16);
  y = (vf)(both & 0xffff0000u);
}
INLINE void arrange(const float* x, float* to, int64_t n, float) { memcpy(to, x, n * sizeof(float)); }
INLINE void arrange(const float* x, float* to, int64_t n, bf16) {
  for (int64_t j = 0; j < n; j += 2 * W)
    for (int i = 0; i < W; i++) {
      to[j + i] = x[j + 2 * i];
      to[j + W + i] = x[j + 2 * i + 1];
    }
}

// The product of n numbers of a row, a multiple of 2 W, with x in that order.
template <class T>
INLINE float dot(const T* row, const float* x, int64_t n) {
  vf s[4] = {};
  int64_t j = 0;
  const auto pair = [&](vf& even, vf& odd) {
    vf a, b;
    load_pair(row + j, a, b);
    even += a * load(x + j);
    odd += b * load(x + j + W);
    j += 2 * W;
  };
  while (j + 4 * W <= n) {
    for (size_t byte = 0; byte < 4 * W * sizeof(T); byte += 64) prefetch_line(reinterpret_cast<const char*>(row + j) + kAhead + byte);
    pair(s[0], s[1]);
    pair(s[2], s[3]);
  }
  if (j < n) pair(s[0], s[1]);
  return sum((s[0] + s[1]) + (s[2] + s[3]));
}

template <class T>
void multiply(const Matrix& m, const float* x, float* y, int64_t first, int64_t last) {
  alignas(64) float panel[kPanel];
  for (int64_t c = 0; c < m.columns; c += kPanel) {
    const int64_t n = m.columns - c < kPanel ? m.columns - c : kPanel, whole = n / (2 * W) * (2 * W);
    arrange(x + c, panel, whole, T{});
    const T* row = static_cast<const T*>(m.data) + first * m.columns + c;
    for (int64_t i = first; i < last; i++, row += m.columns) {
      float product = dot(row, panel, whole);
      for (int64_t j = whole; j < n; j++) product += widen(row[j]) * x[c + j];
      y[i - first] = c == 0 ? product : y[i - first] + product;
    }
  }
}

// y = (x - mean) / sqrt(variance + eps) * weight + bias; n is a multiple of 16.
INLINE void normalise(const float* x, const float* weight, const float* bias, float* y, int64_t n, float eps) {
  vf total{}, squares{};
  for (int64_t j = 0; j < n; j += W) total += load(x + j);
  const vf mean = fold<W / 2>(total) / float(n);
  for (int64_t j = 0; j < n; j += W) {
    const vf c = load(x + j) - mean;
    squares += c * c;
  }
  const vf scale = splat(1.f / std::sqrt(sum(squares) / float(n) + eps));
  for (int64_t j = 0; j < n; j += W) store(y + j, (load(x + j) - mean) * scale * load(weight + j) + load(bias + j));
}

void layer_norm(const float* x, const float* weight, const float* bias, float* y, int64_t channels) {
  normalise(x, weight, bias, y, channels, 1e-5f);
}

void blend(const float* x, const float* last, const float* mix, float* y, int64_t channels) {
  for (int64_t j = 0; j < channels; j += W) store(y + j, load(x + j) + (load(last + j) - load(x + j)) * load(mix + j));
}

INLINE vf sigmoid(vf x) {
  vf s, c;
  sigmoids(x, s, c);
  return s;
}

// rwkvlm/layers/time_mix.py from the low-rank maps to the gate, with the recurrence of ops/wkv7 in between.
template <class T>
void head(const Head& h) {
  const int64_t N = h.size, c = h.first;
  const auto& p = *h.vectors;
  alignas(64) float w[kMaxHead], rate[kMaxHead], g[kMaxHead], v[kMaxHead], d[kMaxHead], k[kMaxHead], a[kMaxHead], b[kMaxHead], y[kMaxHead];
  multiply<T>(h.w2, h.w1, w, c, c + N);
  multiply<T>(h.a2, h.a1, rate, c, c + N);
  multiply<T>(h.g2, h.g1, g, c, c + N);
  if (h.v1) {
    multiply<T>(h.v2, h.v1, v, c, c + N);
    for (int64_t j = 0; j < N; j += W) {
      const vf own = load(h.v + c + j);
      store(v + j, own + (load(h.v_first + c + j) - own) * sigmoid(load(p.v0 + c + j) + load(v + j)));
    }
  } else {
    memcpy(v, h.v + c, N * sizeof(float));
    memcpy(h.v_first + c, v, N * sizeof(float));
  }

  vf squares{}, bonus{};
  for (int64_t j = 0; j < N; j += W) {
    const vf key = load(h.k + c + j), kk = key * load(p.k_k + c + j), in_context = sigmoid(load(p.a0 + c + j) + load(rate + j));
    squares += kk * kk;
    store(a + j, kk);
    store(rate + j, in_context);
    store(d + j, exp_nonpositive(sigmoid(load(p.w0 + c + j) + load(w + j)) * kDecayScale));
    const vf scaled = key * (1.f + (in_context - 1.f) * load(p.k_a + c + j));
    store(k + j, scaled);
    bonus += load(h.r + c + j) * scaled * load(p.r_k + c + j);
  }
  const float length = std::sqrt(sum(squares)), inverse = 1.f / (length <= 1e-12f ? 1e-12f : length);  // a NaN stays one
  for (int64_t j = 0; j < N; j += W) {
    const vf kk = load(a + j) * inverse;
    store(a + j, -kk);
    store(b + j, kk * load(rate + j));
  }

  const float* r = h.r + c;
  for (int64_t i = 0; i < N; i++) {
    const float* S = h.state + i * N;
    float* next = h.next + i * N;
    vf u{}, out{};
    for (int64_t j = 0; j < N; j += W) u += load(S + j) * load(a + j);
    const vf removed = fold<W / 2>(u), value = splat(v[i]);
    for (int64_t j = 0; j < N; j += W) {
      const vf s = load(S + j) * load(d + j) + removed * load(b + j) + value * load(k + j);
      store(next + j, s);
      out += s * load(r + j);
    }
    y[i] = sum(out);
  }

  normalise(y, p.ln_x_weight + c, p.ln_x_bias + c, y, N, 64e-5f);
  const vf share = fold<W / 2>(bonus);
  for (int64_t j = 0; j < N; j += W) store(h.out + c + j, (load(y + j) + share * load(v + j)) * load(g + j));
}

}  // namespace

namespace rwkv7_step {

Kernels KERNELS_OF(ISA)(bool is_bf16) {
  return {is_bf16 ? &multiply<bf16> : &multiply<float>, &layer_norm, &blend, is_bf16 ? &head<bf16> : &head<float>};
}

}  // namespace rwkv7_step
