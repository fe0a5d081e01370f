// SIMD loops of the head and its loss; see cpu.h. Compiled once per instruction set (common/isa.h).
#include "cpu.h"

#include "../common/simd.h"

namespace {

using loss::Kernels;
using loss::Logits;
using loss::Totals;

template <class T>
constexpr int kPair = 4 / sizeof(T);

INLINE void narrow(float x, float* to) { *to = x; }
INLINE void narrow(float x, bf16* to) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  to->bits = x == x ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

// bf16 in the lower half of each lane, to nearest; ties, which hardly occur, go up. A NaN that arithmetic made stays one.
INLINE vu rounded(vf x) { return ((vu)x + 0x8000u) >> 16; }

// Not below `low`; a NaN stays one.
INLINE vf at_least(float low, vf x) { return splat(low) > x ? splat(low) : x; }

constexpr float kMagic = 12582912.f + 127;  // 1.5 * 2^23: adding it rounds to an integer; and the bias of an exponent
constexpr float kLog2e = 1.44269504088896341f;

// 2^n p, n the integer that adding kMagic has left in the low bits of `shifted`. A NaN, whatever its bits, stays one: hence a product.
INLINE vf scaled(vf p, vf shifted) { return p * (vf)((vi)shifted << 23); }

// exp to 2 ulp, for x <= 88; e^-87 below -87. Cephes' polynomial.
INLINE vf exact_exp(vf x) {
  x = at_least(-87.f, x);
  const vf shifted = x * kLog2e + kMagic;
  const vf n = shifted - kMagic;
  const vf f = x - n * 0.693359375f - n * -2.12194440e-4f;
  vf p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  return scaled(p * (f * f) + (f + 1.f), shifted);
}

// One row of units of the right operand `turn` makes: a row of fp32, or two of bf16 interleaved.
INLINE vu unit_row(const float* from, int64_t, bool) { return (vu)load(from); }
INLINE vu unit_row(const bf16* from, int64_t stride, bool odd_exists) {
  const vu even = (vu)load(from) >> 16;
  return odd_exists ? even | (vu)load(from + stride) : even;
}
INLINE uint32_t unit(const float* from, int64_t, bool) {
  uint32_t bits;
  memcpy(&bits, from, 4);
  return bits;
}
INLINE uint32_t unit(const bf16* from, int64_t stride, bool odd_exists) {
  return from->bits | (odd_exists ? uint32_t(from[stride].bits) << 16 : 0);
}

template <class T>
void turn(const void* from_, int64_t rows, int64_t columns, void* to_, int64_t to_stride) {
  constexpr int pair = kPair<T>;
  const T* from = static_cast<const T*>(from_);
  auto* to = static_cast<uint32_t*>(to_);
  const int64_t unit_rows = (rows + pair - 1) / pair;
  for (int64_t r = 0; r < unit_rows; r += W)
    for (int64_t c = 0; c < columns; c += W) {
      const T* corner = from + r * pair * columns + c;
      if (r + W <= unit_rows && c + W <= columns) {
        vf block[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) block[i] = (vf)unit_row(corner + i * pair * columns, columns, (r + i) * pair + 1 < rows);
        transpose_steps<W / 2>(block);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) store(reinterpret_cast<float*>(to) + (c + i) * to_stride + r, block[i]);
      } else {
        for (int64_t i = 0; i < W && r + i < unit_rows; i++)
          for (int64_t j = 0; j < W && c + j < columns; j++)
            to[(c + j) * to_stride + r + i] = unit(corner + i * pair * columns + j, columns, (r + i) * pair + 1 < rows);
      }
    }
}

void transpose_units(const void* from_, int64_t from_stride, int64_t rows, int64_t columns, void* to_, int64_t to_stride) {
  const auto* from = static_cast<const float*>(from_);
  auto* to = static_cast<float*>(to_);
  for (int64_t r = 0; r < rows; r += W)
    for (int64_t c = 0; c < columns; c += W) {
      if (r + W <= rows && c + W <= columns) {
        transpose<W, W>(from + r * from_stride + c, int(from_stride), to + c * to_stride + r, int(to_stride));
        continue;
      }
      for (int64_t i = r; i < rows && i < r + W; i++)
        for (int64_t j = c; j < columns && j < c + W; j++) memcpy(to + j * to_stride + i, from + i * from_stride + j, 4);
    }
}

