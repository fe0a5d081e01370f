// What turning each single bit of a row would change, exactly, in O(T^2) time whatever the symbols are. Included in cpu.cpp.
//
// For an output i and an end of match j < i, at lag d = i - j, let L1 < L2 < L3 be how far back the first, second and third mismatch lie (j + 1,
// the beginning, where there is none), D1 and D2 the bits in which the symbols differ at the first two. One symbol on, each L is one more where
// it matches; where it does not, it is the new first mismatch. Turning bit b of k_t does to the match at j, with s = j - L1 the place of its mismatch,
//
//     t > j or t < s    nothing               s < t <= j   cuts it to j - t               t = s and D1 = b    lengthens it to L2
//
// and turning that of q_t, with m = i - t: nothing where L1 < m, a cut to m where L1 > m, L2 where L1 = m and D1 = b. Where q = k both sides turn
// at once: at the offset j - t, if that is not negative, and at i - t, which lies further back. So the longest match after a turn at t is the best
// of a few maxima over j, which all fall out of one pass over j and one over t. Only two kinds of t matter: those inside the match that won, and
// those where another is lengthened beyond it.
#pragma once

#include "cpu.h"

namespace {

using rosa::Flips;
using rosa::Memory;

// A match: its length, then where the output comes from, behind its end. The larger one wins.
using Match = uint64_t;
INLINE Match match(int64_t length, int64_t j) { return Match(length) << 32 | Match(j + 1); }
INLINE int64_t length_of(Match m) { return int64_t(m >> 32); }
INLINE int64_t source_of(Match m) { return int64_t(uint32_t(m)); }
INLINE Match better(Match a, Match b) { return a > b ? a : b; }

template <class Lag>
Lag largest(const Lag* __restrict x, int64_t n) {
  Lag most = 0;
  for (int64_t c = 0; c < n; c++) most = x[c] > most ? x[c] : most;
  return most;
}

// Where x, which is there, is first.
template <class Lag>
int64_t place_of(const Lag* __restrict from, Lag x) {
  for (int64_t begin = 0;; begin += 32) {  // up to 64 numbers behind the end exist
    Lag found = 0;
    for (int c = 0; c < 32; c++) found |= from[begin + c] == x;
    if (found)
      while (from[begin] != x) begin++;
    if (found) return begin;
  }
}

// Lag: an integer that holds T, the narrower the faster.
template <bool SELF, class Lag>
class Turns {
  const Flips& f;
  const int64_t T, M;
  Lag *L1, *L2, *L3, *D1, *D2;  // by lag, lag 1 first
  const uint8_t *values, *backwards;  // v; k, the last symbol first
  Match *own, *starts, *later;  // of an output: the match at j; by s + 1 the last one; by t the best one with s > t
  Match *longer, *longer_q;  // by t M + bit: the best that is lengthened; the same by m M + bit, where q turns alone
  uint32_t *by_length, *by_cut;  // the source of the last match by L1; and by the first t, j < t, from which on it is cut to i - t
  int32_t* beyond;  // t M + bit where a turn outside the match that won lengthens another beyond it
  float* weight;  // of the output by its symbol, behind that of a miss
  // The output in hand: the match that won, the last and the place before the first of its symbols, in k and in q; what it is worth.
  int64_t i = 0, length = 0, j_won = -1, s_won = -1, q_won = 0, beyonds = 0;
  Match won = 0;
  float before = 0;

 public:
  Turns(const Flips& flips, Memory& memory) : f(flips), T(flips.T), M(flips.M) {
    const size_t n = size_t(T) + 1, padded = (n + 63) / 64 * 64, matches = (3 + 2 * M) * n, numbers = (2 + M) * n, weights = (size_t(1) << M) + 1;
    memory.resize(matches * sizeof(Match) + (numbers + weights) * 4 + 5 * padded * sizeof(Lag) + n);
    own = reinterpret_cast<Match*>(memory.data()), starts = own + n, later = own + 2 * n, longer = own + 3 * n, longer_q = longer + M * n;
    by_length = reinterpret_cast<uint32_t*>(own + matches), by_cut = by_length + n, beyond = reinterpret_cast<int32_t*>(by_cut + n);
    weight = reinterpret_cast<float*>(beyond + M * n);
    L1 = reinterpret_cast<Lag*>(weight + weights), L2 = L1 + padded, L3 = L2 + padded, D1 = L3 + padded, D2 = D1 + padded;
    uint8_t* const b = reinterpret_cast<uint8_t*>(D2 + padded);
    const uint8_t* k = SELF ? f.q : f.k;
    for (int64_t j = 0; j < T; j++) b[j] = k[T - 1 - j];
    backwards = b, values = SELF ? f.q : f.v;
    memset(longer, 0, 2 * M * n * sizeof(Match));
    memset(by_length, 0, n * 4);
    memset(L1, 0, 5 * padded * sizeof(Lag));
    for (float* d : {f.dq, f.dk, f.dv})
      if (d) memset(d, 0, T * M * 4);
    for (int b = 0; b < M; b++) f.dlow[b] = f.dhigh[b] = 0;
  }

