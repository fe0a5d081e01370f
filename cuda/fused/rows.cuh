// How the elementwise kernels walk over [rows, C]: a lane has four neighbouring channels, a warp 128 of them and a run
// of 16 tokens, a block eight runs. So what a token shares with the next stays in registers, a head lies within a warp,
// and the gradients of a parameter are summed where they arise: per lane over a run, per block over its runs, then over
// blocks, always in the same order.
#pragma once

#include "../common/copy.cuh"
#include "../common/pack.cuh"
#include "api.cuh"

namespace fused {

using namespace device;

constexpr int run_tokens = 16, warps = 8, threads = 32 * warps, width = 32 * 4;

// Neighbouring channels of a lane.
template <int V> struct Numbers {
    float x[V];
};
using Four = Numbers<4>;

#define FUSED_OPERATOR(op)                                                                           \
    template <int V> __device__ __forceinline__ Numbers<V> operator op(Numbers<V> a, Numbers<V> b) { \
        Numbers<V> c;                                                                                \
        _Pragma("unroll") for (int i = 0; i < V; ++i) c.x[i] = a.x[i] op b.x[i];                     \
        return c;                                                                                    \
    }                                                                                                \
    template <int V> __device__ __forceinline__ Numbers<V> operator op(Numbers<V> a, float b) {      \
        Numbers<V> c;                                                                                \
        _Pragma("unroll") for (int i = 0; i < V; ++i) c.x[i] = a.x[i] op b;                          \
        return c;                                                                                    \
    }
FUSED_OPERATOR(+)
FUSED_OPERATOR(-)
FUSED_OPERATOR(*)
#undef FUSED_OPERATOR
template <int V> __device__ __forceinline__ Numbers<V>& operator+=(Numbers<V>& a, Numbers<V> b) { return a = a + b; }
template <int V> __device__ __forceinline__ float sum(Numbers<V> a) {
    float total = (a.x[0] + a.x[1]) + (a.x[2] + a.x[3]);
#pragma unroll
    for (int i = 4; i < V; i += 4) total += (a.x[i] + a.x[i + 1]) + (a.x[i + 2] + a.x[i + 3]);
    return total;
}
template <int V = 4> __device__ __forceinline__ Numbers<V> zeros() { return {}; }

template <int V = 4> __device__ __forceinline__ Numbers<V> load(const float* p) {
    Numbers<V> a;
#pragma unroll
    for (int i = 0; i < V; i += 4) {
        const float4 x = *reinterpret_cast<const float4*>(p + i);
        a.x[i] = x.x, a.x[i + 1] = x.y, a.x[i + 2] = x.z, a.x[i + 3] = x.w;
    }
    return a;
}
__device__ __forceinline__ Four four(uint32_t low, uint32_t high) {
    const float2 x = unpack(low), y = unpack(high);
    return {x.x, x.y, y.x, y.y};
}
template <int V = 4> __device__ __forceinline__ Numbers<V> load(const bf16* p) {
    if constexpr (V == 4) {
        const uint2 x = *reinterpret_cast<const uint2*>(p);
        return four(x.x, x.y);
    } else {
        const uint4 x = *reinterpret_cast<const uint4*>(p);
        const Four low = four(x.x, x.y), high = four(x.z, x.w);
        return {low.x[0], low.x[1], low.x[2], low.x[3], high.x[0], high.x[1], high.x[2], high.x[3]};
    }
}
template <int V> __device__ __forceinline__ void store(float* p, Numbers<V> a) {
#pragma unroll
    for (int i = 0; i < V; i += 4) *reinterpret_cast<float4*>(p + i) = make_float4(a.x[i], a.x[i + 1], a.x[i + 2], a.x[i + 3]);
}
__device__ __forceinline__ void store(bf16* p, Four a) {
    *reinterpret_cast<uint2*>(p) = make_uint2(pack(a.x[0], a.x[1]), pack(a.x[2], a.x[3]));
}
__device__ __forceinline__ void store(bf16* p, Numbers<8> a) {
    *reinterpret_cast<uint4*>(p) = make_uint4(pack(a.x[0], a.x[1]), pack(a.x[2], a.x[3]), pack(a.x[4], a.x[5]), pack(a.x[6], a.x[7]));
}

// sigmoid(x) and 1 - sigmoid(x), each with all of its digits.
__device__ __forceinline__ void sigmoids(Four x, Four& rate, Four& rest) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float e = expf(-fabsf(x.x[i])), big = 1.f / (1.f + e), small = e * big;
        rate.x[i] = x.x[i] < 0.f ? small : big;
        rest.x[i] = x.x[i] < 0.f ? big : small;
    }
}

