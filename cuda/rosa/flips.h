// What turning each single bit of a row would change, exactly, in at most O(T^2) time whatever the symbols are. Included in cpu.cpp.
//
// For an output i and an end of match j < i, at lag d = i - j, let L1 < L2 < L3 be how far back the first, second and
// third mismatch lie (j + 1, the beginning, where there is none), D1 and D2 the bits in which the symbols differ at the
// first two. One symbol on, each L is one more where it matches; where it does not, it is the new first mismatch.
// Turning bit b of k_t does to the match at j, with s = j - L1 the place of its mismatch,
//
//     t > j or t < s    nothing               s < t <= j   cuts it to j - t               t = s and D1 = b    lengthens it to L2
//
// and turning that of q_t, with m = i - t: nothing where L1 < m, a cut to m where L1 > m, L2 where L1 = m and D1 = b.
// Where q = k both sides turn at once: at the offset j - t, if that is not negative, and at i - t, which lies further
// back. Only two kinds of t matter: those inside the match that won, and those where another is lengthened beyond it;
// after a turn at t the longest is the best of a few maxima over j.
//
// Few matches count one by one: those that overlap the one that won, and those that a turn can make win. A pass over
// the lags, a vector at a time, finds them; of the others only the best counts, and the last that is m long. Where q
// turns less than `few` symbols back a match can win from nearly anywhere, so there the best is sought by a pass of its
// own.
#pragma once

#include <algorithm>
#include <limits>

#include "../common/simd.h"
#include "cpu.h"

namespace {

using rosa::Flips;
using rosa::Memory;

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

// Where x, from a place on, is first at least `least`, which it is somewhere.
template <class Lag>
int64_t place_from(const Lag* __restrict x, int64_t begin, Lag least) {
  for (;; begin += 32) {
    Lag found = 0;
    for (int c = 0; c < 32; c++) found |= x[begin + c] >= least;
    if (found)
      while (x[begin] < least) begin++;
    if (found) return begin;
  }
}

// A vector of integers, and the best of each lane and those before it, or (BACK) behind it, and of `carry`, which becomes the best of all.
template <class Number, int COUNT = 4 * W / sizeof(Number)>
struct Lanes {
  static constexpr int count = COUNT;
  typedef Number Vector __attribute__((vector_size(COUNT * sizeof(Number))));
  typedef Number Memory __attribute__((vector_size(COUNT * sizeof(Number)), aligned(sizeof(Number)), may_alias));

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
  static INLINE Vector backwards(Vector x) {
    Vector from{};
    for (int n = 0; n < count; n++) from[n] = Number(count - 1 - n);
#if defined(__clang__)
    Vector moved{};
    for (int n = 0; n < count; n++) moved[n] = x[from[n]];
    return moved;
#else
    return __builtin_shuffle(x, from);
#endif
  }
  // Of numbers that are not negative.
  static INLINE Number largest(Vector x) { return so_far<true>(x)[0]; }
  // The lanes of a mask as bits.
  static INLINE uint64_t which(Vector mask) {
#if defined(__AVX512F__)
    if constexpr (sizeof(Number) == 2) return _mm512_movepi16_mask((__m512i)mask);
    if constexpr (sizeof(Number) == 4) return _mm512_movepi32_mask((__m512i)mask);
#else
    uint64_t bits = 0;
    for (int n = 0; n < count; n++) bits |= uint64_t(mask[n] & 1) << n;
    return bits;
#endif
  }
};

// Lag: a signed integer that holds T, the narrower the faster. BITS: of a symbol, 0: any number.
template <bool SELF, int BITS, class Lag>
class Turns {
  // A match: its length, then where the output comes from, behind its end. The larger one wins.
  using Match = std::conditional_t<sizeof(Lag) == 2, uint32_t, uint64_t>;
  using Many = Lanes<Match>;
  using Vector = typename Many::Vector;
  using Lags = Lanes<Lag>;
  using LagVector = typename Lags::Vector;
  using Bytes = Lanes<uint8_t, Lags::count>;
  using ManyLags = Lanes<Lag, Many::count>;
  static constexpr int kSource = 8 * sizeof(Lag);  // bits of a source
  static INLINE Match match(int64_t length, int64_t j) { return Match(length) << kSource | Match(j + 1); }
  static INLINE int64_t length_of(Match m) { return int64_t(m >> kSource); }
  static INLINE int64_t source_of(Match m) { return int64_t(m & ((Match(1) << kSource) - 1)); }
  static INLINE Match better(Match a, Match b) { return a > b ? a : b; }

