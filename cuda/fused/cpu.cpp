// The elementwise parts of a block, forward and backward, each in one pass; see cpu.h. Compiled once per instruction set.
// C is a multiple of 16. All arithmetic is fp32; what backward needs of the forward is computed again.
#include "cpu.h"

#include <math.h>

#include "../common/simd.h"

namespace {

using fused::Finish;
using fused::Kernels;
using fused::kMost;
using fused::Prepare;
using fused::TokenMix;

INLINE float sum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float total = 0;
  for (int i = 0; i < W; i++) total += x[i];
  return total;
#endif
}

INLINE void add(float* to, vf x) { store(to, load(to) + x); }

template <class T>
void token_mix(const TokenMix& given, int64_t begin, int64_t end) {
  const TokenMix p = given;  // a copy, which no store below can change
  const T *x = static_cast<const T*>(p.x), *last = static_cast<const T*>(p.last);
  for (int64_t row = begin; row < end; row++) {
    const bool first = row % p.T == 0;
    const T* before = !first ? x + (row - 1) * p.C : last ? last + row / p.T * p.C : nullptr;
    for (int64_t c = 0; c < p.C; c += W) {
      const vf here = load(x + row * p.C + c), shift = (before ? load(before + c) : vf{}) - here;
      for (int64_t j = 0; j < p.n; j++)
        store(static_cast<T*>(p.out[j]) + row * p.C + c, here + shift * load(static_cast<const T*>(p.mix[j]) + c));
    }
  }
}

template <class T>
void token_mix_backward(const TokenMix& given, int64_t begin, int64_t end, float* sums) {
  const TokenMix p = given;
  const T *x = static_cast<const T*>(p.x), *last = static_cast<const T*>(p.last);
  for (int64_t row = begin; row < end; row++) {
    const bool first = row % p.T == 0, end_of_row = (row + 1) % p.T == 0;
    const T* before = !first ? x + (row - 1) * p.C : last ? last + row / p.T * p.C : nullptr;
    for (int64_t c = 0; c < p.C; c += W) {
      const int64_t at = row * p.C + c;
      const vf shift = (before ? load(before + c) : vf{}) - load(x + at);
      vf dx{}, dbefore{};
      for (int64_t j = 0; j < p.n; j++) {
        const T* d = static_cast<const T*>(p.dout[j]);
        const vf mix = load(static_cast<const T*>(p.mix[j]) + c), dout = load(d + at);
        dx += dout - dout * mix;
        if (!end_of_row) dx += load(d + at + p.C) * mix;
        dbefore += dout * mix;
        add(sums + j * p.C + c, dout * shift);
      }
      store(static_cast<T*>(p.dx) + at, dx);
      if (first && p.dlast) store(static_cast<T*>(p.dlast) + row / p.T * p.C + c, dbefore);
    }
  }
}

// 1 / max(length, 1e-12) of the key of a head times k_k, and whether the length counts: F.normalize with eps 1e-12.
template <class T>
INLINE float inverse_length(const T* k, const T* k_k, int64_t N, bool& counts) {
  vf squares{};
  for (int64_t i = 0; i < N; i += W) {
    const vf z = load(k + i) * load(k_k + i);
    squares += z * z;
  }
  const float length = sqrtf(sum(squares));
  counts = !(length <= 1e-12f);  // a NaN counts
  return 1.f / (counts ? length : 1e-12f);
}

template <class T>
void prepare(const Prepare& given, int64_t begin, int64_t end) {
  const Prepare p = given;
  const auto in = [](const void* from, int64_t at) { return load(static_cast<const T*>(from) + at); };
  const auto out = [](void* to, int64_t at, vf x) { store(static_cast<T*>(to) + at, x); };
  for (int64_t row = begin; row < end; row++)
    for (int64_t head = 0; head < p.C; head += p.N) {
      bool counts;
      const float inverse = inverse_length(static_cast<const T*>(p.k) + row * p.C + head, static_cast<const T*>(p.k_k) + head, p.N, counts);
      for (int64_t c = head; c < head + p.N; c += W) {
        const int64_t at = row * p.C + c;
        const vf k = in(p.k, at), kk = k * in(p.k_k, c) * inverse;
        vf rate, rest;
        sigmoids(in(p.a0, c) + in(p.a_low, at), rate, rest);
        out(p.w, at, in(p.w0, c) + in(p.w_low, at));
        out(p.k_out, at, k - k * rest * in(p.k_a, c));
        out(p.a, at, -kk);
        out(p.b, at, kk * rate);
        if (!p.v_first) continue;
        sigmoids(in(p.v0, c) + in(p.v_low, at), rate, rest);
        out(p.v_out, at, in(p.v, at) * rest + in(p.v_first, at) * rate);
      }
    }
}

