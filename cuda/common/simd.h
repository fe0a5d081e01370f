// One vector of W floats, W = 16, 8 or 4 for ISA = avx512, avx2, plain, on the compiler's vector extension: the same source
// serves x86 and ARM. Everything lives in an unnamed namespace, for the linker must never merge code of two instruction sets.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define SIMD_W 16
#elif defined(__AVX2__)
#define SIMD_W 8
#else
#define SIMD_W 4
#endif

#define INLINE inline __attribute__((always_inline))

// kernels_avx512 and so on: the name of the function in which a cpu.cpp hands out what this compilation has made (chosen in isa.h).
#define JOIN(a, b) a##b
#define KERNELS_OF(isa) JOIN(kernels_, isa)

namespace {

constexpr int W = SIMD_W;
typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef float vf_memory __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh_memory __attribute__((vector_size(2 * W), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};

INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

INLINE vf load(const float* p) { return *reinterpret_cast<const vf_memory*>(p); }
INLINE void store(float* p, vf x) { *reinterpret_cast<vf_memory*>(p) = x; }

INLINE vf load(const bf16* p) {
  const vh h = *reinterpret_cast<const vh_memory*>(p);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}

// To the nearest bf16, ties to even; a NaN stays one.
INLINE void store(bf16* p, vf x) {
  const vu u = (vu)x;
  const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vu bits = (vu)(x == x) & rounded;
  const vu nan = ~(vu)(x == x) & 0x7fc0;
  *reinterpret_cast<vh_memory*>(p) = __builtin_convertvector(bits | nan, vh);
}

INLINE vf splat(float x) { return x - vf{}; }
INLINE vf select(vi mask, vf x, vf y) { return mask ? x : y; }

// x in every lane, in a register. Without this GCC reads the scalar again for each use, which costs a load port each time.
INLINE vf broadcast(float x) {
  vf all = splat(x);
#if defined(__x86_64__) && defined(__AVX512F__)
  asm("" : "+v"(all));
#elif defined(__x86_64__)
  asm("" : "+x"(all));
#endif
  return all;
}

#if defined(__SANITIZE_ADDRESS__)
constexpr bool SANITIZED = true;
#else
constexpr bool SANITIZED = false;
#endif

// Stores that go past the caches, for results that are not read again soon. p must be aligned to the vector. GCC's
// sanitizer does not look at them: it is shown an ordinary one.
INLINE void stream(float* p, vf x) {
  if (SANITIZED) store(p, x);
#if defined(__AVX512F__)
  _mm512_stream_ps(p, x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, x);
#elif defined(__x86_64__)
  _mm_stream_ps(p, x);
#else
  store(p, x);
#endif
}

INLINE void stream(bf16* p, vf x) {
  if (SANITIZED) store(p, x);
#if defined(__AVX512F__)
  alignas(32) bf16 narrow[W];
  store(narrow, x);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(narrow));
#else
  store(p, x);
#endif
}

// Orders streamed stores before whatever tells another thread that they are done.
INLINE void end_of_stream() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

INLINE void prefetch_line(const void* p) { __builtin_prefetch(p, 0, 2); }

// 1 / x for x in [1/2, 2], to 1 ulp; a division would block the divider for longer than the rest of a sigmoid takes.
INLINE vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf y = _mm512_rcp14_ps(x);
  return y + y * (1.f - x * y);
#elif defined(__AVX2__)
  vf y = _mm256_rcp_ps(x);
  y += y * (1.f - x * y);
  return y + y * (1.f - x * y);
#else
  return 1.f / x;
#endif
}

