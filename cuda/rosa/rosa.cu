// ROSA on a GPU: a block for each row of symbols. Run lengths of all lags at once; for the gradients the second and third mismatch too, and for each
// output all turns of a bit together (flips.h says what a turn does): each lag writes down where its match begins and from where on it is cut, then
// maxima over the places give what wins after each turn. O(T^2) steps a row, whatever the symbols. Lengths, sources and maxima are integers, and
// each sum has one thread at a time, between barriers: no order of threads shows.
#include "../common/device.cuh"
#include "api.cuh"

namespace rosa {
namespace {

using namespace device;

constexpr int threads = 128, warps = threads / 32;
using Match = unsigned long long;  // length, then where the output comes from, behind the match's end; the larger one wins

__device__ __forceinline__ Match match(int length, int64_t j) { return Match(unsigned(length)) << 32 | Match(j + 1); }
__device__ __forceinline__ int length_of(Match m) { return int(m >> 32); }
__device__ __forceinline__ int64_t source_of(Match m) { return int64_t(m & 0xffffffffull); }
template <class Number> __device__ __forceinline__ Number better(Number a, Number b) { return a > b ? a : b; }

template <class Number> __device__ __forceinline__ Number best_of_warp(Number m) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) m = better(m, __shfl_xor_sync(~0u, m, mask));
    return m;
}

// The best of this lane and those before it.
template <class Number> __device__ __forceinline__ Number best_so_far(Number m) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) m = better(m, __shfl_up_sync(~0u, m, distance));  // who has none so far back gets its own
    return m;
}