  const Flips& f;
  const int64_t T;
  LagVector lanes{};  // 0, 1, 2 ...
  Lag *L1, *L2, *L3, *D1, *D2;  // by lag, lag 1 first; of D those of a single bit, else 0
  // The lags less one of the matches that count one by one, ascending; of those that overlap and begin alike the first
  Lag *overlapping, *to_lengthen;
  const uint8_t *values, *backwards;  // v; k, the last symbol first
  // Of an output, by place inside the match that won, from the first on: the source of the last match that begins after
  // the place before it (slot 0: or earlier); the best that begins there or later; where q = k, the source of the last
  // which, q turned there, is cut to what comes behind it.
  Match *starts, *later, *by_cut;
  Match *longer, *longer_q;  // by t M + bit: the best that is lengthened; the same by m M + bit, where q turns alone
  int32_t* beyond;  // t M + bit where a turn outside the match that won lengthens another beyond it
  float* weight;  // of the output by its symbol, behind that of a miss
  int64_t few = 1;  // see above
  // The output in hand: the match that won, its lag less one, the last and the place before the first of its symbols,
  // in k and in q; what it is worth.
  int64_t i = 0, length = 0, lag_won = -1, j_won = -1, s_won = -1, q_won = 0, beyonds = 0, overlaps = 0;
  bool joined = false;  // q = k, and the matches' symbols in k and in q overlap
  Match won = 0;
  float before = 0;

 public:
  Turns(const Flips& flips, Memory& memory) : f(flips), T(flips.T) {
    const int64_t M = bits();
    const size_t n = (size_t(T) + 127) / 64 * 64, weights = (size_t(1) << M) + 1;  // a vector and more behind T
    memory.resize((3 + 2 * M) * n * sizeof(Match) + (M * n + weights) * 4 + (Lags::count + 7 * n) * sizeof(Lag) + n);
    starts = reinterpret_cast<Match*>(memory.data()), later = starts + n, by_cut = later + n;
    longer = by_cut + n, longer_q = longer + M * n, beyond = reinterpret_cast<int32_t*>(longer_q + M * n);
    weight = reinterpret_cast<float*>(beyond + M * n);
    Lag* const before_lags = reinterpret_cast<Lag*>(weight + weights);  // no match
    L1 = before_lags + Lags::count, L2 = L1 + n, L3 = L2 + n, D1 = L3 + n, D2 = D1 + n, overlapping = D2 + n, to_lengthen = overlapping + n;
    uint8_t* const b = reinterpret_cast<uint8_t*>(to_lengthen + n);
    const uint8_t* k = SELF ? f.q : f.k;
    for (int64_t j = 0; j < T; j++) b[j] = k[T - 1 - j];
    memset(b + T, 0, n - T);
    backwards = b, values = SELF ? f.q : f.v;
    memset(longer, 0, 2 * M * n * sizeof(Match));
    memset(before_lags, 0, (Lags::count + 5 * n) * sizeof(Lag));
    for (float* d : {f.dq, f.dk, f.dv})
      if (d) memset(d, 0, T * M * 4);
    for (int b = 0; b < M; b++) f.dlow[b] = f.dhigh[b] = 0;
    for (int n = 0; n < Lags::count; n++) lanes[n] = Lag(n);
    for (int64_t rare = 1 << M; rare << M <= T / 16; rare <<= M) few++;  // random symbols leave about 16 matches that long
  }

  void run() {
    for (; i < T; i++) {
      find_match();
      if (!weigh() || !f.dq) continue;
      list_matches();
      if (length || !SELF) joined ? turn_inside(s_won + 1, i) : turn_queries();
      if (length && !joined) turn_inside(s_won + 1, j_won);
      if (length && !SELF) turn_v();
      if (length && SELF && !inside(j_won + 1)) turn_copied();
      turn_beyond();
    }
  }

