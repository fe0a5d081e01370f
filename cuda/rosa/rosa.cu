// ROSA on a GPU: a block for each row of symbols. Run lengths of all lags at once; for the gradients the second and third mismatch
// too, and for each output all turns of a bit together (flips.h says what a turn does). Two passes over the lags: one symbol on; then,
// once it is known which match won, the matches that a turn can make win are written down where it turns. What is left is as short as
// the match that won: maxima over its places give what wins after each turn. O(T^2) steps a row, whatever the symbols. A row's lags,
// and what is written down near the output, are in shared memory where they fit. Lengths, sources and maxima are integers, and each
// sum has one thread at a time, between barriers: no order of threads shows.
#include <type_traits>

#include "../common/device.cuh"
#include "api.cuh"

namespace rosa {
namespace {

using namespace device;

constexpr int threads = 128, warps = threads / 32;

// A match: its length, then where the output comes from, behind its end; the larger one wins. Word: unsigned where lags
// are in shared memory, T below 65536 then, else unsigned long long; two numbers either way.
using Near = unsigned;
using Far = unsigned long long;
template <class Word> constexpr int half = 4 * sizeof(Word);  // of its bits
template <class Word> __device__ __forceinline__ Word match(int length, int64_t j) { return Word(length) << half<Word> | Word(j + 1); }
template <class Word> __device__ __forceinline__ int length_of(Word m) { return int(m >> half<Word>); }
template <class Word> __device__ __forceinline__ int64_t source_of(Word m) { return int64_t(m & ((Word(1) << half<Word>) - 1)); }
template <class Number> __device__ __forceinline__ Number better(Number a, Number b) { return a > b ? a : b; }

template <class Number> __device__ __forceinline__ Number best_of_warp(Number m) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) m = better(m, __shfl_xor_sync(~0u, m, mask));
    return m;
}

// The best of this lane and those before it. (Who has none so far back is given its own.)
template <class Number> __device__ __forceinline__ Number best_so_far(Number m) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) m = better(m, __shfl_up_sync(~0u, m, distance));
    return m;
}

// What the block has put there so far, while others of its threads raise it: an ordinary load would be a race.
#ifdef __CUDACC__
__device__ __forceinline__ unsigned now(const unsigned* at) {
    unsigned x;
    asm volatile("ld.relaxed.cta.u32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
    return x;
}
__device__ __forceinline__ Far now(const Far* at) {
    Far x;
    asm volatile("ld.relaxed.cta.u64 %0, [%1];" : "=l"(x) : "l"(at) : "memory");
    return x;
}
#else
template <class Number> Number now(const Number* at) { return load_relaxed(at); }
#endif

// atomicMax, which is seldom needed: most come too late.
template <class Number> __device__ __forceinline__ void raise(Number* at, Number to) {
    if (now(at) < to) atomicMax(at, to);
}

// The best of the block, for every thread. What was written before, all see behind it; `turn` alternates, so that one barrier is enough.
template <class Word> __device__ __forceinline__ Word best_of_block(Word m, int turn) {
    Word* const shared = reinterpret_cast<Word*>(shared_memory()) + (turn & 1) * warps;
    m = best_of_warp(m);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = m;
    __syncthreads();
    m = shared[0];
#pragma unroll
    for (int w = 1; w < warps; ++w) m = better(m, shared[w]);
    return m;
}
constexpr size_t reduction_bytes = 2 * warps * sizeof(Far);

// The match that ends at i, after its symbol; 0: none.
template <class Word, class Run, class Symbol> __device__ __forceinline__ Word scan(int64_t i, Symbol symbol, const Symbol* k, Run* runs) {
    int longest = 0;
    int64_t at = 0;  // its lag, the least of those as long
    for (int64_t c = threadIdx.x; c < i; c += threads) {
        const int run = k[i - 1 - c] == symbol ? runs[c] + 1 : 0;
        runs[c] = Run(run);
        if (run > longest) longest = run, at = c;
    }
    return best_of_block(longest ? match<Word>(longest, i - 1 - at) : 0, int(i));
}

template <class X> __launch_bounds__(threads) __global__ void symbols(const RosaSize size, const X* x, uint8_t* to) {
    const int64_t G = size.C / size.M, i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= size.B * size.T * G) return;
    unsigned symbol = 0;
    for (int m = 0; m < size.M; ++m) symbol |= unsigned(to_float(x[i * size.M + m]) > 0.f) << m;
    const int64_t b = i / (size.T * G), t = i / G % size.T;
    to[(b * G + i % G) * (size.L + size.T) + size.L + t] = uint8_t(symbol);
}

