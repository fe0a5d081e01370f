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

#include "../common/simd.h"
#include "cpu.h"

namespace {

using rosa::Flips;
using rosa::Memory;

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

// A vector of integers, and the best of each lane and those before it, or (BACK) behind it, and of `carry`, which becomes the best of all.
template <class Number>
struct Lanes {
  static constexpr int count = 4 * W / sizeof(Number);
  typedef Number Vector __attribute__((vector_size(4 * W)));
  typedef Number Memory __attribute__((vector_size(4 * W), aligned(sizeof(Number)), may_alias));

  static INLINE Vector load(const Number* p) { return *reinterpret_cast<const Memory*>(p); }
  static INLINE void store(Number* p, Vector x) { *reinterpret_cast<Memory*>(p) = x; }
  static INLINE Vector better(Vector a, Vector b) { return a > b ? a : b; }
  template <bool BACK, int STEP = 1>
  static INLINE Vector so_far(Vector x) {
    if constexpr (STEP < count) {
      Vector from{};
      for (int n = 0; n < count; n++) from[n] = BACK ? (n + STEP < count ? n + STEP : count) : (n >= STEP ? n - STEP : count);
#if defined(__clang__)
      Vector moved{};
      for (int n = 0; n < count; n++) moved[n] = from[n] < count ? x[from[n]] : 0;
#else
      const Vector moved = __builtin_shuffle(x, Vector{}, from);
#endif
      x = so_far<BACK, 2 * STEP>(better(x, moved));
    }
    return x;
  }
  template <bool BACK>
  static INLINE Vector so_far(Vector x, Vector& carry) {
    x = better(so_far<BACK>(x), carry);
    carry = x[BACK ? 0 : count - 1] - Vector{};
    return x;
  }
};

// Lag: an integer that holds T, the narrower the faster. BITS: of a symbol, 0: any number.
template <bool SELF, int BITS, class Lag>
class Turns {
  // A match: its length, then where the output comes from, behind its end. The larger one wins.
  using Match = std::conditional_t<sizeof(Lag) == 2, uint32_t, uint64_t>;
  using Many = Lanes<Match>;
  using Vector = typename Many::Vector;
  static constexpr int kSource = 8 * sizeof(Lag);  // bits of a source
  static INLINE Match match(int64_t length, int64_t j) { return Match(length) << kSource | Match(j + 1); }
  static INLINE int64_t length_of(Match m) { return int64_t(m >> kSource); }
  static INLINE int64_t source_of(Match m) { return int64_t(Lag(m)); }
  static INLINE Match better(Match a, Match b) { return a > b ? a : b; }

  const Flips& f;
  const int64_t T;
  Lag *L1, *L2, *L3, *D1, *D2;  // by lag, lag 1 first
  const uint8_t *values, *backwards;  // v; k, the last symbol first
  // Of an output, by t: the match that ends before t; the best with s > t; the source of the last by s + 1; that of the last by the first t, j < t,
  // from which on it is cut to i - t. And the source of the last match by L1.
  Match *ends, *later, *starts, *by_cut, *by_length;
  Match *longer, *longer_q;  // by t M + bit: the best that is lengthened; the same by m M + bit, where q turns alone
  int32_t* beyond;  // t M + bit where a turn outside the match that won lengthens another beyond it
  float* weight;  // of the output by its symbol, behind that of a miss
  // The output in hand: the match that won, the last and the place before the first of its symbols, in k and in q; what it is worth.
  int64_t i = 0, length = 0, j_won = -1, s_won = -1, q_won = 0, beyonds = 0;
  Match won = 0;
  float before = 0;