// What the block has put there so far, while others of its threads raise it: an ordinary load would be a race.
#ifdef __CUDACC__
__device__ __forceinline__ unsigned now(const unsigned* at) {
    unsigned x;
    asm volatile("ld.relaxed.cta.global.u32 %0, [%1];" : "=r"(x) : "l"(at));
    return x;
}
__device__ __forceinline__ Match now(const Match* at) {
    Match x;
    asm volatile("ld.relaxed.cta.global.u64 %0, [%1];" : "=l"(x) : "l"(at));
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
__device__ __forceinline__ Match best_of_block(Match m, int turn) {
    Match* const shared = reinterpret_cast<Match*>(shared_memory()) + (turn & 1) * warps;
    m = best_of_warp(m);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = m;
    __syncthreads();
    m = shared[0];
#pragma unroll
    for (int w = 1; w < warps; ++w) m = better(m, shared[w]);
    return m;
}

// The match that ends at i, after its symbol; 0: none.
template <class Symbol> __device__ __forceinline__ Match scan(int64_t i, Symbol symbol, const Symbol* k, int* runs) {
    Match best = 0;
    for (int64_t c = threadIdx.x; c < i; c += threads) {
        const int run = k[i - 1 - c] == symbol ? runs[c] + 1 : 0;
        runs[c] = run;
        if (run) best = better(best, match(run, i - 1 - c));
    }
    return best_of_block(best, int(i));
}

template <class X> __launch_bounds__(threads) __global__ void symbols(const RosaSize size, const X* x, uint8_t* to) {
    const int64_t G = size.C / size.M, i = int64_t(blockIdx.x) * threads + threadIdx.x;
    if (i >= size.B * size.T * G) return;
    unsigned symbol = 0;
    for (int m = 0; m < size.M; ++m) symbol |= unsigned(to_float(x[i * size.M + m]) > 0.f) << m;
    const int64_t b = i / (size.T * G), t = i / G % size.T;
    to[(b * G + i % G) * (size.L + size.T) + size.L + t] = uint8_t(symbol);
}

template <class X> __launch_bounds__(threads) __global__ void forward(const RosaForward task) {
    const RosaSize& size = task.size;
    const int64_t row = blockIdx.x, n = size.L + size.T, G = size.C / size.M, channel = row % G * size.M;
    const uint8_t *const q = task.q + row * n, *const k = task.k + row * n, *const v = task.v + row * n;
    X* const out = static_cast<X*>(task.out) + row / G * size.T * size.C + channel;
    for (int64_t i = size.L; i < n; ++i) {
        const Match won = scan<uint8_t>(i, q[i], k, task.runs + row * n);
        if (threadIdx.x >= size.M) continue;
        const X low = static_cast<const X*>(task.low)[channel + threadIdx.x], high = static_cast<const X*>(task.high)[channel + threadIdx.x];
        X value = won && v[source_of(won)] >> threadIdx.x & 1 ? high : low;
        if (!won && !task.miss_low) value = from_float<X>(0.f);
        out[(i - size.L) * size.C + threadIdx.x] = value;
    }
}

__launch_bounds__(threads) __global__ void token_rows(int64_t T, int64_t L, const int64_t* k, int32_t* runs, int64_t* y) {
    const int64_t n = L + T, row = blockIdx.x;
    for (int64_t i = L; i < n; ++i) {
        const Match won = scan<int64_t>(i, k[row * n + i], k + row * n, runs + row * n);
        if (threadIdx.x == 0) y[row * T + i - L] = won ? k[row * n + source_of(won)] : -1;
    }
}

// The memory of a row, and the output in hand.
template <class X, bool self> struct Row {
    const RosaBackward& task;
    const int M;
    Match *longer, *longer_q;  // [T, M], the best match that a turn lengthens, of those that can win; the same where q turns alone
    Match* later;  // [T], the best match that begins behind t
    float* sums[3];  // [T, M] of dq, dk, dv
    int *L1, *L2, *L3;  // by lag, lag 1 first
    unsigned* starts;  // [T + 1], the source of the last match whose first mismatch is at s, by s + 1
    unsigned* by_cut;  // [T], the source of the last match by the first t from which on a turn of q cuts it; self: and which ends before t
    uint8_t *D1, *D2;
    const uint8_t *q, *k, *v;
    const X *dout, *low, *high;
    int i, j_won, s_won, q_won;
    Match won;
    float before;

    // What the output is worth: the sum over its bits.
    __device__ __forceinline__ float worth_of(int y) const {
        float sum = 0.f;
        for (int b = 0; b < M; ++b) sum = fmaf(to_float(dout[i * task.size.C + b]), to_float(y >> b & 1 ? high[b] : low[b]), sum);
        return sum;
    }
    __device__ __forceinline__ float worth(Match m, int turned) const {
        return length_of(m) ? worth_of(v[source_of(m)] ^ turned) : task.miss_low ? worth_of(0) : 0.f;
    }
    // Whether a turn at t, in k or (self) on both sides, changes the match that won.
    __device__ __forceinline__ bool inside(int t) const { return (t > s_won && t <= j_won) || (self && t > q_won); }
    __device__ __forceinline__ void lengthen(int t, int b, Match to) const {
        if (to > won || inside(t)) raise(longer + t * M + b, to);
    }

    // One symbol on; the match that wins there.
    __device__ __forceinline__ void find_match() {
        Match best = 0;
        for (int c = threadIdx.x; c < i; c += threads) {
            const int j = i - 1 - c, first = L1[c], second = L2[c];
            const uint8_t differ = k[j] ^ q[i];
            if (self) {
                L3[c] = (differ ? second : L3[c]) + 1;
                if (differ) D2[c] = D1[c];
            }
            L2[c] = (differ ? first : second) + 1;
            L1[c] = differ ? 0 : first + 1;
            if (differ) {
                D1[c] = differ;
                continue;
            }
            best = better(best, match(first + 1, j));
            raise(starts + j - first, unsigned(j + 1));
            raise(by_cut + (self && j + 1 > i - first - 1 ? j + 1 : i - first - 1), unsigned(j + 1));
        }
        won = best_of_block(best, i);
        j_won = won ? source_of(won) - 1 : i - 1;
        s_won = j_won - length_of(won), q_won = i - length_of(won);
        before = worth(won, 0);
    }

    __device__ __forceinline__ void find_longer() const {
        for (int c = threadIdx.x; c < i; c += threads) {
            const unsigned differ = D1[c];
            if (differ == 0 || (differ & (differ - 1))) continue;
            int b = 0;
            while (differ >> b != 1) ++b;
            const int j = i - 1 - c, s = j - L1[c], back = i - L1[c], second = L2[c], other = i - s;
            int to = second;
            if (self) to = second < other ? second : second > other ? other : D2[c] == differ ? L3[c] : second;
            lengthen(s, b, match(to, j));
            if (self && back > j) lengthen(back, b, match(second, j));
            if (!self) raise(longer_q + back * M + b, match(second, j));
        }
    }

    // The match at j = t - 1; the last one that begins behind t.
    __device__ __forceinline__ Match ending(int t) const { return t && L1[i - t] ? match(L1[i - t], t - 1) : 0; }
    __device__ __forceinline__ Match beginning(int t) const { return starts[t + 1] ? match(int(starts[t + 1]) - 1 - t, starts[t + 1] - 1) : 0; }
    __device__ __forceinline__ unsigned last_of(int t) const { return t ? starts[t + 1] : better(starts[0], starts[1]); }

    // All turns at once: every warp has some places t, of which it knows the maxima of all that come before and behind.
    __device__ __forceinline__ void turn() const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = i / 32 + 1, each = (tiles + warps - 1) / warps;
        const int begin = min(warp * each, tiles) * 32, end = min((warp + 1) * each, tiles) * 32;
        Match untouched = 0, behind = 0;  // the best with j < t; the best that begins at a place not yet seen
        unsigned cut = 0, started = 0;  // the sources of the last that a turn of q at t cuts; of the last that begins at t or before
        if (won) {
            for (int t = begin + lane; t < end && t <= i; t += 32) {
                untouched = better(untouched, ending(t)), behind = better(behind, beginning(t));
                cut = better(cut, by_cut[t]), started = better(started, last_of(t));
            }
            Match* const maxima = reinterpret_cast<Match*>(shared_memory()) + 2 * warps;
            unsigned* const sources = reinterpret_cast<unsigned*>(maxima + 2 * warps);
            untouched = best_of_warp(untouched), behind = best_of_warp(behind), cut = best_of_warp(cut), started = best_of_warp(started);
            if (lane == 0) maxima[warp] = untouched, maxima[warps + warp] = behind, sources[warp] = cut, sources[warps + warp] = started;
            __syncthreads();
            untouched = behind = 0, cut = started = 0;
            for (int w = 0; w < warp; ++w)
                untouched = better(untouched, maxima[w]), cut = better(cut, sources[w]), started = better(started, sources[warps + w]);
            for (int w = warp + 1; w < warps; ++w) behind = better(behind, maxima[warps + w]);
            for (int base = end - 32; base >= begin; base -= 32) {
                const int t = base + 31 - lane;
                const Match m = better(behind, best_so_far(t + 1 < end && t < i ? beginning(t + 1) : 0));
                if (t <= i) later[t] = m;
                behind = __shfl_sync(~0u, m, 31);
            }
            __syncwarp();
        } else {
            __syncthreads();
        }
        for (int base = begin; base < end; base += 32) {
            const int t = base + lane;
            if (won) {
                untouched = better(untouched, best_so_far(t <= i ? ending(t) : 0));
                cut = better(cut, best_so_far(t <= i ? by_cut[t] : 0));
                started = better(started, best_so_far(t <= i ? last_of(t) : 0));
            }
            if (t <= i) turn_at(t, untouched, cut, started);
            if (won) untouched = __shfl_sync(~0u, untouched, 31), cut = __shfl_sync(~0u, cut, 31), started = __shfl_sync(~0u, started, 31);
        }
    }

    // The turns of all bits at t, and what was written down at t cleared.
    __device__ __forceinline__ void turn_at(int t, Match untouched, unsigned cut, unsigned started) const {
        const int m = i - t;
        const Match shortened = m ? Match(unsigned(m)) << 32 | cut : 0;
        const bool copied = won && t == source_of(won);
        Match r = won;
        if (inside(t)) {
            r = self && length_of(untouched) >= m ? shortened : untouched;
            r = better(r, later[t]);
            if (int(started) > t) r = better(r, match(int(started) - 1 - t, started - 1));
        }
        for (int place = t * M; place < (t + 1) * M; ++place) {
            const int bit = 1 << (place - t * M);
            const Match wins = better(r, longer[place]);
            if (wins != won || (self && copied)) sums[self ? 0 : 1][place] += worth(wins, self && source_of(wins) == t ? bit : 0) - before;
            longer[place] = 0;
            if (self) continue;
            if (t >= q_won) {
                sums[0][place] += worth(better(shortened, longer_q[place]), 0) - before;
                longer_q[place] = 0;
            }
            if (copied) sums[2][place] += worth(won, bit) - before;
        }
        if (!won) return;
        starts[t + 1] = by_cut[t] = 0;
        if (t == 0) starts[0] = 0;
    }
};