 private:
  INLINE int64_t bits() const { return BITS ? BITS : f.M; }
  // Whether a turn at t, in k or on both sides, changes the match that won.
  INLINE bool inside(int64_t t) const { return (t > s_won && t <= j_won) || (SELF && t > q_won); }
  INLINE float worth(Match m) const { return length_of(m) ? weight[1 + values[source_of(m)]] : weight[0]; }
  INLINE float worth_turned(Match m, int64_t b) const { return length_of(m) ? weight[1 + (values[source_of(m)] ^ (1 << b))] : weight[0]; }

  // One symbol on. Returns how long the longest match is.
  int64_t advance() {
    const uint8_t* const k = backwards + T - i;
    const Lag symbol = f.q[i];
    LagVector longest{};
    for (int64_t c = 0; c < i; c += Lags::count) {
      const LagVector differ = __builtin_convertvector(Bytes::load(k + c), LagVector) ^ symbol, first = Lags::load(L1 + c),
                      second = Lags::load(L2 + c);
      const LagVector match = differ == 0, there = lanes < Lag(std::min<int64_t>(i - c, Lags::count));
      const LagVector single = BITS == 1 ? differ : differ & (LagVector)((differ & (differ - 1)) == 0), d = Lags::load(D1 + c);
      if constexpr (SELF) {
        Lags::store(L3 + c, ((match ? Lags::load(L3 + c) : second) + 1) & there);
        Lags::store(D2 + c, (match ? Lags::load(D2 + c) : d) & there);
      }
      Lags::store(L2 + c, ((match ? second : first) + 1) & there);
      const LagVector run = (first + 1) & match & there;
      Lags::store(L1 + c, run);
      Lags::store(D1 + c, (match ? d : single) & there);
      longest = Lags::better(longest, run);
    }
    return Lags::largest(longest);
  }