// Word: Near: the run lengths, and a copy of k, are in shared memory meanwhile.
template <class X, class Word> __launch_bounds__(threads) __global__ void forward(const RosaForward task) {
    constexpr bool is_near = sizeof(Word) == sizeof(Near);
    using Run = std::conditional_t<is_near, uint16_t, int32_t>;
    const RosaSize& size = task.size;
    const int64_t row = blockIdx.x, n = size.L + size.T, G = size.C / size.M, channel = row % G * size.M;
    const uint8_t *const q = task.q + row * n, *k = task.k + row * n, *const v = task.v + row * n;
    int32_t* const kept = task.runs + row * n;
    Run* runs = reinterpret_cast<Run*>(kept);
    if constexpr (is_near) {
        runs = reinterpret_cast<Run*>(shared_memory() + reduction_bytes);
        uint8_t* const copy = reinterpret_cast<uint8_t*>(runs + n);
        for (int64_t c = threadIdx.x; c < n; c += threads) runs[c] = Run(kept[c]), copy[c] = k[c];
        k = copy;
        __syncthreads();
    }
    X* const out = static_cast<X*>(task.out) + row / G * size.T * size.C + channel;
    for (int64_t i = size.L; i < n; ++i) {
        const Word won = scan<Word>(i, q[i], k, runs);
        if (threadIdx.x >= size.M) continue;
        const X low = static_cast<const X*>(task.low)[channel + threadIdx.x],
                high = static_cast<const X*>(task.high)[channel + threadIdx.x];
        X value = won && v[source_of(won)] >> threadIdx.x & 1 ? high : low;
        if (!won && !task.miss_low) value = from_float<X>(0.f);
        out[(i - size.L) * size.C + threadIdx.x] = value;
    }
    if constexpr (is_near)
        for (int64_t c = threadIdx.x; c < n; c += threads) kept[c] = runs[c];  // each its own
}

__launch_bounds__(threads) __global__ void token_rows(int64_t T, int64_t L, const int64_t* k, int32_t* runs, int64_t* y) {
    const int64_t n = L + T, row = blockIdx.x;
    for (int64_t i = L; i < n; ++i) {
        const Far won = scan<Far>(i, k[row * n + i], k + row * n, runs + row * n);
        if (threadIdx.x == 0) y[row * T + i - L] = won ? k[row * n + source_of(won)] : -1;
    }
}

// Hands out places, from a base on; without one it only counts.
class Places {
    char* base;
    int64_t used = 0;

  public:
    __host__ __device__ explicit Places(char* base) : base(base) {}
    template <class Number> __host__ __device__ Number* take(int64_t count) {
        const int64_t from = (used + sizeof(Number) - 1) / sizeof(Number) * sizeof(Number);
        used = from + count * sizeof(Number);
        return base ? reinterpret_cast<Number*>(base + from) : nullptr;
    }
    __host__ __device__ int64_t bytes() const { return (used + 15) / 16 * 16; }
};

constexpr int quick = 32;  // places of what is written down that are in shared memory