 public:
  Turns(const Flips& flips, Memory& memory) : f(flips), T(flips.T) {
    const int64_t M = bits();
    const size_t n = (size_t(T) + 127) / 64 * 64, weights = (size_t(1) << M) + 1;  // a vector and more behind T
    memory.resize((5 + 2 * M) * n * sizeof(Match) + (M * n + weights) * 4 + 5 * n * sizeof(Lag) + n);
    ends = reinterpret_cast<Match*>(memory.data()), later = ends + n, starts = later + n, by_cut = starts + n, by_length = by_cut + n;
    longer = by_length + n, longer_q = longer + M * n, beyond = reinterpret_cast<int32_t*>(longer_q + M * n);
    weight = reinterpret_cast<float*>(beyond + M * n);
    L1 = reinterpret_cast<Lag*>(weight + weights), L2 = L1 + n, L3 = L2 + n, D1 = L3 + n, D2 = D1 + n;
    uint8_t* const b = reinterpret_cast<uint8_t*>(D2 + n);
    const uint8_t* k = SELF ? f.q : f.k;
    for (int64_t j = 0; j < T; j++) b[j] = k[T - 1 - j];
    backwards = b, values = SELF ? f.q : f.v;
    memset(longer, 0, 2 * M * n * sizeof(Match));
    memset(by_length, 0, n * sizeof(Match));
    memset(L1, 0, 5 * n * sizeof(Lag));
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
        turn_inside();
        if (!inside(j_won + 1)) turn_copied();
      } else if (!SELF) {
        turn_queries();
        if (length) turn_inside(), turn_v();
      }
      turn_beyond();
    }
  }

 private:
  INLINE int64_t bits() const { return BITS ? BITS : f.M; }
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
    const int64_t M = bits();
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
    const int64_t here = i;
    Match *const at_end = ends, *const at_start = starts, *const at_cut = SELF ? by_cut : by_length;
    memset(at_start, 0, (here + Many::count + 2) * sizeof(Match));
    if (SELF) memset(at_cut, 0, (here + Many::count) * sizeof(Match));
    const Lag *const lengths = L1, *const differ = D1;
    at_end[0] = 0;
    for (int64_t j = 0; j < here; j++) {  // the last match comes last
      const int64_t c = here - 1 - j, first = lengths[c];
      at_end[j + 1] = match(first, j);
      at_start[j - first + 1] = Match(j + 1);
      at_cut[!SELF ? first : here - first > j ? here - first : j + 1] = Match(j + 1);
      if (differ[c] && (BITS == 1 || !(differ[c] & (differ[c] - 1)))) lengthen_at(c);
    }
  }

  // The turns that lengthen the match at a lag, if one bit can.
  INLINE void lengthen_at(int64_t c) {
    const uint32_t differ = D1[c];  // 0: nothing does, s = -1
    const int64_t M = bits(), b = BITS == 1 ? 0 : __builtin_ctz(differ), j = i - 1 - c, L = L1[c], s = j - L, second = L2[c];
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
    Match& there = longer[t * bits() + b];
    if (inside(t)) {
      there = better(there, to);
    } else if (to > won) {
      if (!there) beyond[beyonds++] = int32_t(t * bits() + b);
      there = better(there, to);
    }
  }

  // q alone, m symbols back: what matched further matches so far, the last of it.
  void turn_queries() {
    const int64_t M = bits();
    Match last = 0;
    for (int64_t m = length; m >= 0; m--) {
      last = by_length[m] > last ? by_length[m] : last;
      by_length[m] = 0;
      const Match cut = m ? Match(m) << kSource | last : 0;
      for (int64_t b = 0; b < M; b++) {
        Match& to = longer_q[m * M + b];
        f.dq[(i - m) * M + b] += worth(better(cut, to)) - before;
        to = 0;
      }
    }
  }

  // k, or both sides, inside the match that won.
  void turn_inside() {
    const int64_t M = bits(), here = i, size = Many::count, last = j_won, first = s_won, first_q = SELF ? q_won : here;
    Vector lane{}, behind{}, untouched{}, cut{}, started = starts[0] - Vector{};
    for (int n = 0; n < size; n++) lane[n] = Match(n);
    for (int64_t t = here / size * size; t >= 0; t -= size) {  // a match that begins at t or later
      const Vector source = Many::load(starts + t + 2), at = lane + Match(t + 1);
      Many::store(later + t, Many::template so_far<true>(source != 0 ? (source - 1 - at) << kSource | source : Vector{}, behind));
    }
    float* const d = SELF ? f.dq : f.dk;
    const float *const weights = weight, unturned = before;
    const uint8_t* const v = values;
    Match* const lengthened = longer;
    for (int64_t t = 0; t <= here; t += size) {
      const Vector at = lane + Match(t), m = Match(here) - at;
      Vector r = Many::template so_far<false>(Many::load(ends + t), untouched);
      if (SELF) r = r >> kSource >= m ? m << kSource | Many::template so_far<false>(Many::load(by_cut + t), cut) : r;
      const Vector source = Many::template so_far<false>(Many::load(starts + t + 1), started);
      if ((t > last || t + size <= first + 1) && t + size <= first_q + 1) continue;
      r = Many::better(r, Many::load(later + t));
      r = Many::better(r, source > at ? (source - 1 - at) << kSource | source : Vector{});
      if constexpr (BITS == 1 && sizeof(Match) == sizeof(float))
        if (t + size <= T) {
          turn_block(t, at, r);
          continue;
        }
      Match best[Many::count];
      Many::store(best, r);
      for (int64_t place = t; place < t + size && place <= here; place++) {
        if ((place <= first || place > last) && place <= first_q) continue;
        for (int64_t b = 0; b < M; b++) {
          Match& to = lengthened[place * M + b];
          const Match wins = better(best[place - t], to);
          const int turned = SELF && source_of(wins) == place ? 1 << b : 0;
          d[place * M + b] += weights[length_of(wins) ? 1 + (v[source_of(wins)] ^ turned) : 0] - unturned;
          to = 0;
        }
      }
    }
  }

  // The last step of it for a vector of places whose symbols have one bit.
  INLINE void turn_block(int64_t t, Vector at, Vector r) {
    float* const d = (SELF ? f.dq : f.dk) + t;
    Vector in = (Vector)(at + 1 > Match(s_won + 1)) & (Vector)(at <= Match(j_won));
    if (SELF) in |= (Vector)(at > Match(q_won)) & (Vector)(at <= Match(i));
    const Vector lengthened = Many::load(longer + t), wins = in & Many::better(r, lengthened), source = wins & Match(Lag(-1));
    Match copied[Many::count];
    Many::store(copied, source);
    for (Match& y : copied) y = values[y];
    const Vector y = Many::load(copied) ^ ((Vector)(source == at) & Match(SELF));
    const vf hit = select((vi)(y != 0), splat(weight[2]), splat(weight[1])), worth = select((vi)(wins >> kSource != 0), hit, splat(weight[0]));
    store(d, load(d) + select((vi)in, worth - before, vf{}));
    Many::store(longer + t, ~in & lengthened);
  }

  void turn_v() {
    const int64_t M = bits();
    for (int64_t b = 0; b < M; b++) f.dv[source_of(won) * M + b] += worth_turned(won, b) - before;
  }

  // The symbol that was put out turns, the match that won stays.
  void turn_copied() {
    const int64_t M = bits();
    const int64_t t = source_of(won);
    for (int64_t b = 0; b < M; b++)
      if (!longer[t * M + b]) f.dq[t * M + b] += worth_turned(won, b) - before;
  }

  void turn_beyond() {
    const int64_t M = bits();
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