  // One symbol on, and the match that wins there: as long as the last one goes on, it does (automaton.cpp says why).
  void find_match() {
    const Lag longest = Lag(advance());
    lag_won = i - 1 - j_won;
    if (length && L1[lag_won - 1]) {
      length++, j_won++;
    } else {
      length = longest, j_won = i - 1 - (longest ? place_of(L1, longest) : 0);
    }
    lag_won = i - 1 - j_won;
    s_won = j_won - length, q_won = i - length;
    won = length ? match(length, j_won) : 0;
    joined = SELF && length && j_won >= q_won;
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

  // Behind `to`, the lags of a vector that are found in a mask. Returns how many these are.
  INLINE int64_t put(Lag* to, LagVector at, LagVector mask) const {
    uint64_t found = Lags::which(mask);
    const int64_t many = __builtin_popcountll(found), first = at[0];
    if (many > 2 && (found & (found + 1)) == 0) {  // all of the first ones
      Lags::store(to, at);
      return many;
    }
    for (int n = 0; n < 2; n++, found &= found - 1) to[n] = Lag(first + __builtin_ctzll(found | uint64_t(1) << 63));  // most have no more
    for (int n = 2; found; n++, found &= found - 1) to[n] = Lag(first + __builtin_ctzll(found));
    return many;
  }

  // Which matches count one by one: those that overlap the one that won; and those that a turn inside that one, beyond
  // it, or `few` or more symbols back in q lengthens.
  void list_matches() {
    const Lag least = Lag(few), longest = Lag(length), at_won = Lag(length ? lag_won : i);
    const Lag from = Lag(joined ? -1 : lag_won), to = Lag(length ? lag_won + length - 1 : -1);  // lags of what ends, or begins, inside
    int64_t lengthening = 0;
    LagVector few_back{};
    overlaps = 0;
    for (int64_t c = 0; c < i; c += Lags::count) {
      const LagVector at = lanes + Lag(c), first = Lags::load(L1 + c), second = Lags::load(L2 + c), begin = at + first;
      LagVector lengthened =
          (first >= least) | (second > longest) | ((second == longest) & (at < at_won)) | ((begin <= to) & (begin >= from));
      if constexpr (SELF) lengthened |= begin < longest;
      const LagVector one_bit = Lags::load(D1 + c) != 0;
      few_back |= one_bit & (first < least);
      lengthening += put(to_lengthen + lengthening, at, one_bit & lengthened);
      if (c > to) continue;
      const LagVector begin_before = at - 1 + Lags::load(L1 + c - 1);
      overlaps += put(overlapping + overlaps, at, (first > 0) & (at <= to) & (begin >= from) & (begin != begin_before));
    }
    for (int64_t n = 0; n < lengthening; n++) lengthen_at(to_lengthen[n]);
    if (Lags::which(few_back)) lengthen_few();
  }

  // The turns that lengthen the match at a lag.
  INLINE void lengthen_at(int64_t c) {
    const int64_t M = bits(), b = BITS == 1 ? 0 : __builtin_ctz(D1[c]), j = i - 1 - c, L = L1[c], s = j - L, second = L2[c];
    if constexpr (SELF) {
      const int64_t other = i - s;  // q turns there, after k has turned at the mismatch
      lengthen(s, b, match(second < other ? second : second > other ? other : D2[c] == D1[c] ? L3[c] : second, j));
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

  // The best, by value(c, at, x) for a vector of lags, of the matches, for each x < N; 0: none has a value.
  template <int N, class Value>
  INLINE void best(Match* found, const Value& value) const {
    LagVector most[N]{}, place[N]{}, at = lanes;
    for (int64_t c = 0; c < i; c += Lags::count, at += Lag(Lags::count))
#pragma GCC unroll 4
      for (int x = 0; x < N; x++) {
        const LagVector found = value(c, at, x), more = found > most[x];
        most[x] = more ? found : most[x], place[x] = more ? Lag(i - 1) - at : place[x];
      }
#pragma GCC unroll 4
    for (int x = 0; x < N; x++) {
      const Lag longest = Lags::largest(most[x]);
      found[x] = longest ? match(longest, Lags::largest(place[x] & (LagVector)(most[x] == longest))) : 0;
    }
  }

  // q turns less than `few` symbols back.
  void lengthen_few() {
    const int64_t M = bits(), end = std::min(few, length) * M;
    for (int64_t turn = 0; turn < end; turn += 4) {
      Match found[4];
      Lag back[4], bit[4];
      for (int x = 0; x < 4; x++) back[x] = Lag((turn + x) / M), bit[x] = Lag(1 << (turn + x) % M);
      best<4>(found, [&](int64_t c, LagVector at, int x) {
        const LagVector there = (Lags::load(L1 + c) == back[x]) & (Lags::load(D1 + c) == bit[x]);
        return Lags::load(L2 + c) & (SELF ? there & (at >= back[x]) : there);
      });
      for (int x = 0; x < 4 && turn + x < end; x++)
        if (SELF)
          lengthen(i - back[x], (turn + x) % M, found[x]);
        else
          longer_q[turn + x] = better(longer_q[turn + x], found[x]);
    }
  }

  // q, m symbols back: what matched further matches so far, the last of it. Where q = k nothing else that is as long is left either.
  void turn_queries() {
    const int64_t M = bits();
    int64_t lag = 0;  // less one
    for (int64_t m = 0; m <= length - SELF; m++) {
      if (SELF) lag = std::max(lag, m);
      if (L1[lag] < m) lag = place_from(L1, lag, Lag(m));
      const Match cut = m ? Match(m) << kSource | Match(i - lag) : 0;
      const int64_t place = (i - m) * M;
      for (int64_t b = 0; b < M; b++) {
        Match& to = SELF ? longer[place + b] : longer_q[m * M + b];
        const Match wins = better(cut, to);
        f.dq[place + b] += (SELF && source_of(wins) == i - m ? worth_turned(wins, b) : worth(wins)) - before;
        to = 0;
      }
    }
  }

  // k, or both sides, at the places inside the match that won, `first` to `last`.
  void turn_inside(int64_t first, int64_t last) {
    const int64_t M = bits(), here = i, size = Many::count, width = last - first + 1;
    memset(starts, 0, (width + size + 2) * sizeof(Match));
    for (int64_t n = overlaps - 1; n >= 0; n--) {  // the last match comes last
      const int64_t j = i - 1 - overlapping[n], s = j - L1[overlapping[n]];
      starts[std::max<int64_t>(s + 1 - first, 0)] = Match(j + 1);
    }
    if (joined) cut_queries(first);
    Match apart;  // the best that no turn here touches
    const Lag from = Lag(i - 1 - last), to = Lag(i - 1 - first);
    best<1>(&apart, [&](int64_t c, LagVector at, int) {
      const LagVector length = Lags::load(L1 + c);
      return length & (LagVector)((at > to) | (at + length < from));
    });
    Vector lane{}, behind{}, untouched = apart - Vector{}, started = starts[0] - Vector{};
    for (int n = 0; n < size; n++) lane[n] = Match(n);
    for (int64_t t = (width - 1) / size * size; t >= 0; t -= size) {  // a match that begins at t or later
      const Vector source = Many::load(starts + t + 2), at = lane + Match(first + t + 1);
      Many::store(later + t, Many::template so_far<true>(source != 0 ? (source - 1 - at) << kSource | source : Vector{}, behind));
    }
    float* const d = SELF ? f.dq : f.dk;
    const float *const weights = weight, unturned = before;
    const uint8_t* const v = values;
    Match* const lengthened = longer;
    for (int64_t t = 0; t < width; t += size) {
      const Vector at = lane + Match(first + t), m = Match(here) - at;
      const Vector ended = __builtin_convertvector(ManyLags::backwards(ManyLags::load(L1 + here - first - t - size + 1)), Vector);
      Vector r = Many::template so_far<false>(ended != 0 ? ended << kSource | at : Vector{}, untouched);
      if (joined) r = r >> kSource >= m ? m << kSource | Many::load(by_cut + t) : r;
      const Vector source = Many::template so_far<false>(Many::load(starts + t + 1), started);
      r = Many::better(r, Many::load(later + t));
      r = Many::better(r, source > at ? (source - 1 - at) << kSource | source : Vector{});
      if constexpr (BITS == 1 && sizeof(Match) == sizeof(float))
        if (first + t + size <= T) {
          turn_block(first + t, (Vector)(at <= Match(last)), at, r);
          continue;
        }
      Match best[Many::count];
      Many::store(best, r);
      for (int64_t n = 0; n < std::min(size, width - t); n++) {
        const int64_t place = first + t + n;
        for (int64_t b = 0; b < M; b++) {
          Match& to = lengthened[place * M + b];
          const Match wins = better(best[n], to);
          const int turned = SELF && source_of(wins) == place ? 1 << b : 0;
          d[place * M + b] += weights[length_of(wins) ? 1 + (v[source_of(wins)] ^ turned) : 0] - unturned;
          to = 0;
        }
      }
    }
  }

  // q = k turned m symbols back, at `first` or later: what matched as far and ends before it, the last of it.
  void cut_queries(int64_t first) {
    L1[i] = std::numeric_limits<Lag>::max();  // ends the search
    for (int64_t m = 0, lag = 0; m <= i - first; m++) {
      lag = std::max(lag, m);
      if (L1[lag] < m) lag = place_from(L1, lag, Lag(m));
      if (lag >= i) break;
      by_cut[i - m - first] = Match(i - lag);
    }
    L1[i] = 0;
  }

  // The last step of it for a vector of places whose symbols have one bit.
  INLINE void turn_block(int64_t t, Vector in, Vector at, Vector r) {
    float* const d = (SELF ? f.dq : f.dk) + t;
    const Vector lengthened = Many::load(longer + t), wins = in & Many::better(r, lengthened), source = wins & ((Match(1) << kSource) - 1);
    Match copied[Many::count];
    Many::store(copied, source);
    for (Match& y : copied) y = values[y];
    const Vector y = Many::load(copied) ^ ((Vector)(source == at) & Match(SELF));
    const vf hit = select((vi)(y != 0), splat(weight[2]), splat(weight[1])),
             worth = select((vi)(wins >> kSource != 0), hit, splat(weight[0]));
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