// A row, and the output in hand.
template <class X, bool self, class Word> struct Row {
    static constexpr bool is_near = sizeof(Word) == sizeof(Near);
    static constexpr Word one = Word(1) << half<Word>, low_half = one - 1;
    // By lag, lag 1 first: how far back the first mismatch lies and, in the upper half, the second; the bits that
    // differ at the first and, self, at the second (8 bits on), and in the upper half how far back the third lies.
    using Extra = std::conditional_t<self, Word, uint8_t>;

    const RosaBackward& task;
    const int T, M;
    const uint8_t *q, *k, *v;
    const X *dout, *low, *high;
    Word* lags;
    Extra* extra;
    uint8_t* copy;  // of k, where lags are near
    Word *longer, *longer_q;  // [T, M], the best that a turn lengthens, if it can win; where q turns alone (self: the same array)
    Word* quick_longer;  // [quick, M], where q turns (self: or both) less than `quick` symbols back
    Word* later;  // [T], the best match that begins behind t
    Word* maxima;  // [2, warps]
    unsigned* sources;  // [2, warps]
    float* sums[3];  // [T, M] of dq, dk, dv
    float* weights;  // what the output is worth by its symbol, behind that of a miss
    unsigned *starts, *quick_starts;  // by s - s_won, at least 0: the source of the last match whose first mismatch is at s
    unsigned *cuts, *quick_cuts;  // by m, the source of the last match that is m long, or (self) lies m back and is longer
    int *beyond, *beyonds;  // t M + bit where a turn that does not touch the match that won lengthens another beyond it; how many
    int i, j_won, s_won, q_won, turns;
    bool joined;  // self: the symbols of the match that won, in k and in q, overlap
    Word won;
    float before;

    __host__ __device__ explicit Row(const RosaBackward& task) : task(task), T(int(task.size.T)), M(int(task.size.M)) {}

    // Set the places; return how many bytes they are.
    __host__ __device__ int64_t in_shared(char* from) {
        Places memory(from);
        memory.take<Far>(2 * warps);  // best_of_block
        maxima = memory.take<Word>(2 * warps), quick_longer = memory.take<Word>(quick * M);
        sources = memory.take<unsigned>(2 * warps), quick_starts = memory.take<unsigned>(quick), quick_cuts = memory.take<unsigned>(quick);
        weights = memory.take<float>((1 << M) + 1), beyonds = memory.take<int>(1);
        if (is_near) lags = memory.take<Word>(T), extra = memory.take<Extra>(T), copy = memory.take<uint8_t>(T);
        return memory.bytes();
    }
    __host__ __device__ int64_t in_scratch(char* from) {
        Places memory(from);
        const int64_t places = int64_t(T) * M;
        longer = memory.take<Word>(places), longer_q = self ? longer : memory.take<Word>(places), later = memory.take<Word>(T);
        if (!is_near) lags = memory.take<Word>(T), extra = memory.take<Extra>(T);
#pragma unroll
        for (int which = 0; which < (self ? 1 : 3); ++which) sums[which] = memory.take<float>(places);
        starts = memory.take<unsigned>(T + 1), cuts = memory.take<unsigned>(T), beyond = memory.take<int>(places);
        return memory.bytes();
    }

    __device__ __forceinline__ void begin(int row) {
        const RosaSize& size = task.size;
        const int G = int(size.C) / M;
        const int64_t first = int64_t(row / G) * T * size.C + row % G * M, its = int64_t(row) * T;
        q = task.q + its, k = self ? q : task.k + its, v = self ? q : task.v + its;
        dout = static_cast<const X*>(task.dout) + first;
        low = static_cast<const X*>(task.low) + row % G * M, high = static_cast<const X*>(task.high) + row % G * M;
        for (int p = threadIdx.x; p < T * M; p += threads) {
            longer[p] = longer_q[p] = 0;
#pragma unroll
            for (int which = 0; which < (self ? 1 : 3); ++which) sums[which][p] = 0.f;
        }
        for (int t = threadIdx.x; t < T; t += threads) {
            lags[t] = 0, extra[t] = 0, starts[t] = cuts[t] = 0;
            if (is_near) copy[t] = k[t];
        }
        for (int p = threadIdx.x; p < quick * M; p += threads) quick_longer[p] = 0;
        for (int m = threadIdx.x; m < quick; m += threads) quick_starts[m] = quick_cuts[m] = 0;
        if (threadIdx.x == 0) starts[T] = 0, *beyonds = 0;
        if (is_near) k = copy;
        turns = 0;
        __syncthreads();
    }

    __device__ __forceinline__ float worth(Word m, int turned) const { return weights[length_of(m) ? 1 + (v[source_of(m)] ^ turned) : 0]; }
    // Whether a turn at t, in k or (self) on both sides, changes the match that won.
    __device__ __forceinline__ bool inside(int t) const { return (t > s_won && t <= j_won) || (self && t > q_won); }
    __device__ __forceinline__ Word* turned_q(int t, int b) const {
        return i - t < quick ? quick_longer + (i - t) * M + b : longer_q + t * M + b;
    }
    __device__ __forceinline__ Word* turned_k(int t, int b) const { return self ? turned_q(t, b) : longer + t * M + b; }
    __device__ __forceinline__ unsigned* start(int t) const { return t < quick ? quick_starts + t : starts + t; }
    __device__ __forceinline__ unsigned* cut(int m) const { return m < quick ? quick_cuts + m : cuts + m; }

    // One symbol on; the match that wins there, and what its output is worth.
    __device__ __forceinline__ void find_match() {
        if (threadIdx.x == 0) quick_starts[0] = 0;  // as all warps have read it, before the last barrier
        const unsigned symbol = q[i];
        int longest = 0, at = 0;  // the least lag of those as long
        for (int c = threadIdx.x; c < i; c += threads) {
            const unsigned differ = k[i - 1 - c] ^ symbol;
            const Word ago = lags[c], next = differ ? (ago << half<Word>) + one : ago + one + 1;
            lags[c] = next;
            if constexpr (self) {
                const Word more = extra[c];
                extra[c] = (differ ? (ago & ~low_half) | (more & 0xff) << 8 | differ : more) + one;
            } else if (differ) {
                extra[c] = uint8_t(differ);
            }
            const int run = int(next & low_half);
            if (run > longest) longest = run, at = c;
        }
        for (int y = threadIdx.x; y < 1 << M; y += threads) {
            float sum = 0.f;
            for (int b = 0; b < M; ++b) sum = fmaf(to_float(dout[i * task.size.C + b]), to_float(y >> b & 1 ? high[b] : low[b]), sum);
            weights[1 + y] = sum;
            if (y == 0) weights[0] = task.miss_low ? sum : 0.f;
        }
        won = best_of_block(longest ? match<Word>(longest, i - 1 - at) : 0, turns++);
        j_won = won ? int(source_of(won)) - 1 : i - 1;
        s_won = j_won - length_of(won), q_won = i - length_of(won);
        joined = self && won && j_won >= q_won;
    }

    __device__ __forceinline__ void lengthen(int t, int b, Word to) const {
        Word* const at = turned_k(t, b);
        if (inside(t)) {
            raise(at, to);
        } else if (to > won && now(at) < to && atomicMax(at, to) == 0) {
            beyond[atomicAdd(beyonds, 1)] = t * M + b;
        }
    }

    // Writes down what a turn does to the other matches. Returns the best that no turn in k (joined: or q) inside the winner touches.
    __device__ __forceinline__ Word write_down() {
        before = worth(won, 0);
        const int last = joined ? i : j_won;
        int longest = 0, at = 0;
        for (int c = threadIdx.x; c < i; c += threads) {
            const Word ago = lags[c];
            const unsigned differ = unsigned(extra[c] & 0xff);
            const int run = int(ago & low_half), second = int(ago >> half<Word>), j = i - 1 - c, s = j - run;
            if (run) {
                const int later_run = c ? int(lags[c - 1] & low_half) : 0;  // at j + 1: enough where as long or begun alike
                if (later_run < run || (self && run >= c)) raise(cut(self ? min(run, c) : run), unsigned(j + 1));
                if (j > s_won && s <= last) {
                    if (later_run != run + 1) raise(start(max(s - s_won, 0)), unsigned(j + 1));
                } else if (run > longest) {
                    longest = run, at = c;
                }
            }
            if (differ == 0 || (differ & (differ - 1))) continue;
            const int b = 31 - __clz(int(differ));
            if constexpr (self) {
                const Word more = extra[c];
                const int back = i - run, other = i - s;  // q turns there, after k has turned at the mismatch
                const bool same = unsigned(more >> 8 & 0xff) == differ;
                lengthen(s, b, match<Word>(second < other ? second : second > other ? other : same ? int(more >> half<Word>) : second, j));
                if (back > j) lengthen(back, b, match<Word>(second, j));
            } else {
                lengthen(s, b, match<Word>(second, j));
                raise(turned_q(i - run, b), match<Word>(second, j));
            }
        }
        return best_of_block(longest ? match<Word>(longest, i - 1 - at) : 0, turns++);
    }

    // The match at j = t - 1; the last one whose first mismatch is at t.
    __device__ __forceinline__ Word ending(int t) const {
        return t ? Word(lags[i - t] & low_half) << half<Word> | (lags[i - t] & low_half ? t : 0) : 0;
    }
    __device__ __forceinline__ Word beginning(int t) const {
        const unsigned source = *start(t - s_won);
        return source ? match<Word>(int(source) - 1 - t, source - 1) : 0;
    }

    // All turns inside the match that won, of k and of q: a team of warps for either (joined: one for both), 32 places at a time.
    __device__ __forceinline__ void turn(Word apart) const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, length = length_of(won), team = joined ? warps : warps / 2,
                  mine = warp % team;
        const bool keys = joined || warp < team;
        const int first = keys ? s_won + 1 : q_won, last = keys && !joined ? j_won : i;
        const int each = ceil_div(ceil_div(last - first + 1, 32), team) * 32, begin = min(first + mine * each, last + 1),
                  end = min(begin + each, last + 1);
        Word untouched = apart, behind = 0;  // the best that ends before t, or is not touched; the best that begins at a place not yet seen
        const unsigned first_of_all = keys ? *start(0) : 0u;
        unsigned before_t = 0, started = first_of_all;  // sources: of the last that a turn of q at t cuts, that begins up to t
        if ((joined ? i - s_won : length + 1) > 32) {  // more than one warp of a team has places
            Word ended = 0;
            for (int t = begin + lane; t < end; t += 32) {
                if (!keys || (joined && t >= q_won)) before_t = better(before_t, *cut(i - t));
                if (keys)
                    ended = better(ended, ending(t)), behind = better(behind, beginning(t)), started = better(started, *start(t - s_won));
            }
            ended = best_of_warp(ended), behind = best_of_warp(behind), before_t = best_of_warp(before_t), started = best_of_warp(started);
            if (lane == 0) maxima[warp] = ended, maxima[warps + warp] = behind, sources[warp] = before_t, sources[warps + warp] = started;
            __syncthreads();
            behind = 0, before_t = 0, started = first_of_all;
            for (int w = warp - mine; w < warp; ++w)
                untouched = better(untouched, maxima[w]), before_t = better(before_t, sources[w]),
                started = better(started, sources[warps + w]);
            for (int w = warp + 1; w < warp - mine + team; ++w) behind = better(behind, maxima[warps + w]);
        }
        Word of_first = 0;  // `later` of the first 32 places, a lane each
        for (int base = begin + (end - begin - 1) / 32 * 32; keys && begin < end && base >= begin; base -= 32) {
            const int t = base + 31 - lane;
            const Word m = better(behind, best_so_far(t + 1 < end ? beginning(t + 1) : 0));
            behind = __shfl_sync(~0u, m, 31);
            of_first = __shfl_sync(~0u, m, 31 - lane);
            if (base + lane < end) later[base + lane] = of_first;
        }
        __syncwarp();  // other lanes have read what is cleared now
        for (int base = begin; base < end; base += 32) {
            const int t = base + lane, m = i - t;
            const bool is_there = t < end, cuts_q = is_there && m <= length && (!keys || joined);
            before_t = better(before_t, best_so_far(cuts_q ? *cut(m) : 0u));
            Word r = Word(m) << half<Word> | before_t;
            if (keys) {
                untouched = better(untouched, best_so_far(is_there ? ending(t) : 0));
                started = better(started, best_so_far(is_there ? *start(t - s_won) : 0u));
                if (!joined || length_of(untouched) < m) r = untouched;
                if (is_there) r = better(r, base == begin ? of_first : later[t]);
                if (int(started) > t) r = better(r, match<Word>(int(started) - 1 - t, started - 1));
            }
            if (is_there) {
                turn_at(t, keys, r);
                if (keys) *start(t - s_won) = 0;
                if (cuts_q) *cut(m) = 0;
            }
            untouched = __shfl_sync(~0u, untouched, 31), before_t = __shfl_sync(~0u, before_t, 31), started = __shfl_sync(~0u, started, 31);
        }
    }

    // All bits at t in k (self: or both sides), or in q; r wins if no match is lengthened.
    __device__ __forceinline__ void turn_at(int t, bool keys, Word r) const {
        if (self && !keys && t == q_won) return;
        float* const sum = keys && !self ? sums[1] : sums[0];
        for (int b = 0; b < M; ++b) {
            Word* const lengthened = keys ? turned_k(t, b) : turned_q(t, b);
            const Word wins = better(r, *lengthened);
            *lengthened = 0;
            sum[t * M + b] += worth(wins, self && source_of(wins) == t ? 1 << b : 0) - before;
        }
    }

    // The turns that leave the match that won as it is: of the symbol that was put out, and those that make a better one. One warp.
    __device__ __forceinline__ void turn_outside() const {
        const int lane = threadIdx.x % 32, count = *beyonds, copied = j_won + 1;
        if (won && lane < M && (!self || (!inside(copied) && *turned_k(copied, lane) == 0)))
            sums[self ? 0 : 2][copied * M + lane] += worth(won, 1 << lane) - before;
        __syncwarp();
        for (int n = lane; n < count; n += 32) {
            const int t = beyond[n] / M, b = beyond[n] % M;
            Word* const lengthened = turned_k(t, b);
            sums[self ? 0 : 1][t * M + b] += worth(*lengthened, self && source_of(*lengthened) == t ? 1 << b : 0) - before;
            *lengthened = 0;
        }
        if (lane == 0) *beyonds = 0;
    }
};