// The square root, rounded correctly.
INLINE vf root(vf x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < W; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// e^x for x <= 0, to 1 ulp; e^-87 below -87. A NaN stays one.
INLINE vf exp_nonpositive(vf x) {
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  x = select(x < -87.f, splat(-87.f), x);
  const vf shifted = x * 1.44269504f + magic;
  const vf n = shifted - magic;
  const vf f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.f;
  const vf scale = (vf)(((vi)shifted - 0x4b400000 + 127) << 23);
  return p * scale;
}

// s = sigmoid(x) and c = sigmoid(-x), each with all its digits.
INLINE void sigmoids(vf x, vf& s, vf& c) {
  const vf q = exp_nonpositive((vf)((vu)x | 0x80000000u));
  const vf p = reciprocal(1.f + q);
  const vf small = q * p;
  s = select(x > 0.f, p, small);
  c = select(x > 0.f, small, p);
}

// The transpose of a W x W block held in W vectors, by swapping off-diagonal blocks of size W/2, W/4, ..., 1.
template <int H>
INLINE void swap_blocks(vf& x, vf& y) {
  vi low{}, high{};
  for (int c = 0; c < W; c++) {
    low[c] = (c & H) ? W + c - H : c;
    high[c] = (c & H) ? W + c : c + H;
  }
#if defined(__clang__)
  vf a{}, b{};
  for (int c = 0; c < W; c++) {
    a[c] = low[c] < W ? x[low[c]] : y[low[c] - W];
    b[c] = high[c] < W ? x[high[c]] : y[high[c] - W];
  }
#else
  const vf a = __builtin_shuffle(x, y, low), b = __builtin_shuffle(x, y, high);
#endif
  x = a;
  y = b;
}

template <int H>
INLINE void transpose_steps(vf* rows) {
  if constexpr (H > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      if (!(i & H)) swap_blocks<H>(rows[i], rows[i + H]);
    transpose_steps<H / 2>(rows);
  }
}

// to[c][r] = from[r][c] for a ROWS x COLUMNS matrix, both multiples of W.
template <int ROWS, int COLUMNS, bool STREAM = false>
INLINE void transpose(const float* from, int from_stride, float* to, int to_stride) {
  for (int r = 0; r < ROWS; r += W)
    for (int c = 0; c < COLUMNS; c += W) {
      vf rows[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) rows[i] = load(from + (r + i) * from_stride + c);
      transpose_steps<W / 2>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < W; i++) STREAM ? stream(to + (c + i) * to_stride + r, rows[i]) : store(to + (c + i) * to_stride + r, rows[i]);
    }
}

// C = A B, C += A B, or C = (START + A B) diag(SCALE), in register blocks of MR rows x NR vectors. A[m][k] lies at
// a[m * a_row + k * a_column].
enum class From { zero, self, start };

template <int M, int N, int K, From FROM>
INLINE void matmul(const float* a, int a_row, int a_column, const float* b, int b_row, float* c, int c_row, const float* start = nullptr,
                   const float* scale = nullptr) {
  constexpr int NV = N / W;
  constexpr int NR = NV < (W == 16 ? 4 : 2) ? NV : (W == 16 ? 4 : 2);
  constexpr int WANTED = W == 16 ? (NR == 1 ? 8 : 16 / NR) : 4, MR = M < WANTED ? M : WANTED;
  static_assert(N % W == 0 && NV % NR == 0 && M % MR == 0, "whole register blocks only");
  if (FROM == From::self) start = c;
  for (int n = 0; n < N; n += NR * W)
    for (int m = 0; m < M; m += MR) {
      vf sum[MR][NR];
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NR; j++) sum[i][j] = FROM == From::zero ? vf{} : load(start + (m + i) * c_row + n + j * W);
      for (int k = 0; k < K; k++) {
        vf row[NR];
#pragma GCC unroll 4
        for (int j = 0; j < NR; j++) row[j] = load(b + k * b_row + n + j * W);
#pragma GCC unroll 16
        for (int i = 0; i < MR; i++) {
          const float x = a[(m + i) * a_row + k * a_column];
          const vf all = NR > 1 ? broadcast(x) : splat(x);
#pragma GCC unroll 4
          for (int j = 0; j < NR; j++) sum[i][j] += all * row[j];
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < MR; i++)
#pragma GCC unroll 4
        for (int j = 0; j < NR; j++)
          store(c + (m + i) * c_row + n + j * W, FROM == From::start ? sum[i][j] * load(scale + n + j * W) : sum[i][j]);
    }
}

}  // namespace