  void run() {
    for (; i < T; i++) {
      find_match();
      if (!weigh() || !f.dq) continue;
      sort_matches();
      if (SELF && length) {
        turn_inside(q_won > j_won ? q_won : j_won, i);
        if (!inside(j_won + 1)) turn_copied();
      } else if (!SELF) {
        turn_queries();
        if (length) turn_inside(i - 1, i - 1), turn_v();
      }
      turn_beyond();
    }
  }

 private:
  // Whether a turn at t, in k or on both sides, changes the match that won.
  INLINE bool inside(int64_t t) const { return (t > s_won && t <= j_won) || (SELF && t > q_won); }
  INLINE float worth(Match m) const { return length_of(m) ? weight[1 + values[source_of(m)]] : weight[0]; }
  INLINE float worth_turned(Match m, int64_t b) const { return length_of(m) ? weight[1 + (values[source_of(m)] ^ (1 << b))] : weight[0]; }

  static void advance(int64_t n, uint8_t symbol, const uint8_t* __restrict k, Lag* __restrict L1, Lag* __restrict L2, Lag* __restrict L3, Lag* __restrict D1,
                      Lag* __restrict D2) {
    for (int64_t c = 0; c < n; c++) {
      const Lag differ = k[c] ^ symbol, first = L1[c], second = L2[c], d = D1[c];
      if constexpr (SELF) {
        L3[c] = (differ ? second : L3[c]) + 1;
        D2[c] = differ ? d : D2[c];
      }
      L2[c] = (differ ? first : second) + 1;
      L1[c] = differ ? 0 : first + 1;
      D1[c] = differ ? differ : d;
    }
  }

  // One symbol on, and the match that wins there: as long as the last one goes on, it does (automaton.cpp says why).
  void find_match() {
    advance(i, f.q[i], backwards + T - i, L1, L2, L3, D1, D2);
    const int64_t lag = i - 1 - j_won;  // of the last one
    if (length && L1[lag - 1]) {
      length++, j_won++;
    } else {
      const Lag longest = largest(L1, i);
      length = longest, j_won = i - 1 - (longest ? place_of(L1, longest) : 0);
    }
    s_won = j_won - length, q_won = i - length;
    won = length ? match(length, j_won) : 0;
  }

  // Weights of the output's symbols; the sums for `low` and `high`. False where nothing depends on this output.
  bool weigh() {
    const float* g = f.dout + i * M;
    float bottom = 0;
    bool any = false;
    for (int64_t b = 0; b < M; b++) bottom += g[b] * f.low[b], any |= g[b] != 0;
    if (!any) return false;
    weight[0] = f.miss_low ? bottom : 0, weight[1] = bottom;
    for (int64_t b = 0; b < M; b++)
      for (int64_t y = 0; y < int64_t(1) << b; y++) weight[1 + (int64_t(1) << b) + y] = weight[1 + y] + g[b] * (f.high[b] - f.low[b]);
    before = worth(won);
    if (length || f.miss_low)
      for (int64_t b = 0; b < M; b++) (length && values[source_of(won)] >> b & 1 ? f.dhigh : f.dlow)[b] += g[b];
    return i > 0;
  }

  void sort_matches() {
    memset(starts, 0, (i + 2) * sizeof(Match));
    if (SELF) memset(by_cut, 0, (i + 1) * 4);
    for (int64_t c = i - 1; c >= 0; c--) {  // the last match comes last
      const int64_t j = i - 1 - c, L = L1[c], s = j - L;
      const Match here = match(L, j);
      own[j] = here;
      starts[s + 1] = here;
      if (SELF)
        by_cut[i - L > j ? i - L : j + 1] = uint32_t(j + 1);
      else
        by_length[L] = uint32_t(j + 1);
      lengthen_at(c);
    }
  }