// So many blocks on a multiprocessor: with more, or left to choose, ptxas takes so few registers that some spill.
template <class X, bool self, class Word>
__launch_bounds__(threads, sizeof(Word) == sizeof(Near) ? 5 : 4) __global__ void backward(const RosaBackward task) {
    const RosaSize& size = task.size;
    const int T = int(size.T), M = int(size.M), G = int(size.C) / M;
    Row<X, self, Word> r(task);
    const int64_t each = r.in_scratch(nullptr);
    r.in_scratch(task.scratch + blockIdx.x * each);
    r.in_shared(shared_memory());
    for (int row = blockIdx.x; row < int(size.B) * G; row += int(task.blocks)) {
        r.begin(row);
        double sum_low = 0., sum_high = 0.;  // of bit threadIdx.x
        for (r.i = 0; r.i < T; ++r.i) {
            r.find_match();
            if (int(threadIdx.x) < M && (r.won || task.miss_low)) {
                const double g = double(to_float(r.dout[r.i * size.C + threadIdx.x]));
                (r.won && r.v[source_of(r.won)] >> threadIdx.x & 1 ? sum_high : sum_low) += g;
            }
            if (!task.gradients[0]) continue;
            r.turn(r.write_down());
            if (threadIdx.x / 32 == warps - 1) r.turn_outside();
            __syncthreads();
        }
        if (int(threadIdx.x) < M) {
            const int64_t at = row / G * size.C + row % G * M + threadIdx.x;
            task.sums[at] = sum_low, task.sums[size.B * size.C + at] = sum_high;
        }
#pragma unroll
        for (int which = 0; which < (self ? 1 : 3); ++which)
            for (int p = threadIdx.x; p < T * M && task.gradients[0]; p += threads) {
                const int64_t at = int64_t(row / G) * T * size.C + row % G * M + p / M * size.C + p % M;
                const float x = to_float(static_cast<const X*>(task.inputs[which])[at]), size_of = fabsf(x), turned = r.sums[which][p];
                const float divisor = 2.f * (size_of < task.tau ? task.tau : size_of);  // a NaN stays one
                static_cast<X*>(task.gradients[which])[at] = from_float<X>(quotient(x > 0.f ? -turned : turned, divisor));
            }
        __syncthreads();
    }
}