// For each place and bit two matches and three sums, for each place a match, five numbers and two bytes, and one number more.
__host__ __device__ inline int64_t scratch_bytes(int64_t T, int64_t M) { return (T * M * 28 + T * 30 + 4 + 15) / 16 * 16; }

// Four blocks on a multiprocessor: left to choose, ptxas takes so few registers that some spill.
template <class X, bool self> __launch_bounds__(threads, 4) __global__ void backward(const RosaBackward task) {
    const RosaSize& size = task.size;
    const int T = int(size.T), M = int(size.M), G = int(size.C) / M;
    char* const memory = task.scratch + blockIdx.x * scratch_bytes(T, M);
    Match* const matches = reinterpret_cast<Match*>(memory);
    float* const numbers = reinterpret_cast<float*>(matches + 2 * T * M + T);
    int* const lags = reinterpret_cast<int*>(numbers + 3 * T * M);
    unsigned* const starts = reinterpret_cast<unsigned*>(lags + 3 * T);
    uint8_t* const bits = reinterpret_cast<uint8_t*>(starts + 2 * T + 1);
    for (int row = blockIdx.x; row < int(size.B) * G; row += int(task.blocks)) {
        const int64_t first = int64_t(row / G) * T * size.C + row % G * M;  // of its channels
        const int64_t its = int64_t(row) * T;
        const uint8_t* const q = task.q + its;
        Row<X, self> r{task, M, matches, matches + T * M, matches + 2 * T * M, {numbers, numbers + T * M, numbers + 2 * T * M},
                       lags, lags + T, lags + 2 * T, starts, starts + T + 1, bits, bits + T,
                       q, self ? q : task.k + its, self ? q : task.v + its, static_cast<const X*>(task.dout) + first,
                       static_cast<const X*>(task.low) + row % G * M, static_cast<const X*>(task.high) + row % G * M, 0, 0, 0, 0, 0, 0.f};
        for (int p = threadIdx.x; p < T * M; p += threads) matches[p] = matches[T * M + p] = 0, numbers[p] = numbers[T * M + p] = numbers[2 * T * M + p] = 0.f;
        for (int c = threadIdx.x; c < T; c += threads) lags[c] = lags[T + c] = lags[2 * T + c] = 0, bits[c] = bits[T + c] = 0;
        for (int t = threadIdx.x; t < 2 * T + 1; t += threads) starts[t] = 0;
        __syncthreads();
        double sum_low = 0., sum_high = 0.;  // of bit threadIdx.x
        for (r.i = 0; r.i < T; ++r.i) {
            r.find_match();
            if (int(threadIdx.x) < M && (r.won || task.miss_low)) {
                const double g = double(to_float(r.dout[r.i * size.C + threadIdx.x]));
                (r.won && r.v[source_of(r.won)] >> threadIdx.x & 1 ? sum_high : sum_low) += g;
            }
            if (!task.gradients[0]) continue;
            r.find_longer();
            r.turn();
            __syncthreads();
        }
        if (int(threadIdx.x) < M) {
            const int64_t at = row / G * size.C + row % G * M + threadIdx.x;
            task.sums[at] = sum_low, task.sums[size.B * size.C + at] = sum_high;
        }
        for (int which = 0; which < (self ? 1 : 3) && task.gradients[0]; ++which)
            for (int p = threadIdx.x; p < T * M; p += threads) {
                const int64_t at = first + p / M * size.C + p % M;
                const float x = to_float(static_cast<const X*>(task.inputs[which])[at]), size_of = fabsf(x), turned = numbers[which * T * M + p];
                const float divisor = 2.f * (size_of < task.tau ? task.tau : size_of);  // a NaN stays one
                static_cast<X*>(task.gradients[which])[at] = from_float<X>(quotient(x > 0.f ? -turned : turned, divisor));
            }
        __syncthreads();
    }
}

constexpr size_t shared_bytes = warps * (4 * sizeof(Match) + 2 * sizeof(unsigned));

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
    const dim3 grid(unsigned(task->size.B * (task->size.C / task->size.M)));
    return launch(fp32 ? forward<float> : forward<bf16>, grid, threads, shared_bytes, stream, *task);
}

extern "C" int rosa_token_rows(int64_t B, int64_t T, int64_t L, const int64_t* k, int32_t* runs, int64_t* y, void* stream) {
    using namespace rosa;
    return launch(token_rows, dim3(unsigned(B)), threads, shared_bytes, stream, T, L, k, runs, y);
}

extern "C" int64_t rosa_scratch_bytes(int64_t T, int64_t M) { return rosa::scratch_bytes(T, M); }

extern "C" int rosa_backward(const RosaBackward* task, int fp32, void* stream) {
    using namespace rosa;
    const dim3 grid{unsigned(task->blocks)};
    if (task->k) return launch(fp32 ? backward<float, false> : backward<bf16, false>, grid, threads, shared_bytes, stream, *task);
    return launch(fp32 ? backward<float, true> : backward<bf16, true>, grid, threads, shared_bytes, stream, *task);
}