// Fetches `ahead` evenly over the calls of a loop.
struct Ahead {
  const char *at, *end;
  int64_t step;
  Ahead(const Logits& l) : at(l.ahead), end(l.ahead + l.ahead_bytes), step(0) {
    const int64_t calls = (l.width / W) * ((l.rows + 1) / 2);
    step = (l.ahead_bytes / 64 + calls - 1) / calls;
  }
  INLINE void fetch() {
    for (int64_t i = 0; i < step && at < end; i++, at += 64) __builtin_prefetch(at, 0, 2);
  }
};

template <class T>
void softmax(const Logits& logits, Totals totals, void* e_) {
  const Logits l = logits;  // a copy, which no store below can change
  auto* e = static_cast<float*>(e_);
  Ahead ahead(l);
  for (int64_t i = 0; i < l.width; i += W) {
    const vf m = load(l.m + i);
    vf total{}, best = load(totals.top + i);
    vi best_row = (vi)load(reinterpret_cast<float*>(totals.top_row) + i);
    const auto see = [&](int64_t r) {
      const vf logit = load(l.data + r * l.stride + i);
      const vi better = logit > best;
      best = better ? logit : best;
      best_row = better ? vi{} + int32_t(l.row + r) : best_row;
      const vf value = exact_exp(logit - m);
      total += value;
      return value;
    };
    for (int64_t r = 0; r < l.rows; r += 2) {
      ahead.fetch();
      const vf even = see(r), odd = r + 1 < l.rows ? see(r + 1) : vf{};
      if (!e) continue;
      if constexpr (kPair<T> == 2) {
        store(e + r / 2 * l.width + i, (vf)(rounded(even) | rounded(odd) << 16));
      } else {
        store(e + r * l.width + i, even);
        if (r + 1 < l.rows) store(e + (r + 1) * l.width + i, odd);
      }
    }
    store(totals.sum + i, load(totals.sum + i) + total);
    store(totals.top + i, best);
    store(reinterpret_cast<float*>(totals.top_row) + i, (vf)best_row);
  }
}

void split(const uint32_t* e, int64_t rows, int64_t width, void* to_) {
  auto* to = static_cast<bf16*>(to_);
  for (int64_t r = 0; r < rows; r += 2)
    for (int64_t i = 0; i < width; i += W) {
      const vu pair = (vu)load(reinterpret_cast<const float*>(e) + r / 2 * width + i);
      *reinterpret_cast<vh_memory*>(to + r * width + i) = __builtin_convertvector(pair & 0xffff, vh);
      if (r + 1 < rows) *reinterpret_cast<vh_memory*>(to + (r + 1) * width + i) = __builtin_convertvector(pair >> 16, vh);
    }
}

void collect(const float* from, int64_t parts, int64_t part_stride, int64_t columns, int64_t width, const float* scale, float* to) {
  const vf factor = load(scale);
  int64_t c = 0;
  for (; c < columns; c++) {
    vf sum{};
    for (int64_t part = 0; part < parts; part++) sum += load(from + part * part_stride + c * width);
    sum *= factor;
    for (int i = 0; i < W; i++) to[i * columns + c] = sum[i];
  }
}

template <class T>
void scale_rows(const void* x_, int64_t count, int64_t columns, const float* scale, void* to_) {
  const T* x = static_cast<const T*>(x_);
  T* to = static_cast<T*>(to_);
  for (int i = 0; i < kPair<T>; i++)
    for (int64_t c = 0; c < columns; c++) narrow(i < count ? widen(x[i * columns + c]) * scale[i] : 0.f, to + c * kPair<T> + i);
}

template <class T>
void add_scaled(float* to, const void* from_, float factor, int64_t n) {
  const T* from = static_cast<const T*>(from_);
  for (int64_t i = 0; i < n; i++) to[i] += factor * widen(from[i]);
}

template <class T>
float dot(const void* a_, const void* b_, int64_t n) {
  const T *a = static_cast<const T*>(a_), *b = static_cast<const T*>(b_);
  vf sums{};
  int64_t i = 0;
  for (; i + W <= n; i += W) sums += load(a + i) * load(b + i);
  float sum = 0;
  for (; i < n; i++) sum += widen(a[i]) * widen(b[i]);
  for (int j = 0; j < W; j++) sum += sums[j];
  return sum;
}

template <class T>
void narrow_all(const float* from, void* to_, int64_t n) {
  T* to = static_cast<T*>(to_);
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  for (; i < n; i++) narrow(from[i], to + i);
}

template <class T>
Kernels kernels() {
  return {transpose_units, turn<T>,       softmax<T>, split, collect, scale_rows<T>, add_scaled<T>, dot<T>, narrow_all<T>, W};
}

}  // namespace

namespace loss {

Kernels KERNELS_OF(ISA)(bool is_bf16) { return is_bf16 ? kernels<bf16>() : kernels<float>(); }

}  // namespace loss