// Bytes of shared memory of a row's backward whose lags are near; 0 where they do not fit.
template <bool self> size_t near_bytes(const RosaBackward& task) {
    const size_t bytes = task.size.T < 65536 ? size_t(Row<float, self, Near>(task).in_shared(nullptr)) : 0;
    return bytes <= shared_limit() ? bytes : 0;
}

template <class X, bool self> int start_backward(const RosaBackward& task, void* stream) {
    const dim3 grid{unsigned(task.blocks)};
    if (const size_t bytes = near_bytes<self>(task)) return launch(backward<X, self, Near>, grid, threads, bytes, stream, task);
    return launch(backward<X, self, Far>, grid, threads, size_t(Row<X, self, Far>(task).in_shared(nullptr)), stream, task);
}

template <bool self> int64_t scratch_bytes(int64_t T, int64_t M) {
    RosaBackward task{};
    task.size.T = T, task.size.M = M;
    return near_bytes<self>(task) ? Row<float, self, Near>(task).in_scratch(nullptr) : Row<float, self, Far>(task).in_scratch(nullptr);
}

template <class X> int start_forward(const RosaForward& task, void* stream) {
    const int64_t n = task.size.L + task.size.T;
    const dim3 grid(unsigned(task.size.B * (task.size.C / task.size.M)));
    const size_t bytes = reduction_bytes + n * (sizeof(uint16_t) + 1);
    if (task.size.T >= 4 && n < 65536 && bytes <= shared_limit()) return launch(forward<X, Near>, grid, threads, bytes, stream, task);
    return launch(forward<X, Far>, grid, threads, reduction_bytes, stream, task);
}

}  // namespace
}  // namespace rosa

