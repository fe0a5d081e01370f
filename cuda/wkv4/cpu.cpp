// WKV4 on the CPU: lanes are channels, a thread has a strip of them and walks through the tokens. Compiled once per
// instruction set (common/isa.h).
//
// With a, b, p the state before a token, and two pairs of weights, of each of which the larger one is 1:
//     e, e' = exp(p - q), exp(u + k - q)    q = max(p, u + k)      y  = (e a + e' v) / (e b + e')
//     f, f' = exp(p + w - q), exp(k - q)    q = max(p + w, k)      a' = f a + f' v,   b' = f b + f',   p' = q
// Backward, with ga, gb the gradients of a', b', and z = dy / (e b + e'):
//     dv = f' ga + e' z    du += e' z (v - y)    dk = e' z (v - y) + f' (ga v + gb)    dw += f (ga a + gb b)
//     ga, gb = f ga + e z, f gb - e z y    (from here on those of a, b)
// Every factor is at most 1: nothing overflows, whatever the keys. What the loss takes of p itself goes to the token or
// to the state that was q.
#include "cpu.h"

#include "../common/simd.h"

namespace {

using wkv4::kCheckpoint;
using wkv4::Kernels;
using wkv4::Task;

constexpr float kEmpty = -1e38f;
constexpr int kAhead = 16;  // tokens that are fetched before their turn: rows lie too far apart for the processor to guess

// exp(old - q) and exp(fresh - q), q the larger of them. A NaN stays one.
struct Weights {
  vf old, fresh;
  vi stays;  // old is the larger

  INLINE Weights(vf old_exponent, vf fresh_exponent) {
    const vf difference = old_exponent - fresh_exponent;
    const vf less = exp_nonpositive((vf)((vu)difference | 0x80000000u));
    stays = difference > 0.f;
    old = select(stays, splat(1.f), less);
    fresh = select(stays, less, splat(1.f));
  }
};

struct State {
  vf a, b, p;

