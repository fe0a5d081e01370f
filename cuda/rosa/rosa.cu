// ROSA on a GPU: a block for each row of symbols. Run lengths of all lags at once; for the gradients the second and third mismatch too, and a warp for
// each turn of a bit inside the match that won (flips.h says what a turn does): for short matches, as data that are not constant have,
// few passes over the lags. Lengths, sources and maxima are integers, and each sum has one thread: no order of threads shows.
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
__device__ __forceinline__ Match better(Match a, Match b) { return a > b ? a : b; }

__device__ __forceinline__ Match best_of_warp(Match m) {
#pragma unroll
    for (int mask = 16; mask; mask /= 2) m = better(m, __shfl_xor_sync(~0u, m, mask));
    return m;
}

// To within two units of the last digit. The exact one calls a function, around which registers spill.
__device__ __forceinline__ float quotient(float x, float y) {
#ifdef __CUDACC__
    return __fdividef(x, y);
#else
    return x / y;
#endif
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
    Match* longer;  // [T, M], the best match that a turn outside the winner makes better than it
    float* sums[3];  // [T, M] of dq, dk, dv
    int *L1, *L2, *L3;  // by lag, lag 1 first
    uint8_t *D1, *D2;
    const uint8_t *q, *k, *v;
    const X *dout, *low, *high;
    int64_t i, j_won, s_won, q_won;
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
    __device__ __forceinline__ bool inside(int64_t t) const { return (t > s_won && t <= j_won) || (self && t > q_won); }
    __device__ __forceinline__ void add(int which, int64_t t, int b, Match wins) const {
        sums[which][t * M + b] += worth(wins, self && source_of(wins) == t ? 1 << b : 0) - before;
    }
    __device__ __forceinline__ void lengthen(int64_t t, int b, Match to) const {
        if (to > won && !inside(t)) atomicMax(longer + t * M + b, to);
    }

    // One symbol on; the match that wins there.
    __device__ __forceinline__ void find_match() {
        Match best = 0;
        for (int64_t c = threadIdx.x; c < i; c += threads) {
            const uint8_t differ = k[i - 1 - c] ^ q[i];
            const int first = L1[c], second = L2[c];
            if (self) {
                L3[c] = (differ ? second : L3[c]) + 1;
                if (differ) D2[c] = D1[c];
            }
            L2[c] = (differ ? first : second) + 1;
            L1[c] = differ ? 0 : first + 1;
            if (differ) D1[c] = differ;
            else best = better(best, match(first + 1, i - 1 - c));
        }
        won = best_of_block(best, int(i));
        j_won = won ? source_of(won) - 1 : i - 1;
        s_won = j_won - length_of(won), q_won = i - length_of(won);
        before = worth(won, 0);
    }

    __device__ __forceinline__ void find_longer() const {
        for (int64_t c = threadIdx.x; c < i; c += threads) {
            const unsigned differ = D1[c];
            if (differ == 0 || (differ & (differ - 1))) continue;
            int b = 0;
            while (differ >> b != 1) ++b;
            const int64_t j = i - 1 - c, s = j - L1[c];
            const int second = L2[c], other = int(i - s);
            int to = second;
            if (self) to = second < other ? second : second > other ? other : D2[c] == differ ? L3[c] : second;
            lengthen(s, b, match(to, j));
            if (self && i - L1[c] > j) lengthen(i - L1[c], b, match(second, j));
        }
    }

    // The match that wins where bit b of symbol t is turned in q, or in k, or (self) in both; a warp's lanes share the lags.
    __device__ __forceinline__ Match after_turn(int64_t t, int b, bool in_q) const {
        const int m = int(i - t);
        Match best = 0;
        for (int64_t c = threadIdx.x % 32; c < i; c += 32) {
            const bool near = c < m;  // j >= t
            int length = L1[c];
            if (in_q || near || self) {
                const int place = (self || !in_q) && near ? int(m - 1 - c) : m;
                if (length > place)
                    length = place;
                else if (length == place && D1[c] == 1u << b) {
                    length = L2[c];
                    if (self && near && length >= m) length = length > m ? m : D2[c] == 1u << b ? L3[c] : length;
                }
            }
            if (length) best = better(best, match(length, i - 1 - c));
        }
        return best_of_warp(best);
    }

    __device__ __forceinline__ void turn(int64_t begin, int64_t end, bool in_q, int which) const {  // t in (begin, end]
        for (int u = threadIdx.x / 32; u < int(end - begin) * M; u += warps) {
            const int64_t t = begin + 1 + u / M;
            const int b = u % M;
            const Match wins = after_turn(t, b, in_q);
            if (threadIdx.x % 32 == 0) add(which, t, b, wins);
        }
    }

    __device__ __forceinline__ void turn_outside() const {
        for (int place = threadIdx.x; place < int(i + 1) * M; place += threads) {
            const int64_t t = place / M;
            const int b = place % M;
            const Match wins = longer[place];
            if (wins) {
                add(self ? 0 : 1, t, b, wins);
                longer[place] = 0;
            } else if (self && won && t == source_of(won) && !inside(t)) {
                add(0, t, b, won);
            }
            if (!self && won && t == source_of(won)) sums[2][place] += worth(won, 1 << b) - before;
        }
    }
};

__host__ __device__ inline int64_t scratch_bytes(int64_t T, int64_t M) { return (T * M * 20 + T * 14 + 15) / 16 * 16; }

// Four blocks on a multiprocessor: left to choose, ptxas takes so few registers that some spill.
template <class X, bool self> __launch_bounds__(threads, 4) __global__ void backward(const RosaBackward task) {
    const RosaSize& size = task.size;
    const int T = int(size.T), M = int(size.M), G = int(size.C) / M;
    char* const memory = task.scratch + blockIdx.x * scratch_bytes(T, M);
    Match* const longer = reinterpret_cast<Match*>(memory);
    float* const numbers = reinterpret_cast<float*>(longer + T * M);
    int* const lags = reinterpret_cast<int*>(numbers + 3 * T * M);
    uint8_t* const bits = reinterpret_cast<uint8_t*>(lags + 3 * T);
    for (int row = blockIdx.x; row < int(size.B) * G; row += int(task.blocks)) {
        const int64_t first = int64_t(row / G) * T * size.C + row % G * M;  // of its channels
        const int64_t its = int64_t(row) * T;
        const uint8_t* const q = task.q + its;
        Row<X, self> r{task, M, longer, {numbers, numbers + T * M, numbers + 2 * T * M}, lags, lags + T, lags + 2 * T, bits, bits + T,
                       q, self ? q : task.k + its, self ? q : task.v + its, static_cast<const X*>(task.dout) + first,
                       static_cast<const X*>(task.low) + row % G * M, static_cast<const X*>(task.high) + row % G * M, 0, 0, 0, 0, 0, 0.f};
        for (int p = threadIdx.x; p < T * M; p += threads) longer[p] = 0, numbers[p] = numbers[T * M + p] = numbers[2 * T * M + p] = 0.f;
        for (int c = threadIdx.x; c < T; c += threads) lags[c] = lags[T + c] = lags[2 * T + c] = 0, bits[c] = bits[T + c] = 0;
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
            __syncthreads();
            if (self) {
                r.turn(r.s_won, r.j_won, true, 0);
                r.turn(r.q_won > r.j_won ? r.q_won : r.j_won, r.won ? r.i : r.j_won, true, 0);
            } else {
                r.turn(r.q_won - 1, r.i, true, 0);
                r.turn(r.s_won, r.j_won, false, 1);
            }
            r.turn_outside();
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

constexpr size_t shared_bytes = 2 * warps * sizeof(Match);

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