template <class T>
void prepare_backward(const Prepare& given, int64_t begin, int64_t end, float* sums) {
  const Prepare p = given;
  const auto in = [](const void* from, int64_t at) { return load(static_cast<const T*>(from) + at); };
  const auto out = [](void* to, int64_t at, vf x) { store(static_cast<T*>(to) + at, x); };
  const auto gather = [&](int which, int64_t c, vf x) { add(sums + which * p.C + c, x); };
  for (int64_t row = begin; row < end; row++)
    for (int64_t head = 0; head < p.C; head += p.N) {
      bool counts;
      const float inverse = inverse_length(static_cast<const T*>(p.k) + row * p.C + head, static_cast<const T*>(p.k_k) + head, p.N, counts);
      vf along{};
      for (int64_t c = head; c < head + p.N; c += W) {
        const int64_t at = row * p.C + c;
        const vf k = in(p.k, at), kk = k * in(p.k_k, c) * inverse, k_a = in(p.k_a, c);
        const vf dk_out = in(p.dk_out, at), db = in(p.db, at);
        vf rate, rest;
        sigmoids(in(p.a0, c) + in(p.a_low, at), rate, rest);
        along += kk * (db * rate - in(p.da, at));
        const vf da_low = (db * kk + dk_out * k * k_a) * rate * rest;
        out(p.da_low, at, da_low);
        gather(Prepare::a0_sum, c, da_low);
        gather(Prepare::k_a_sum, c, -dk_out * k * rest);
        gather(Prepare::w0_sum, c, in(p.dw, at));
        if (!p.v_first) continue;
        sigmoids(in(p.v0, c) + in(p.v_low, at), rate, rest);
        const vf dv = in(p.dv_out, at), dv_low = dv * (in(p.v_first, at) - in(p.v, at)) * rate * rest;
        out(p.dv, at, dv * rest);
        out(p.dv_first, at, p.more_dv_first ? dv * rate + in(p.more_dv_first, at) : dv * rate);
        out(p.dv_low, at, dv_low);
        gather(Prepare::v0_sum, c, dv_low);
      }
      const float inside = counts ? sum(along) : 0.f;
      for (int64_t c = head; c < head + p.N; c += W) {
        const int64_t at = row * p.C + c;
        const vf k = in(p.k, at), k_k = in(p.k_k, c), kk = k * k_k * inverse, dk_out = in(p.dk_out, at);
        vf rate, rest;
        sigmoids(in(p.a0, c) + in(p.a_low, at), rate, rest);
        const vf dz = (in(p.db, at) * rate - in(p.da, at) - kk * inside) * inverse;
        out(p.dk, at, dk_out - dk_out * rest * in(p.k_a, c) + dz * k_k);
        gather(Prepare::k_k_sum, c, dz * k);
      }
    }
}

// Of a head of one token: mean and inverse deviation of y, and the sum of r k r_k.
struct Head {
  float mean, inverse, bonus;
};

template <class T>
INLINE Head head_of(const Finish& p, int64_t at, int64_t c) {
  const auto in = [](const void* from, int64_t at) { return load(static_cast<const T*>(from) + at); };
  vf total{}, bonus{}, squares{};
  for (int64_t i = 0; i < p.N; i += W) {
    total += in(p.y, at + i);
    bonus += in(p.r, at + i) * in(p.k, at + i) * in(p.r_k, c + i);
  }
  const float mean = sum(total) / p.N;
  for (int64_t i = 0; i < p.N; i += W) {
    const vf y = in(p.y, at + i) - mean;
    squares += y * y;
  }
  return {mean, 1.f / sqrtf(sum(squares) / p.N + p.eps), sum(bonus)};
}

