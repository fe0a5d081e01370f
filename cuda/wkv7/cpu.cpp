// WKV7 on the CPU. Compiled once per instruction set (common/isa.h), threads are the caller's.
//
// Forward: token by token. The state is kept key-major, S[j][i] (key j, value i), so that one pass over it, with vectors
// along i, updates it and makes both y_t = S_t r_t and the next token's S_t a_{t+1}.
//
// Backward: chunks of C = 8 tokens from the last to the first, as products of small matrices. Rows are tokens, P_t is the
// product of the decays d_1..d_t of the chunk, S0 the state before it and G the gradient of the state after it:
//     AR = [a_t P_{t-1}; r_t P_t]   KB = [k_t / P_t; b_t / P_t]   VU = [v; u], u_t = S_{t-1} a_t   E = G diag(P_C)
//     M  = AR KB^T, the a-rows strictly lower triangular, the r-rows lower triangular
//     ZY = [z; dy], z the solution of z = (KB E^T + M^T [z; dy])_u-rows, from the last token to the first
//     dVU = KB E^T + M^T ZY       dM  = ZY VU^T, masked like M      dS0 = E + ZY^T AR
//     dAR = ZY S0 + dM KB         dKB = VU E + dM^T AR
// The gradient of log d_t needs no work of order N^2 a token: before the last token of a stretch between two checkpoints it is
// the column sums of S1 * G, and each token adds r dr - k dk - b db to it, and a da for the tokens before.
// Nothing is ever divided by a decay to go back in time: states come from a checkpoint every 64 tokens and are rolled
// forward from there. 1/P <= 0.545^-8 = 128, so that no digits are lost at the strongest decay either.
#include "cpu.h"

#include "rows.h"

