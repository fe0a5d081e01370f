// Test-time training of the state inside the scans: a gradient step after each segment, its derivative, and what keys,
// rate and prediction head earn by it. RWKV-v7/docs/wkv7_chunked.md has the formulas.
//
// The state's rows stay in the registers of the warps that carry them. Their products with the keys, which are bf16 as
// they come, run on the tensor cores with the other factor as the sum of two bf16 numbers: relative error 2^-17. The
// head, small, is plain fp32 on all threads.
#pragma once

#include "chunk.cuh"

namespace wkv7 {

// The scans without steps: nothing of what is here is in them.
struct NoSteps { static constexpr bool on = false; };

struct Steps {
    static constexpr bool on = true;
    int rows, hidden, segment, count, sequences;  // count: of a sequence; hidden 0: no prediction head
    bool stored;
    const float *rate, *head;  // [H]; W1 and the transpose of W2, [hidden, rows] each
    const bf16 *k, *v, *a;
    float* cores;     // [count, sequences, H, rows, N]: the rows before each step
    uint32_t* masks;  // [B, T, H]: which hidden units are above zero; none without a head
    float* d_cores;   // as cores: the gradient after each step

    __device__ __forceinline__ int64_t core(int number, int sequence, int H, int head_, int N) const {
        return ((int64_t(number) * sequences + sequence) * H + head_) * rows * N;
    }
    __device__ __forceinline__ const float* w1() const { return head; }
    __device__ __forceinline__ const float* w2() const { return head + hidden * rows; }

    // What number the step after this chunk has, from 0 on; -1: there is none.
    __device__ __forceinline__ int after(int chunk, int C) const {
        const int tokens = (chunk + 1) * C, number = tokens / segment;
        return tokens % segment == 0 && number <= count ? number - 1 : -1;
    }