  // The turns that lengthen the match at a lag, if one bit can.
  INLINE void lengthen_at(int64_t c) {
    const uint32_t differ = D1[c];  // 0: nothing does, s = -1
    if (differ == 0 || (differ & (differ - 1))) return;
    const int64_t b = M == 1 ? 0 : __builtin_ctz(differ), j = i - 1 - c, L = L1[c], s = j - L, second = L2[c];
    if constexpr (SELF) {
      const int64_t other = i - s;  // q turns there, after k has turned at the mismatch
      lengthen(s, b, match(second < other ? second : second > other ? other : D2[c] == differ ? L3[c] : second, j));
      if (i - L > j) lengthen(i - L, b, match(second, j));
    } else {
      longer_q[L * M + b] = better(longer_q[L * M + b], match(second, j));
      lengthen(s, b, match(second, j));
    }
  }
  INLINE void lengthen(int64_t t, int64_t b, Match to) {
    Match& there = longer[t * M + b];
    if (inside(t)) {
      there = better(there, to);
    } else if (to > won) {
      if (!there) beyond[beyonds++] = int32_t(t * M + b);
      there = better(there, to);
    }
  }

  // q alone, m symbols back: what matched further matches so far, the last of it.
  void turn_queries() {
    uint32_t last = 0;
    for (int64_t m = length; m >= 0; m--) {
      last = by_length[m] > last ? by_length[m] : last;
      by_length[m] = 0;
      const Match cut = m ? Match(m) << 32 | last : 0;
      for (int64_t b = 0; b < M; b++) {
        Match& to = longer_q[m * M + b];
        f.dq[(i - m) * M + b] += worth(better(cut, to)) - before;
        to = 0;
      }
    }
  }

  // k, or both sides, in the match that won: t in (s_won, j_won] and in (begin, end].
  void turn_inside(int64_t begin, int64_t end) {
    Match best = 0;
    const auto starting = [&](int64_t t) { best = better(best, starts[t + 1]); };
    for (int64_t t = i - 1; t > end; t--) starting(t);
    for (int64_t t = end; t > begin; t--) later[t] = best, starting(t);
    for (int64_t t = begin; t > j_won; t--) starting(t);
    for (int64_t t = j_won; t > s_won; t--) later[t] = best, starting(t);

    Match untouched = 0, started = starts[0] & 0xffffffff;  // the best of those with j < t; the last of those with s <= t
    uint32_t cut = 0;  // the last of those with j < t that are cut to i - t
    const auto pass = [&](int64_t t) {
      if (t) untouched = better(untouched, own[t - 1]);
      started = better(started, starts[t + 1] & 0xffffffff);
      if (SELF) cut = by_cut[t] > cut ? by_cut[t] : cut;
    };
    const auto turn = [&](int64_t t) {
      const int64_t m = i - t;
      Match r = untouched;
      if (SELF && length_of(untouched) >= m) r = m ? Match(m) << 32 | cut : 0;
      r = better(r, later[t]);
      if (int64_t(started) > t) r = better(r, match(int64_t(started) - 1 - t, int64_t(started) - 1));
      float* const d = SELF ? f.dq : f.dk;
      for (int64_t b = 0; b < M; b++) {
        Match& to = longer[t * M + b];
        const Match wins = better(r, to);
        d[t * M + b] += (SELF && source_of(wins) == t ? worth_turned(wins, b) : worth(wins)) - before;
        to = 0;
      }
    };
    for (int64_t t = 0; t <= s_won; t++) pass(t);
    for (int64_t t = s_won + 1; t <= j_won; t++) pass(t), turn(t);
    for (int64_t t = j_won + 1; t <= begin; t++) pass(t);
    for (int64_t t = begin + 1; t <= end; t++) pass(t), turn(t);
  }

  void turn_v() {
    for (int64_t b = 0; b < M; b++) f.dv[source_of(won) * M + b] += worth_turned(won, b) - before;
  }

  // The symbol that was put out turns, the match that won stays.
  void turn_copied() {
    const int64_t t = source_of(won);
    for (int64_t b = 0; b < M; b++)
      if (!longer[t * M + b]) f.dq[t * M + b] += worth_turned(won, b) - before;
  }

  void turn_beyond() {
    float* const d = SELF ? f.dq : f.dk;
    for (; beyonds > 0; beyonds--) {
      const int64_t place = beyond[beyonds - 1], t = place / M;
      const Match wins = longer[place];
      d[place] += (SELF && source_of(wins) == t ? worth_turned(wins, place % M) : worth(wins)) - before;
      longer[place] = 0;
    }
  }
};

}  // namespace