// The sum over the lanes of a head; every lane of the warp must come here.
__device__ __forceinline__ float over_head(float x, int lanes) {
    for (int mask = lanes / 2; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
    return x;
}

// Where a lane is: its channels, and the tokens of its run.
struct Place {
    int c;        // first of four channels
    int part;     // which block of runs
    int b, begin, end;
    bool inside;  // has channels and tokens

    __device__ __forceinline__ Place(int B, int T, int C) {
        const int columns = ceil_div(C, width), runs = ceil_div(T, run_tokens);
        part = blockIdx.x / columns;
        c = blockIdx.x % columns * width + threadIdx.x % 32 * 4;
        const int run = part * warps + threadIdx.x / 32;
        b = run / runs;
        begin = run % runs * run_tokens;
        end = b < B ? min(begin + run_tokens, T) : begin;
        inside = b < B && c < C;
    }
};

// A lane's channels of one tensor at a time; nothing where the lane has none.
template <class T, int V = 4> struct Access {
    bool inside;
    __device__ __forceinline__ Numbers<V> in(const void* p, int64_t at) const {
        return inside ? load<V>(static_cast<const T*>(p) + at) : zeros<V>();
    }
    __device__ __forceinline__ void out(void* p, int64_t at, Numbers<V> x) const {
        if (inside) store(static_cast<T*>(p) + at, x);
    }
};

inline dim3 grid_of(int B, int T, int C) { return dim3(unsigned(fused_parts(B, T) * ceil_div(C, width))); }

template <int n> constexpr size_t sums_bytes = sizeof(float) * warps * n * width;

// Adds up what the runs of the block have summed, and leaves it in parts [blocks, n, C]. Every thread must come here.
template <int n> __device__ __forceinline__ void leave_sums(const Four (&sums)[n], const Place& at, int C, float* parts) {
    float* memory = reinterpret_cast<float*>(shared_memory());
#pragma unroll
    for (int j = 0; j < n; ++j) store(memory + ((threadIdx.x / 32) * n + j) * width + threadIdx.x % 32 * 4, sums[j]);
    __syncthreads();
    const int c0 = at.c - int(threadIdx.x % 32) * 4;
    for (int i = threadIdx.x; i < n * width; i += threads) {
        float total = 0.f;
#pragma unroll
        for (int w = 0; w < warps; ++w) total += memory[w * n * width + i];
        if (c0 + i % width < C) parts[(int64_t(at.part) * n + i / width) * C + c0 + i % width] = total;
    }
}

// to[i] = the sum of parts[p][i] over p: 32 numbers a block, eight threads each.
template <class T> __launch_bounds__(threads) __global__ void collect(const float* parts, int count, int size, T* to) {
    float* memory = reinterpret_cast<float*>(shared_memory());
    const int i = blockIdx.x * 32 + threadIdx.x % 32, group = threadIdx.x / 32;
    float total = 0.f;
    if (i < size)
#pragma unroll 4
        for (int p = group; p < count; p += warps) total += parts[int64_t(p) * size + i];
    memory[threadIdx.x] = total;
    __syncthreads();
    if (group || i >= size) return;
#pragma unroll
    for (int g = 1; g < warps; ++g) total += memory[g * 32 + threadIdx.x];
    to[i] = from_float<T>(total);
}

template <class T> int collect_sums(const float* parts, int64_t count, int size, void* to, void* stream) {
    return launch(collect<T>, dim3(ceil_div(size, 32)), threads, threads * sizeof(float), stream, parts, int(count), size,
                  static_cast<T*>(to));
}

inline bool valid(int64_t B, int64_t T, int64_t C) {
    return B >= 1 && T >= 1 && C >= 4 && C % 4 == 0 && B * T <= INT32_MAX - 256 && fused_parts(B, T) * ceil_div(int(C), width) <= INT32_MAX;
}
inline bool valid_heads(int C, int N) { return (N == 16 || N == 32 || N == 64 || N == 128) && C % N == 0; }

}  // namespace fused