    static bool valid(const Wkv7Shape& s, const Wkv7Steps& t) {
        return !s.cu_seqlens && s.segment_chunks == 0 && t.rows >= 8 && t.rows % 8 == 0 && t.rows <= s.N && t.hidden >= 0 &&
               t.hidden <= 32 && (t.hidden == 0 || t.head) && t.segment >= 1 && t.segment % chunk_tokens(s.N) == 0;
    }
    static int steps(const Wkv7Shape& s, const Wkv7Steps& t) { return (s.T - 1) / t.segment; }
    static int64_t core_bytes(const Wkv7Shape& s, const Wkv7Steps& t) { return int64_t(4) * steps(s, t) * s.B * s.H * t.rows * s.N; }
    static int64_t mask_bytes(const Wkv7Shape& s, const Wkv7Steps& t) { return t.hidden ? int64_t(4) * s.B * s.T * s.H : 0; }
    Steps(const Wkv7Shape& s, const Wkv7Steps& t, const Wkv7Inputs& in, void* saved, void* scratch)
        : rows(t.rows), hidden(t.hidden), segment(t.segment), count(steps(s, t)), sequences(s.B), stored(t.stored), rate(t.rate),
          head(t.head), k((const bf16*)in.k), v((const bf16*)in.v), a((const bf16*)in.a), cores((float*)saved),
          masks((uint32_t*)((char*)saved + core_bytes(s, t))), d_cores((float*)scratch) {}
};

namespace {

// fp32 [tokens][columns] in shared memory.
struct Rows32 {
    int base, stride;
    __device__ __forceinline__ float& at(int t, int i) const { return shared<float>(base + (t * stride + i) * 4); }
    __device__ __forceinline__ float4& four(int t, int i) const { return shared<float4>(base + (t * stride + i) * 4); }
};

// Tokens that a step treats at a time. They divide a chunk.
__host__ __device__ constexpr int step_tokens(int N) { return N == 16 || N == 128 ? 32 : 64; }

// n tokens of a segment in shared memory: keys, targets' values and factors (or masks), and `copies` times a value for
// each row and for each hidden unit.
template <int N, int n, int copies> struct StepTokens {
    Tile<n, N> keys;  // first: it wants the alignment of its base
    int rows, hidden, planes, layers, values, factors;

    // 4 behind a multiple of 16: no bank is met twice along tokens, neither by four neighbours nor by fragments.
    __host__ __device__ static int row_stride(int rows) { return (rows + 15) / 16 * 16 + 4; }
    __host__ __device__ static int bytes(int rows, int hidden) {
        return n * (N * 2 + copies * (row_stride(rows) + (hidden | 1)) * 4 + rows * 2 + 4);
    }
    __device__ StepTokens(int base, int rows_, int hidden_)
        : keys{base}, rows(rows_), hidden(hidden_), planes(keys.end()), values(planes + copies * n * row_stride(rows) * 4),
          factors(values + n * rows * 2) {
        layers = factors + n * 4;
    }
    __device__ __forceinline__ Rows32 plane(int i) const { return {planes + i * n * row_stride(rows) * 4, row_stride(rows)}; }
    __device__ __forceinline__ Rows32 layer(int i) const { return {layers + i * n * (hidden | 1) * 4, hidden | 1}; }

    // Keys and values; k . kk, the factor of targets that are what the delta rule has stored, or 1. All threads;
    // visible behind the caller's next barrier.
    __device__ __forceinline__ void load(const Steps& p, int64_t first, int stride) const {
        copy_tokens(keys, p.a + first, stride, n);
        const int pieces = rows / 8, thread = forget(threadIdx.x);
#pragma unroll 1
        for (int i = thread; i < n * pieces; i += 2 * N)
            copy_async(values + i * 16, p.v + first + int64_t(i / pieces) * stride + i % pieces * 8, true);
        copy_commit();
        constexpr int sharing = 2 * N / n, channels = N / sharing;  // threads of a token, and what each has
        const int t = thread / sharing, channel0 = thread % sharing * channels;
        copy_wait<0>();
        __syncthreads();
        float dot = p.stored ? 0.f : -1.f;
        if (p.stored) {
#pragma unroll
            for (int i = 0; i < channels / 8; ++i) {
                const uint4 a = shared<uint4>(keys.at(t, channel0 + i * 8));
                const uint4 k = *reinterpret_cast<const uint4*>(p.k + first + int64_t(t) * stride + channel0 + i * 8);
                dot = add_products(add_products(add_products(add_products(dot, k.x, a.x), k.y, a.y), k.z, a.z), k.w, a.w);
            }
#pragma unroll
            for (int mask = 1; mask < sharing; mask *= 2) dot += __shfl_xor_sync(~0u, dot, mask);
        }
        if (thread % sharing == 0) shared<float>(factors + t * 4) = -dot;  // kk = -a
    }
    // Keys and masks only.
    __device__ __forceinline__ void load_masks(const Steps& p, int64_t first, int stride, int64_t first_token, int H) const {
        copy_tokens(keys, p.a + first, stride, n);
        copy_commit();
        if (hidden)
            for (int t = threadIdx.x; t < n; t += 2 * N) shared<uint32_t>(factors + t * 4) = p.masks[first_token + int64_t(t) * H];
        copy_wait<0>();
        __syncthreads();
    }
    static __device__ __forceinline__ float add_products(float sum, uint32_t x, uint32_t y) {
        const float2 p = unpack(x), q = unpack(y);
        return sum + p.x * q.x + p.y * q.y;
    }
    __device__ __forceinline__ uint32_t mask(int t) const { return shared<uint32_t>(factors + t * 4); }
    __device__ __forceinline__ float4 target(int t, int i) const {
        const uint2 v = shared<uint2>(values + (t * rows + i) * 2);
        const float2 x = unpack(v.x), y = unpack(v.y);
        const float by = shared<float>(factors + t * 4);
        return make_float4(x.x * by, x.y * by, y.x * by, y.y * by);
    }

    // to[t][m] = f(t, m, W[m] . from[t]). Unrolled, the loops would make the scans spill, whose states are in registers meanwhile.
    template <class F> __device__ __forceinline__ void to_hidden(const Rows32& from, const Rows32& to, const float* W, F f) const {
        for (int job = threadIdx.x; job < n * hidden; job += 2 * N) {
            const int t = job % n, m = job / n;
            float sum = 0.f;
#pragma unroll 1
            for (int i = 0; i < rows; i += 4) {
                const float4 x = from.four(t, i), w = *reinterpret_cast<const float4*>(W + m * rows + i);
                sum += x.x * w.x + x.y * w.y + x.z * w.z + x.w * w.w;
            }
            to.at(t, m) = f(t, m, sum);
        }
    }
    // to[t] = f(t, from[t] + W^T h[t]), four rows of it at a time
    template <class F>
    __device__ __forceinline__ void from_hidden(const Rows32& from, const Rows32& to, const Rows32& h, const float* W, F f) const {
        for (int job = threadIdx.x; job < n * rows / 4; job += 2 * N) {
            const int t = job % n, i = job / n * 4;
            float4 x = from.four(t, i);
#pragma unroll 2
            for (int m = 0; m < hidden; ++m) {
                const float y = h.at(t, m);
                const float4 w = *reinterpret_cast<const float4*>(W + m * rows + i);
                x.x += y * w.x, x.y += y * w.y, x.z += y * w.z, x.w += y * w.w;
            }
            to.four(t, i) = f(t, i, x);
        }
    }
    __device__ __forceinline__ float4 without_target(int t, int i, float4 x) const {
        const float4 z = target(t, i);
        return make_float4(x.x - z.x, x.y - z.y, x.z - z.z, x.w - z.w);
    }

    // to[t][row] = sign S a_t for the 16 rows of this warp. rows_of(k, i): pair i of the left factor's k-th tile.
    template <class F> __device__ __forceinline__ void project(const Rows32& to, int slab, float sign, F rows_of) const {
#pragma unroll 1
        for (int t = 0; t < n; t += 32) {
            const int lane = forgotten_lane();
            Sums<32> d;
            clear(d);
#pragma unroll
            for (int k = 0; k < N / 16; ++k) {
                uint32_t rounded[1][4], rest[1][4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float2 x = rows_of(k, i);
                    rounded[0][i] = pack(x.x, x.y);
                    const float2 y = unpack(rounded[0][i]);
                    rest[0][i] = pack(x.x - y.x, x.y - y.y);
                }
                multiply<true>(d, rounded, keys, {0, 1}, {0, 2}, t, k * 16, lane);
                multiply<true>(d, rest, keys, {0, 1}, {0, 2}, t, k * 16, lane);
            }
            for_pairs(d, slab, [&](int row, int column, float x, float y) {
                to.at(t + column, row) = sign * x, to.at(t + column + 1, row) = sign * y;
            });
        }
    }
    // The same from rows in global memory; those of a lane are the ones that for_pairs gives it.
    __device__ __forceinline__ void project_stored(const Rows32& to, int slab, float sign, const float* S) const {
        const int row0 = slab + lane_index() / 4, column0 = lane_index() % 4 * 2;
        project(to, slab, sign, [&](int k, int i) {
            const int row = row0 + i % 2 * 8;
            return row < rows ? *reinterpret_cast<const float2*>(S + row * N + k * 16 + i / 2 * 8 + column0) : make_float2(0.f, 0.f);
        });
    }
    // S += scale sum_t x[t] a_t^T for the 16 rows of this warp.
    __device__ __forceinline__ void step(Sums<N>& S, int slab, const Rows32& x, float scale) const {
        const int lane = forgotten_lane(), row0 = slab + lane / 4, t0 = lane % 4 * 2;
#pragma unroll 1
        for (int k = 0; k < n / 16; ++k) {
            uint32_t left[1][4], rest[1][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = row0 + i % 2 * 8, t = k * 16 + t0 + i / 2 * 8;
                const float2 y = row < rows ? make_float2(scale * x.at(t, row), scale * x.at(t + 1, row)) : make_float2(0.f, 0.f);
                left[0][i] = pack(y.x, y.y);
                const float2 rounded = unpack(left[0][i]);
                rest[0][i] = pack(y.x - rounded.x, y.y - rounded.y);
            }
            multiply<false>(S, left, keys, {0, 1}, {0, N / 16}, 0, k * 16, lane);
            multiply<false>(S, rest, keys, {0, 1}, {0, N / 16}, 0, k * 16, lane);
        }
    }
};

template <int N> using ScanTokens = StepTokens<N, step_tokens(N), 1>;

// Shared memory of a scan whose stages take `stages` bytes: a step works in the stage that is free, or behind them all.
template <int N> int scan_bytes(int stages, const Wkv7Steps& t) {
    const int needed = ScanTokens<N>::bytes(t.rows, t.hidden);
    return needed <= stages / scan_stages ? stages : stages + needed;
}

// A step of one sequence and head, after segment `number`; below 0: none. S: 16 rows of the state in each warp, all of
// them in the block; backwards those of its gradient. stage: that of the chunk before, which nobody reads any more. All
// threads, behind a barrier; ends with one.
//
// The way back has the same program: with e = G a in the place of u, without targets, and with the hidden units chosen
// that were above zero on the way there.
template <int N, bool backwards>
__device__ __forceinline__ void make_step(const Steps& p, int T, int H, Sums<N>& S, int slab, int number, int sequence, int head, int stage,
                                          int stage_bytes) {
    if (number < 0) return;
    constexpr int n = step_tokens(N);
    const int base = ScanTokens<N>::bytes(p.rows, p.hidden) <= stage_bytes ? stage * stage_bytes : scan_stages * stage_bytes,
              stride = H * N;
    // Forgotten, or else addresses made of them wait in registers through all chunks.
    const ScanTokens<N> tokens(forget(base), forget(p.rows), forget(p.hidden));
    const Rows32 plane = tokens.plane(0), layer = tokens.layer(0);
    const bool owner = uniform(slab) < p.rows;
    const float rate = p.rate[head];
    float* const core = (backwards ? p.d_cores : p.cores) + p.core(number, sequence, H, head, N);
    if (owner)
        for_pairs(S, slab, [&](int row, int column, float x, float y) {
            if (row < p.rows) *reinterpret_cast<float2*>(core + row * N + column) = make_float2(x, y);
        });
#pragma unroll 1
    for (int t0 = 0; t0 < p.segment; t0 += n) {
        const int64_t token = (int64_t(sequence) * T + int64_t(number) * p.segment + t0) * H + head, first = token * N;
        if constexpr (backwards)
            tokens.load_masks(p, first, stride, token, H);
        else
            tokens.load(p, first, stride);
        if (owner) {
            const float sign = backwards ? 1.f : -1.f;
            if (t0 == 0)
                tokens.project(plane, slab, sign,
                               [&](int k, int i) { return make_float2(S[2 * k + i / 2][i % 2 * 2], S[2 * k + i / 2][i % 2 * 2 + 1]); });
            else  // the registers have gone on
                tokens.project_stored(plane, slab, sign, core);
        }
        __syncthreads();
        if (p.hidden) {
            if constexpr (backwards)
                tokens.to_hidden(plane, layer, p.w1(), [&](int t, int m, float x) { return tokens.mask(t) >> m & 1 ? x : 0.f; });
            else
                tokens.to_hidden(plane, layer, p.w1(), [](int, int, float x) { return x > 0.f ? x : 0.f; });
            __syncthreads();
        }
        if (!backwards || p.hidden) {
            if constexpr (backwards) {
                tokens.from_hidden(plane, plane, layer, p.w2(), [](int, int, float4 x) { return x; });
            } else {
                for (int t = threadIdx.x; t < n && p.hidden; t += 2 * N) {
                    uint32_t mask = 0;
                    for (int m = 0; m < p.hidden; ++m) mask |= uint32_t(layer.at(t, m) > 0.f) << m;
                    p.masks[token + int64_t(t) * H] = mask;
                }
                tokens.from_hidden(plane, plane, layer, p.w2(), [&](int t, int i, float4 x) { return tokens.without_target(t, i, x); });
            }
            __syncthreads();
        }
        if (p.hidden) {
            if constexpr (backwards)
                tokens.to_hidden(plane, layer, p.w2(), [&](int t, int m, float x) { return tokens.mask(t) >> m & 1 ? x : 0.f; });
            else
                tokens.to_hidden(plane, layer, p.w2(), [&](int t, int m, float x) { return layer.at(t, m) > 0.f ? x : 0.f; });
            __syncthreads();
            tokens.from_hidden(plane, plane, layer, p.w1(), [](int, int, float4 x) { return x; });
            __syncthreads();
        }
        if (owner) tokens.step(S, slab, plane, backwards ? -rate : rate);
        __syncthreads();
    }
}

// All threads: the tokens of segment `number` on their way to the cache while the chunk before the step is computed.
template <int N>
__device__ __forceinline__ void fetch_ahead(const Steps& p, int T, int H, int number, int sequence, int head, bool targets) {
    if (number < 0) return;
    constexpr int lines = (N * 2 + 127) / 128;
    const int64_t first = ((int64_t(sequence) * T + int64_t(number) * p.segment) * H + head) * N;
#pragma unroll 1
    for (int i = forget(threadIdx.x); i < p.segment * lines; i += 2 * N) {
        const int64_t offset = first + int64_t(i / lines) * H * N + i % lines * 64;
        prefetch(p.a + offset);
        if (targets) prefetch(p.v + offset);
        if (targets && p.stored) prefetch(p.k + offset);
    }
}

// blockIdx: segment and sequence, head. With S the rows before the step and G the gradient after it, for each token:
//     da += rate (G^T slope - S^T d_u)        sums [1 + 2 hidden rows]: d rate, dW1, dW2^T
// slope and d_u are s and q of RWKV-v7/docs/wkv7_chunked.md; rate d_u is the gradient of u. The forward's formulas and
// the backward's are both computed anew.
template <int N> __launch_bounds__(N * 2, N == 128 ? 1 : 192 / N)
__global__ void step_gradients(Steps p, int T, int H, bf16* __restrict__ da, float* __restrict__ sums_) {
    constexpr int n = 32;
    const int number = blockIdx.x / p.sequences, sequence = blockIdx.x % p.sequences, head = blockIdx.y, slab = warp_index() * 16,
              stride = H * N;
    const StepTokens<N, n, 4> tokens(0, p.rows, p.hidden);
    const Rows32 u = tokens.plane(0), miss = tokens.plane(1), e = tokens.plane(2), d_miss = tokens.plane(3);
    const Rows32 hid = tokens.layer(0), inner = tokens.layer(1), d_inner = tokens.layer(2), d_hid = tokens.layer(3);
    const int64_t core = p.core(number, sequence, H, head, N);
    const float *const S = p.cores + core, *const G = p.d_cores + core, rate = p.rate[head];
    float* const sums = sums_ + (int64_t(blockIdx.x) * H + head) * (1 + 2 * p.hidden * p.rows);
    const auto same = [](int, int, float4 x) { return x; };
    const auto chosen = [&](int t, int m, float x) { return hid.at(t, m) > 0.f ? x : 0.f; };
    float d_rate = 0.f;
#pragma unroll 1
    for (int t0 = 0; t0 < p.segment; t0 += n) {
        const int64_t first = ((int64_t(sequence) * T + int64_t(number) * p.segment + t0) * H + head) * N;
        tokens.load(p, first, stride);
        if (uniform(slab) < p.rows) {
            tokens.project_stored(u, slab, -1.f, S);
            tokens.project_stored(e, slab, 1.f, G);
        }
        __syncthreads();
        if (p.hidden) {
            tokens.to_hidden(u, hid, p.w1(), [](int, int, float x) { return x > 0.f ? x : 0.f; });
            tokens.to_hidden(e, d_inner, p.w1(), chosen);  // a thread reads what itself has written
            __syncthreads();
        }
        tokens.from_hidden(u, miss, hid, p.w2(), [&](int t, int i, float4 x) { return tokens.without_target(t, i, x); });
        tokens.from_hidden(e, d_miss, d_inner, p.w2(), same);
        __syncthreads();
        if (p.hidden) {
            tokens.to_hidden(miss, inner, p.w2(), chosen);
            tokens.to_hidden(d_miss, d_hid, p.w2(), chosen);
            __syncthreads();
            for (int job = threadIdx.x; job < p.hidden * p.rows; job += 2 * N) {
                const int m = job / p.rows, i = job % p.rows;
                float w1 = 0.f, w2 = 0.f;
                for (int t = 0; t < n; ++t) {
                    w1 += inner.at(t, m) * e.at(t, i) + d_hid.at(t, m) * u.at(t, i);
                    w2 += d_inner.at(t, m) * miss.at(t, i) + hid.at(t, m) * d_miss.at(t, i);
                }
                float *const d_w1 = sums + 1 + job, *const d_w2 = d_w1 + p.hidden * p.rows;
                *d_w1 = (t0 ? *d_w1 : 0.f) + rate * w1;
                *d_w2 = (t0 ? *d_w2 : 0.f) + rate * w2;
            }
            __syncthreads();
            tokens.from_hidden(miss, miss, inner, p.w1(), same);
            tokens.from_hidden(d_miss, d_miss, d_hid, p.w1(), same);
            __syncthreads();
        }
        const Rows32 slope = miss, d_u = d_miss;
        for (int job = threadIdx.x; job < n * p.rows; job += 2 * N)
            d_rate += slope.at(job / p.rows, job % p.rows) * e.at(job / p.rows, job % p.rows);
        const int j = threadIdx.x % (N / 2) * 2, t1 = threadIdx.x / (N / 2);
        float2 x[n / 4];
#pragma unroll
        for (int t = 0; t < n / 4; ++t) x[t] = make_float2(0.f, 0.f);
#pragma unroll 1
        for (int i = 0; i < p.rows; i += 4) {
            float2 s[4], g[4];
#pragma unroll
            for (int row = 0; row < 4; ++row) {
                s[row] = *reinterpret_cast<const float2*>(S + (i + row) * N + j);
                g[row] = *reinterpret_cast<const float2*>(G + (i + row) * N + j);
            }
#pragma unroll
            for (int t = 0; t < n / 4; ++t) {
                const float4 y = slope.four(t * 4 + t1, i), d = d_u.four(t * 4 + t1, i);
                x[t].x +=
                    g[0].x * y.x - s[0].x * d.x + g[1].x * y.y - s[1].x * d.y + g[2].x * y.z - s[2].x * d.z + g[3].x * y.w - s[3].x * d.w;
                x[t].y +=
                    g[0].y * y.x - s[0].y * d.x + g[1].y * y.y - s[1].y * d.y + g[2].y * y.z - s[2].y * d.z + g[3].y * y.w - s[3].y * d.w;
            }
        }
#pragma unroll
        for (int t = 0; t < n / 4; ++t) {
            uint32_t& pair = *reinterpret_cast<uint32_t*>(da + first + int64_t(t * 4 + t1) * stride + j);
            const float2 others = unpack(pair);
            pair = pack(others.x + rate * x[t].x, others.y + rate * x[t].y);
        }
        // No barrier: the keys and values that the next copies overwrite were last read before those above, all else is
        // written behind that of `load`.
    }
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) d_rate += __shfl_xor_sync(~0u, d_rate, mask);
    if (lane_index() == 0) shared<float>(warp_index() * 4) = d_rate;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < N / 16; ++i) d_rate += shared<float>(i * 4);
        sums[0] = d_rate;
    }
}

template <int N> int launch_step_gradients(const Steps& p, const Wkv7Shape& s, void* da, float* sums, void* stream) {
    if (p.count == 0) return 0;
    const int bytes = StepTokens<N, 32, 4>::bytes(p.rows, p.hidden);
    return launch(step_gradients<N>, dim3(p.count * p.sequences, s.H), N * 2, bytes, stream, p, s.T, s.H, (bf16*)da, sums);
}

}  // namespace
}  // namespace wkv7