namespace {

using wkv7::kCheckpoint;

constexpr int C = 8, C2 = 2 * C;
constexpr int kHalf = C / 2;
// Matrices of a chunk have two rows a token, [a; r], [k; b], [v; u] or [z; dy], halves of the chunk one after the other: rows
// 0-3 and 8-11 are a's, 4-7 and 12-15 r's. M and dM then have nothing in the upper right quarter, and products leave it out.
constexpr int row(int t) { return t / kHalf * C + t % kHalf; }
constexpr int second(int t) { return row(t) + kHalf; }
constexpr int kChunks = kCheckpoint / C;
constexpr int slab(int N) { return N < 32 ? N : 32; }
constexpr int64_t min(int64_t x, int64_t y) { return x < y ? x : y; }
constexpr float kDecayScale = -0.60653065971263342f;  // -exp(-1/2)

// log d = kDecayScale * sigmoid(w) lies in (-0.607, 0), so that e^x needs no reduction of its range: the Taylor polynomial
// around -0.3033 is exact to 2e-9 of its value there.
INLINE vf exp_small(vf x, float centre, float scale) {
  const vf f = x - centre;
  vf p = splat(scale / 5040.f);
  p = p * f + scale / 720.f;
  p = p * f + scale / 120.f;
  p = p * f + scale / 24.f;
  p = p * f + scale / 6.f;
  p = p * f + scale / 2.f;
  p = p * f + scale;
  return p * f + scale;
}
INLINE vf decay_of(vf s) { return exp_small(s * kDecayScale, kDecayScale / 2, 0.73840315f); }

// ---------------------------------------------------------------- forward

constexpr int kBatch = 16;  // tokens converted and prefetched at a time

template <int N, int V>  // V of the N value channels
struct alignas(64) ForwardScratch {
  float d[kBatch][N], r[N], k[N], b[N], a[N], zeros[N];
  struct alignas(64) {
    float S[N][V], u[V];
  } of[wkv7::kGroup];
};

// One token for NR vectors of value channels; u enters as S_{t-1} a_t and leaves as S_t a_{t+1}.
template <int N, int V, int NR, class T>
INLINE void step(float* S, const float* d, const float* r, const float* k, const float* b, const float* a_next, const T* v, float* u,
                 T* y) {
  vf removed[NR], value[NR], out[NR], next[NR];
#pragma GCC unroll 4
  for (int i = 0; i < NR; i++) {
    removed[i] = load(u + i * W);
    value[i] = load(v + i * W);
    out[i] = next[i] = vf{};
  }
#pragma GCC unroll 2
  for (int j = 0; j < N; j++) {
    const vf dj = broadcast(d[j]), bj = broadcast(b[j]), kj = broadcast(k[j]), rj = broadcast(r[j]), aj = broadcast(a_next[j]);
#pragma GCC unroll 4
    for (int i = 0; i < NR; i++) {
      vf s = load(S + j * V + i * W) * dj;
      s += removed[i] * bj;
      s += value[i] * kj;
      out[i] += s * rj;
      next[i] += s * aj;
      store(S + j * V + i * W, s);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < NR; i++) {
    stream(y + i * W, out[i]);
    store(u + i * W, next[i]);
  }
}

template <int N, int V, class T>
void forward(const Task& task, const Tensors& io, void* memory) {
  constexpr int NR = V / W < (W == 16 ? 4 : 2) ? V / W : (W == 16 ? 4 : 2);
  auto& x = *static_cast<ForwardScratch<N, V>*>(memory);
  memset(x.zeros, 0, sizeof x.zeros);
  for (int64_t h = 0; h < task.count; h++) {
    auto& [S, u] = x.of[h];
    if (task.initial)
      transpose<V, N>(task.initial + (h * N + task.value) * N, N, S[0], V);
    else
      memset(S, 0, sizeof S);
    const float* a = as_float<N>(ForwardRows<N, T>(io, task, h).a[0], x.a);
    for (int i = 0; i < V; i += W) {
      vf sum{};
      for (int j = 0; j < N; j++) sum += load(S[j] + i) * a[j];
      store(u + i, sum);
    }
  }
  for (int64_t first = 0; first < task.length; first += kCheckpoint)
    for (int64_t h = 0; h < task.count; h++) {
      auto& [S, u] = x.of[h];
      const ForwardRows<N, T> rows(io, task, h);
      if (task.checkpoints)
        transpose<N, V, true>(S[0], V, task.checkpoints + (((first / kCheckpoint) * task.heads + task.head + h) * N + task.value) * N, N);
      const int64_t end = min(first + kCheckpoint, task.length);
      for (int64_t t0 = first; t0 < end; t0 += kBatch) {
        const int n = int(min(end - t0, kBatch));
        for (int t = 0; t < n; t++)
          for (int j = 0; j < N; j += W) {
            vf s, c;
            sigmoids(load(rows.w[t0 + t] + j), s, c);
            store(x.d[t] + j, decay_of(s));
          }
        // What comes after this batch: the next one, or the next head's, or the first head's next stretch.
        const bool stays = t0 + kBatch < end, wraps = !stays && h + 1 == task.count;
        const ForwardRows<N, T> next(io, task, stays ? h : wraps ? 0 : h + 1);
        const int64_t next_t0 = stays ? t0 + kBatch : wraps ? end : first;
        for (int i = 0; i < V; i += NR * W)
          for (int t = 0; t < n; t++) {
            if (i == 0 && next_t0 + t < task.length) next.prefetch(next_t0 + t);
            if (io.removed)
              for (int q = i; q < i + NR * W; q += W) stream(rows.removed[t0 + t] + task.value + q, load(u + q));
            const float* a_next = t0 + t + 1 < task.length ? as_float<N>(rows.a[t0 + t + 1], x.a) : x.zeros;
            step<N, V, NR>(S[0] + i, x.d[t], as_float<N>(rows.r[t0 + t], x.r), as_float<N>(rows.k[t0 + t], x.k),
                           as_float<N>(rows.b[t0 + t], x.b), a_next, rows.v[t0 + t] + task.value + i, u + i,
                           rows.y[t0 + t] + task.value + i);
          }
      }
    }
  for (int64_t h = 0; h < task.count; h++) transpose<N, V>(x.of[h].S[0], V, task.final + (h * N + task.value) * N, N);
  end_of_stream();
}

// ---------------------------------------------------------------- backward

template <int N>
struct alignas(64) Chunk {  // what one chunk of up to C tokens contributes, all float; absent tokens are zeros with decay 1
  float AR[C2][N], KB[C2][N], VU[C2][N];
  float P[C + 1][N];     // P[t + 1] = product of the decays up to token t
  float inverse[C][N];   // 1 / P[t + 1]
  float slope[C][N];     // d log d / d w
};

template <int N, int V>  // V of the N value channels
struct alignas(64) Pull {  // the way of the gradient through one chunk, in which value channels do not meet
  float KBt[N][C2], dVUt[V][C2], M[C2][C2];
  float dVU[C2][V], ZY[C2][V];
};

template <int N>
struct alignas(64) BackwardScratch {
  Chunk<N> chunk[kChunks];
  float S[kChunks][N][N];  // states after the chunks, value-major
  Pull<N, N> pull;
  float G[wkv7::kGroup][N][N];  // the running gradient of each head
  float VUt[N][C2], dM[C2][C2], dAR[C2][N], dKB[C2][N];
  float suffix[N];  // the gradient of log d of the token at hand
};

template <int N>
struct alignas(64) ScanScratch {
  Chunk<N> chunk;
  Pull<N, slab(N)> pull;
  float G[slab(N)][N];
};

template <int N, class T>
void prepare(Chunk<N>& x, const Inputs<N, T>& in, int64_t t0, int n) {
  if (n < C) memset(&x, 0, sizeof x);
  vf P[N / W], inverse[N / W];
  for (int j = 0; j < N / W; j++) {
    P[j] = inverse[j] = splat(1.f);
    store(x.P[0] + j * W, P[j]);
  }
  for (int t = 0; t < n; t++)
#pragma GCC unroll 4
    for (int q = 0; q < N / W; q++) {
      const int j = q * W;
      vf s, c;
      sigmoids(load(in.w[t0 + t] + j), s, c);
      store(x.slope[t] + j, s * c * kDecayScale);
      store(x.AR[row(t)] + j, load(in.a[t0 + t] + j) * P[q]);
      const vf d = decay_of(s);
      P[q] *= d;
      inverse[q] *= reciprocal(d);
      store(x.P[t + 1] + j, P[q]);
      store(x.inverse[t] + j, inverse[q]);
      store(x.AR[second(t)] + j, load(in.r[t0 + t] + j) * P[q]);
      store(x.KB[row(t)] + j, load(in.k[t0 + t] + j) * inverse[q]);
      store(x.KB[second(t)] + j, load(in.b[t0 + t] + j) * inverse[q]);
      store(x.VU[row(t)] + j, load(in.v[t0 + t] + j));
      store(x.VU[second(t)] + j, load(in.removed[t0 + t] + j));
    }
  for (int t = n; t < C; t++)
    for (int j = 0; j < N / W; j++) store(x.P[t + 1] + j * W, P[j]);
}

// The a-rows see earlier tokens only, the r-rows the same token too.
struct Mask {
  int32_t keep[C2][C2];
  constexpr Mask() : keep{} {
    for (int t = 0; t < C; t++)
      for (int s = 0; s < C; s++) {
        keep[row(t)][row(s)] = keep[row(t)][second(s)] = s < t ? -1 : 0;
        keep[second(t)][row(s)] = keep[second(t)][second(s)] = s <= t ? -1 : 0;
      }
  }
};
alignas(64) constexpr Mask kMask;

INLINE void mask(float (*M)[C2]) {
  for (int t = 0; t < C2; t++)
    for (int s = 0; s < C2; s += W) {
      vi keep;
      memcpy(&keep, kMask.keep[t] + s, sizeof keep);
      store(M[t] + s, (vf)((vi)load(M[t] + s) & keep));
    }
}

// The state before a chunk -> the state after it.
template <int N>
void roll(const float* S, const Chunk<N>& x, float* next) {
  matmul<N, N, C2, From::start>(x.VU[0], 1, N, x.KB[0], N, next, N, S, x.P[C]);
}

template <int N, int V, class T>
INLINE void load_dy(Pull<N, V>& y, const Inputs<N, T>& in, int64_t t0, int n, int64_t value) {
  for (int t = 0; t < C; t++)
    if (t < n)
      widen<V>(y.ZY[second(t)], in.dy[t0 + t] + value);
    else
      memset(y.ZY[second(t)], 0, sizeof y.ZY[0]);
}

// ZY from G = E: what the chunk's values, and the rows u, receive.
template <int N, int V>
void solve(Pull<N, V>& y, const float (*G)[N], const Chunk<N>& x) {
  transpose<C2, N>(x.KB[0], N, y.KBt[0], C2);
  matmul<C2, C2, N, From::zero>(x.AR[0], N, 1, y.KBt[0], C2, y.M[0], C2);
  mask(y.M);
  matmul<V, C2, N, From::zero>(G[0], N, 1, y.KBt[0], C2, y.dVUt[0], C2);
  transpose<V, C2>(y.dVUt[0], C2, y.dVU[0], V);
  matmul<C2, V, kHalf, From::self>(y.M[second(kHalf)], 1, C2, y.ZY[second(kHalf)], V, y.dVU[0], V);
  matmul<C, V, kHalf, From::self>(y.M[second(0)], 1, C2, y.ZY[second(0)], V, y.dVU[0], V);
  for (int i = 0; i < V; i += W) {
    vf z[C];
#pragma GCC unroll 8
    for (int t = 0; t < C; t++) z[t] = load(y.dVU[second(t)] + i);
#pragma GCC unroll 8
    for (int t = C - 1; t >= 0; t--) {
      store(y.ZY[row(t)] + i, z[t]);
#pragma GCC unroll 8
      for (int s = t - 1; s >= 0; s--) z[s] += y.M[row(t)][second(s)] * z[t];
    }
  }
}

// E becomes the gradient of the state before the chunk, times `scale`.
template <int N, int V>
INLINE void pull_back(float (*G)[N], const Pull<N, V>& y, const Chunk<N>& x, const float* scale) {
  matmul<V, N, C2, From::start>(y.ZY[0], 1, V, x.AR[0], N, G[0], N, G[0], scale);
}

// `ahead(i)`, for i = 0 .. C - 1, prefetches a little; in one burst it would fill the queues of the core and stall it.
template <int N, class T, class Ahead>
void chunk_gradients(BackwardScratch<N>& y, float (*G)[N], const Chunk<N>& x, const float* S, const float* scale, const Inputs<N, T>& in,
                     const Outputs<N, T>& out, int64_t t0, int n, Ahead ahead) {
  auto& [KBt, dVUt, M, dVU, ZY] = y.pull;
  solve(y.pull, G, x);
  ahead(0);
  matmul<kHalf, N, kHalf, From::self>(M[0], 1, C2, ZY[0], N, dVU[0], N);
  matmul<kHalf, N, kHalf, From::self>(M[C], 1, C2, ZY[C], N, dVU[0], N);
  matmul<kHalf, N, kHalf, From::self>(M[C] + C, 1, C2, ZY[C], N, dVU[C], N);
  ahead(1);
  transpose<C2, N>(x.VU[0], N, y.VUt[0], C2);
  matmul<C2, C2, N, From::zero>(ZY[0], N, 1, y.VUt[0], C2, y.dM[0], C2);
  mask(y.dM);
  ahead(2);
  matmul<C2, N, N, From::zero>(x.VU[0], N, 1, G[0], N, y.dKB[0], N);
  ahead(3);
  matmul<C, N, C2, From::self>(y.dM[0], 1, C2, x.AR[0], N, y.dKB[0], N);
  matmul<C, N, C, From::self>(y.dM[C] + C, 1, C2, x.AR[C], N, y.dKB[C], N);
  ahead(4);
  matmul<C2, N, N, From::zero>(ZY[0], N, 1, S, N, y.dAR[0], N);
  ahead(5);
  matmul<C, N, C, From::self>(y.dM[0], C2, 1, x.KB[0], N, y.dAR[0], N);
  matmul<C, N, C2, From::self>(y.dM[C], C2, 1, x.KB[0], N, y.dAR[C], N);
  vf suffix[N / W];
  for (int q = 0; q < N / W; q++) suffix[q] = load(y.suffix + q * W);
  for (int t = n - 1; t >= 0; t--)
#pragma GCC unroll 4
    for (int q = 0; q < N / W; q++) {
      const int j = q * W;
      const vf dA = load(y.dAR[row(t)] + j), dR = load(y.dAR[second(t)] + j), dK = load(y.dKB[row(t)] + j), dB = load(y.dKB[second(t)] + j);
      const vf inverse = load(x.inverse[t] + j);
      stream(out.dr[t0 + t] + j, dR * load(x.P[t + 1] + j) + in.more_dr.at(t0 + t, j));
      stream(out.da[t0 + t] + j, dA * load(x.P[t] + j));
      stream(out.dk[t0 + t] + j, dK * inverse + in.more_dk.at(t0 + t, j));
      stream(out.db[t0 + t] + j, dB * inverse);
      stream(out.dv[t0 + t] + j, load(dVU[row(t)] + j) + in.more_dv.at(t0 + t, j));
      suffix[q] += load(x.AR[second(t)] + j) * dR - load(x.KB[row(t)] + j) * dK - load(x.KB[second(t)] + j) * dB;
      stream(out.dw[t0 + t] + j, suffix[q] * load(x.slope[t] + j));
      suffix[q] += load(x.AR[row(t)] + j) * dA;
    }
  for (int q = 0; q < N / W; q++) store(y.suffix + q * W, suffix[q]);
  ahead(6);
  pull_back(G, y.pull, x, scale);
  ahead(7);
}

template <int N>
struct Ones {
  float value[N];
  constexpr Ones() : value{} {
    for (float& x : value) x = 1;
  }
};
template <int N>
alignas(64) constexpr Ones<N> kOnes;

template <int N, class T>
void backward(const Task& task, const Tensors& io, void* memory) {
  auto& y = *static_cast<BackwardScratch<N>*>(memory);
  for (int64_t h = 0; h < task.count; h++)
    if (task.d_end)
      memcpy(y.G[h], task.d_end + h * N * N, sizeof y.G[h]);
    else
      memset(y.G[h], 0, sizeof y.G[h]);
  for (int64_t first = (task.end - 1) / kCheckpoint * kCheckpoint; first >= task.begin; first -= kCheckpoint)
    for (int64_t h = 0; h < task.count; h++) {
      auto& G = y.G[h];
      const Inputs<N, T> in(io, task, h);
      const Outputs<N, T> out(io, task, h);
      const int tokens = int(min(task.end - first, kCheckpoint)), chunks = (tokens + C - 1) / C;
      const auto checkpoint = [&](int64_t t, int64_t h) {
        return task.checkpoints + ((t / kCheckpoint) * task.heads + task.head + h) * N * N;
      };
      const bool last = first + tokens == task.length;
      const auto before = [&](int c) { return c ? y.S[c - 1][0] : checkpoint(first, h); };
      for (int c = 0; c < chunks; c++) {
        prepare(y.chunk[c], in, first + c * C, int(min(tokens - c * C, C)));
        if (c + 1 < chunks || last) roll<N>(before(c), y.chunk[c], y.S[c][0]);
      }
      // The running gradient of log d begins afresh at each checkpoint, so that its rounding does not grow with the length.
      const float* S1 = last ? y.S[chunks - 1][0] : checkpoint(first + kCheckpoint, h);
      for (int j = 0; j < N; j += W) {
        vf sum{};
        const vf scale = load(y.chunk[chunks - 1].P[C] + j);
        for (int i = 0; i < N; i++) {
          const vf g = load(G[i] + j);
          sum += load(S1 + i * N + j) * g;
          store(G[i] + j, g * scale);
        }
        store(y.suffix + j, sum);
      }
      // What comes after this stretch: the next head's, or the first head's previous one.
      const int64_t next_h = h + 1 < task.count ? h + 1 : 0, next_first = next_h ? first : first - kCheckpoint;
      const int next_tokens = next_first < task.begin ? 0 : int(min(task.end - next_first, kCheckpoint));
      const Inputs<N, T> next(io, task, next_h);
      for (int c = chunks - 1; c >= 0; c--) {
        const int64_t t0 = first + c * C;
        const int n = int(min(tokens - c * C, C));
        load_dy(y.pull, in, t0, n, 0);
        const auto ahead = [&](int i) {
          if (c * C + i >= next_tokens) return;
          next.prefetch(next_first + c * C + i);
          const float* state = checkpoint(next_first, next_h);
          for (int row = c * C + i; row < N; row += kCheckpoint) prefetch_row<N>(state + row * N);
        };
        chunk_gradients(y, G, y.chunk[c], before(c), c ? y.chunk[c - 1].P[C] : kOnes<N>.value, in, out, t0, n, ahead);
      }
    }
  end_of_stream();
  if (task.d_begin) memcpy(task.d_begin, y.G, task.count * sizeof y.G[0]);
}

// The gradient of the state at every checkpoint, for a slab of value channels, and nothing else.
template <int N, class T>
void scan(const Task& task, const Tensors& io, void* memory) {
  constexpr int V = slab(N);
  auto& y = *static_cast<ScanScratch<N>*>(memory);
  const Inputs<N, T> in(io, task, 0);
  if (task.d_end)
    memcpy(y.G, task.d_end + task.value * N, sizeof y.G);
  else
    memset(y.G, 0, sizeof y.G);
  for (int64_t t0 = (task.length - 1) / C * C; t0 >= 0; t0 -= C) {
    const int n = int(min(task.length - t0, C));
    prepare(y.chunk, in, t0, n);
    for (int i = 0; i < V; i++)
      for (int j = 0; j < N; j += W) store(y.G[i] + j, load(y.G[i] + j) * load(y.chunk.P[C] + j));
    load_dy(y.pull, in, t0, n, task.value);
    solve(y.pull, y.G, y.chunk);
    pull_back(y.G, y.pull, y.chunk, kOnes<N>.value);
    if (t0 % kCheckpoint == 0) {
      float* to = t0 ? task.d_checkpoints + ((t0 / kCheckpoint) * task.heads + task.head) * N * N : task.d_begin;
      memcpy(to + task.value * N, y.G, sizeof y.G);
    }
  }
}

template <int N, class T>
wkv7::Kernels kernels() {
  constexpr int V = slab(N);
  return {.forward = &forward<N, N, T>, .forward_slab = &forward<N, V, T>, .backward = &backward<N, T>, .scan = &scan<N, T>,
          .forward_scratch = sizeof(ForwardScratch<N, N>), .backward_scratch = sizeof(BackwardScratch<N>),
          .scan_scratch = sizeof(ScanScratch<N>), .slab = V};
}

template <int N>
wkv7::Kernels kernels(bool is_bf16) {
  return is_bf16 ? kernels<N, bf16>() : kernels<N, float>();
}

}  // namespace

namespace wkv7 {

Kernels KERNELS_OF(ISA)(int64_t head_size, bool is_bf16) {
  switch (head_size) {
    case 16: return kernels<16>(is_bf16);
    case 32: return kernels<32>(is_bf16);
    case 64: return kernels<64>(is_bf16);
    case 128: return kernels<128>(is_bf16);
    default: return {};
  }
}

}  // namespace wkv7