template <class T>
void finish(const Finish& given, int64_t begin, int64_t end) {
  const Finish p = given;
  const auto in = [](const void* from, int64_t at) { return load(static_cast<const T*>(from) + at); };
  for (int64_t row = begin; row < end; row++)
    for (int64_t head = 0; head < p.C; head += p.N) {
      const Head h = head_of<T>(p, row * p.C + head, head);
      for (int64_t c = head; c < head + p.N; c += W) {
        const int64_t at = row * p.C + c;
        const vf normal = (in(p.y, at) - h.mean) * h.inverse;
        store(static_cast<T*>(p.out) + at, (normal * in(p.weight, c) + in(p.bias, c) + h.bonus * in(p.v, at)) * in(p.g, at));
      }
    }
}

template <class T>
void finish_backward(const Finish& given, int64_t begin, int64_t end, float* sums) {
  const Finish p = given;
  const auto in = [](const void* from, int64_t at) { return load(static_cast<const T*>(from) + at); };
  const auto out = [](void* to, int64_t at, vf x) { store(static_cast<T*>(to) + at, x); };
  const auto gather = [&](int which, int64_t c, vf x) { add(sums + which * p.C + c, x); };
  for (int64_t row = begin; row < end; row++)
    for (int64_t head = 0; head < p.C; head += p.N) {
      const Head h = head_of<T>(p, row * p.C + head, head);
      vf dnormal_sum{}, along{}, dbonus_sum{};
      for (int64_t c = head; c < head + p.N; c += W) {
        const int64_t at = row * p.C + c;
        const vf normal = (in(p.y, at) - h.mean) * h.inverse, weight = in(p.weight, c), v = in(p.v, at), dout = in(p.dout, at);
        const vf inner = dout * in(p.g, at);
        out(p.dg, at, dout * (normal * weight + in(p.bias, c) + h.bonus * v));
        out(p.dv, at, inner * h.bonus);
        gather(Finish::weight_sum, c, inner * normal);
        gather(Finish::bias_sum, c, inner);
        dnormal_sum += inner * weight;
        along += inner * weight * normal;
        dbonus_sum += inner * v;
      }
      const float mean = sum(dnormal_sum) / p.N, slope = sum(along) / p.N, dbonus = sum(dbonus_sum);
      for (int64_t c = head; c < head + p.N; c += W) {
        const int64_t at = row * p.C + c;
        const vf normal = (in(p.y, at) - h.mean) * h.inverse, r = in(p.r, at), k = in(p.k, at), r_k = in(p.r_k, c);
        out(p.dy, at, (in(p.dout, at) * in(p.g, at) * in(p.weight, c) - mean - normal * slope) * h.inverse);
        out(p.dr, at, dbonus * k * r_k);
        out(p.dk, at, dbonus * r * r_k);
        gather(Finish::r_k_sum, c, dbonus * r * k);
      }
    }
}

template <class T>
void relu_square(const void* x_, void* y_, int64_t count) {
  const T* x = static_cast<const T*>(x_);
  T* y = static_cast<T*>(y_);
  for (int64_t i = 0; i < count; i += W) {
    const vf in = load(x + i), r = select(in < 0.f, vf{}, in);  // a NaN stays one
    store(y + i, r * r);
  }
}

template <class T>
void relu_square_backward(const void* dy_, const void* y_, void* dx_, int64_t count) {
  const T *dy = static_cast<const T*>(dy_), *y = static_cast<const T*>(y_);
  T* dx = static_cast<T*>(dx_);
  for (int64_t i = 0; i < count; i += W) {
    T x[W];  // max(x, 0), to the bit: relu_square.cu says why
    store(x, root(load(y + i)));
    store(dx + i, 2.f * load(x) * load(dy + i));
  }
}

template <class T>
void collect(const float* parts, int64_t count, int64_t stride, int64_t n, void* to) {
  for (int64_t i = 0; i < n; i += W) {
    vf total{};
    for (int64_t j = 0; j < count; j++) total += load(parts + j * stride + i);
    store(static_cast<T*>(to) + i, total);
  }
}

template <class T>
Kernels kernels() {
  return {token_mix<T>,       token_mix_backward<T>, prepare<T>,     prepare_backward<T>, finish<T>,
          finish_backward<T>, relu_square<T>,        relu_square_backward<T>, collect<T>};
}

}  // namespace

namespace fused {

Kernels KERNELS_OF(ISA)(bool is_bf16) { return is_bf16 ? kernels<bf16>() : kernels<float>(); }

}  // namespace fused