  INLINE void load_from(const float* from, int64_t C) { a = load(from), b = load(from + C), p = load(from + 2 * C); }
  INLINE void store_to(float* to, int64_t C) const { store(to, a), store(to + C, b), store(to + 2 * C, p); }
  INLINE void advance(vf w, vf k, vf v) {
    const Weights f(p + w, k);
    a = f.old * a + f.fresh * v;
    b = f.old * b + f.fresh;
    p = select(f.stays, p + w, k);
  }
};

template <int NR, class T>
INLINE void forward_of(const Task& task, int64_t c) {
  const int64_t C = task.C;
  const T *k = static_cast<const T*>(task.k) + c, *v = static_cast<const T*>(task.v) + c;
  T* y = static_cast<T*>(task.y) + c;
  State state[NR];
  vf w[NR], u[NR];
#pragma GCC unroll 4
  for (int i = 0; i < NR; i++) {
    w[i] = load(task.w + c + i * W), u[i] = load(task.u + c + i * W);
    if (task.initial)
      state[i].load_from(task.initial + c + i * W, C);
    else
      state[i] = {vf{}, vf{}, splat(kEmpty)};
  }
  for (int64_t t = 0; t < task.T; t++, k += C, v += C, y += C) {
    if (task.checkpoints && t % kCheckpoint == 0)
#pragma GCC unroll 4
      for (int i = 0; i < NR; i++) state[i].store_to(task.checkpoints + t / kCheckpoint * 3 * C + c + i * W, C);
    if (t + kAhead < task.T)
      for (int i = 0; i < NR * W; i += 64 / int(sizeof(T))) prefetch_line(k + kAhead * C + i), prefetch_line(v + kAhead * C + i);
#pragma GCC unroll 4
    for (int i = 0; i < NR; i++) {
      const vf kt = load(k + i * W), vt = load(v + i * W);
      const Weights e(state[i].p, u[i] + kt);
      store(y + i * W, (e.old * state[i].a + e.fresh * vt) / (e.old * state[i].b + e.fresh));
      state[i].advance(w[i], kt, vt);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < NR; i++) state[i].store_to(task.final + c + i * W, C);
}

template <int NR, class T>
INLINE void backward_of(const Task& task, int64_t c) {
  const int64_t C = task.C;
  const T *k = static_cast<const T*>(task.k) + c, *v = static_cast<const T*>(task.v) + c, *dy = static_cast<const T*>(task.dy) + c;
  T *dk = static_cast<T*>(task.dk) + c, *dv = static_cast<T*>(task.dv) + c;
  State before[kCheckpoint][NR];
  vf w[NR], u[NR], dw[NR], du[NR], ga[NR], gb[NR], gp[NR];
#pragma GCC unroll 4
  for (int i = 0; i < NR; i++) {
    w[i] = load(task.w + c + i * W), u[i] = load(task.u + c + i * W);
    dw[i] = du[i] = ga[i] = gb[i] = gp[i] = vf{};
    if (const float* d = task.d_final) ga[i] = load(d + c + i * W), gb[i] = load(d + C + c + i * W), gp[i] = load(d + 2 * C + c + i * W);
  }
  for (int64_t first = (task.T - 1) / kCheckpoint * kCheckpoint; first >= 0; first -= kCheckpoint) {
    const int n = int(task.T - first < kCheckpoint ? task.T - first : kCheckpoint);
#pragma GCC unroll 4
    for (int i = 0; i < NR; i++) before[0][i].load_from(task.checkpoints + first / kCheckpoint * 3 * C + c + i * W, C);
    for (int t = 0; t + 1 < n; t++)
#pragma GCC unroll 4
      for (int i = 0; i < NR; i++) {
        before[t + 1][i] = before[t][i];
        before[t + 1][i].advance(w[i], load(k + (first + t) * C + i * W), load(v + (first + t) * C + i * W));
      }
    vf dw_here[NR], du_here[NR];  // of this stretch alone: long sums would lose digits
#pragma GCC unroll 4
    for (int i = 0; i < NR; i++) dw_here[i] = du_here[i] = vf{};
    for (int t = n - 1; t >= 0; t--)
#pragma GCC unroll 4
      for (int i = 0; i < NR; i++) {
        const int64_t at = (first + t) * C + i * W;
        const vf kt = load(k + at), vt = load(v + at);
        const State s = before[t][i];
        const Weights e(s.p, u[i] + kt), f(s.p + w[i], kt);
        const vf inverse = 1.f / (e.old * s.b + e.fresh), y = (e.old * s.a + e.fresh * vt) * inverse, z = load(dy + at) * inverse;
        const vf bonus = e.fresh * z * (vt - y);
        store(dv + at, f.fresh * ga[i] + e.fresh * z);
        store(dk + at, bonus + f.fresh * (ga[i] * vt + gb[i]) + select(f.stays, vf{}, gp[i]));
        gp[i] = select(f.stays, gp[i], vf{});
        dw_here[i] += f.old * (ga[i] * s.a + gb[i] * s.b) + gp[i];
        du_here[i] += bonus;
        ga[i] = f.old * ga[i] + e.old * z;
        gb[i] = f.old * gb[i] - e.old * z * y;
      }
#pragma GCC unroll 4
    for (int i = 0; i < NR; i++) dw[i] += dw_here[i], du[i] += du_here[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < NR; i++) {
    store(task.dw + c + i * W, dw[i]), store(task.du + c + i * W, du[i]);
    State{ga[i], gb[i], ga[i] * before[0][i].a + gb[i] * before[0][i].b + gp[i]}.store_to(task.d_initial + c + i * W, C);
  }
}

// The recurrence of one vector waits for itself at every token: several side by side fill the time.
template <class T>
void forward(const Task& given) {
  const Task task = given;  // a copy, which no store below can change
  int64_t c = task.begin;
  for (; c + 4 * W <= task.end; c += 4 * W) forward_of<4, T>(task, c);
  for (; c < task.end; c += W) forward_of<1, T>(task, c);
}

template <class T>
void backward(const Task& given) {
  const Task task = given;
  int64_t c = task.begin;
  for (; c + 2 * W <= task.end; c += 2 * W) backward_of<2, T>(task, c);
  for (; c < task.end; c += W) backward_of<1, T>(task, c);
}

void collect(const float* parts, int64_t count, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += W) {
    vf total{};
    for (int64_t j = 0; j < count; j++) total += load(parts + j * n + i);
    store(to + i, total);
  }
}

template <class T>
Kernels kernels() {
  return {forward<T>, backward<T>, collect};
}

}  // namespace

namespace wkv4 {

Kernels KERNELS_OF(ISA)(bool is_bf16) { return is_bf16 ? kernels<bf16>() : kernels<float>(); }

}  // namespace wkv4