extern "C" int rosa_symbols(const RosaSize* size, const void* x, uint8_t* to, int fp32, void* stream) {
    using namespace rosa;
    const dim3 grid(unsigned((size->B * size->T * (size->C / size->M) + threads - 1) / threads));
    if (fp32) return launch(symbols<float>, grid, threads, 0, stream, *size, static_cast<const float*>(x), to);
    return launch(symbols<bf16>, grid, threads, 0, stream, *size, static_cast<const bf16*>(x), to);
}

extern "C" int rosa_forward(const RosaForward* task, int fp32, void* stream) {
    using namespace rosa;
    return fp32 ? start_forward<float>(*task, stream) : start_forward<bf16>(*task, stream);
}

extern "C" int rosa_token_rows(int64_t B, int64_t T, int64_t L, const int64_t* k, int32_t* runs, int64_t* y, void* stream) {
    using namespace rosa;
    return launch(token_rows, dim3(unsigned(B)), threads, reduction_bytes, stream, T, L, k, runs, y);
}

extern "C" int64_t rosa_scratch_bytes(int64_t T, int64_t M, int self) {
    return self ? rosa::scratch_bytes<true>(T, M) : rosa::scratch_bytes<false>(T, M);
}

extern "C" int rosa_backward(const RosaBackward* task, int fp32, void* stream) {
    using namespace rosa;
    if (task->k) return fp32 ? start_backward<float, false>(*task, stream) : start_backward<bf16, false>(*task, stream);
    return fp32 ? start_backward<float, true>(*task, stream) : start_backward<bf16, true>(*task, stream);
}
