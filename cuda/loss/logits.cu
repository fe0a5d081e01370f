// Cross entropy with L2Wrap over a chunk of logits, in place. A block has a row: it reads it once for maximum, sum of
// exponentials and arg-max together, and once more while the gradient is written over it: out of the second-level
// cache, as far as that holds the rows being worked on (of 65536 bf16 logits 69 MB on 132 multiprocessors).
#include "../common/pack.cuh"
#include "api.cuh"

namespace loss {
namespace {

using namespace device;

constexpr int threads = 512, warps = threads / 32;
constexpr float lowest = -3.402823466e38f;  // not -infinity: differences of maxima stay numbers

__device__ __forceinline__ float exponential(float x) {
#ifdef __CUDACC__
    return __expf(x);
#else
    return expf(x);
#endif
}

template <class T> struct Piece;  // 16 bytes of a row
template <> struct Piece<float> {
    static constexpr int size = 4;
    static __device__ __forceinline__ void load(const float* p, float (&x)[4]) {
        const float4 v = *reinterpret_cast<const float4*>(p);
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    }
    static __device__ __forceinline__ void store(float* p, const float (&x)[4]) {
        *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
    }
};
template <> struct Piece<bf16> {
    static constexpr int size = 8;
    static __device__ __forceinline__ void load(const bf16* p, float (&x)[8]) {
        const uint4 v = *reinterpret_cast<const uint4*>(p);
        const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 two = unpack(words[i]);
            x[2 * i] = two.x, x[2 * i + 1] = two.y;
        }
    }
    static __device__ __forceinline__ void store(bf16* p, const float (&x)[8]) {
        *reinterpret_cast<uint4*>(p) = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
    }
};

// Maximum, where it is first, and the sum of exp(x - maximum).
struct Seen {
    float top, total;
    int at;

    __device__ __forceinline__ void merge(float other_top, float other_total, int other_at) {
        const float high = other_top > top ? other_top : top;
        total = total * exponential(top - high) + other_total * exponential(other_top - high);
        at = other_top > top || (other_top == top && other_at < at) ? other_at : at;
        top = high;
    }
    template <int n> __device__ __forceinline__ void add(const float (&x)[n], int first) {
        float high = top;
        int where = at;
#pragma unroll
        for (int i = 0; i < n; ++i)
            if (x[i] > high) high = x[i], where = first + i;  // each thread goes upwards: the first of equals stays
        float sum = total * exponential(top - high);
#pragma unroll
        for (int i = 0; i < n; ++i) sum += exponential(x[i] - high);
        total = sum, top = high, at = where;
    }
};

template <class T>
__launch_bounds__(threads) __global__ void rows_of_logits(T* logits, const int64_t* targets, float* losses, int64_t V_, float scale,
                                                          float wrap, int gradient) {
    const int V = int(V_), row = blockIdx.x;
    T* const x = logits + int64_t(row) * V_;
    constexpr int piece = Piece<T>::size;
    // Rows of a V that is not a multiple of the piece begin anywhere: single numbers up to the first multiple of 16 bytes, and at the end.
    const int before = min(V, int((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T))), pieces = (V - before) / piece;
    const int behind = before + pieces * piece;

    Seen seen{lowest, 0.f, V};
    if (int(threadIdx.x) < before) {
        const float one[1] = {to_float(x[threadIdx.x])};
        seen.add(one, threadIdx.x);
    }
#pragma unroll 4
    for (int i = threadIdx.x; i < pieces; i += threads) {
        float values[piece];
        Piece<T>::load(x + before + i * piece, values);
        seen.add(values, before + i * piece);
    }
    if (behind + int(threadIdx.x) < V) {
        const float one[1] = {to_float(x[behind + threadIdx.x])};
        seen.add(one, behind + threadIdx.x);
    }

#pragma unroll
    for (int mask = 16; mask; mask /= 2) {
        const float top = __shfl_xor_sync(~0u, seen.top, mask), total = __shfl_xor_sync(~0u, seen.total, mask);
        seen.merge(top, total, __shfl_xor_sync(~0u, seen.at, mask));
    }
    float* const tops = reinterpret_cast<float*>(shared_memory());
    float* const totals = tops + warps;
    int* const places = reinterpret_cast<int*>(totals + warps);
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = seen.top, totals[threadIdx.x / 32] = seen.total, places[threadIdx.x / 32] = seen.at;
    const int64_t wanted = targets[row];
    const int target = wanted >= 0 && wanted < V_ ? int(wanted) : -1;
    const float of_target = threadIdx.x == 0 && target >= 0 ? to_float(x[target]) : 0.f;  // before anyone writes
    __syncthreads();
    seen = {tops[0], totals[0], places[0]};
#pragma unroll
    for (int w = 1; w < warps; ++w) seen.merge(tops[w], totals[w], places[w]);
    // the difference is exact where the target is the maximum
    if (threadIdx.x == 0) losses[row] = target < 0 ? nanf("") : logf(seen.total) + (seen.top - of_target);
    if (!gradient) return;

    const float by = scale / seen.total, at_top = wrap * seen.top;
    const auto slope = [&](float value, int i) {
        float g = exponential(value - seen.top) * by;
        if (i == target) g -= scale;
        if (i == seen.at) g += at_top;
        return g;
    };
    if (int(threadIdx.x) < before) x[threadIdx.x] = from_float<T>(slope(to_float(x[threadIdx.x]), threadIdx.x));
#pragma unroll 4
    for (int i = threadIdx.x; i < pieces; i += threads) {
        float values[piece];
        Piece<T>::load(x + before + i * piece, values);
#pragma unroll
        for (int j = 0; j < piece; ++j) values[j] = slope(values[j], before + i * piece + j);
        Piece<T>::store(x + before + i * piece, values);
    }
    if (behind + int(threadIdx.x) < V)
        x[behind + threadIdx.x] = from_float<T>(slope(to_float(x[behind + threadIdx.x]), behind + threadIdx.x));
}

template <class T>
int run(void* logits, const int64_t* targets, float* losses, int64_t rows, int64_t V, float scale, float wrap, int gradient, void* stream) {
    return launch(rows_of_logits<T>, dim3(unsigned(rows)), threads, 3 * warps * sizeof(float), stream, static_cast<T*>(logits), targets,
                  losses, V, scale, wrap, gradient);
}

}  // namespace
}  // namespace loss

extern "C" int loss_of_logits(void* logits, const int64_t* targets, float* losses, int64_t rows, int64_t V, float scale, float wrap,
                              int gradient, int dtype, void* stream) {
    if (rows < 1 || rows > INT32_MAX || V < 1 || V > (1 << 30)) return LOSS_UNSUPPORTED;
    return dtype == LOSS_BF16 ? loss::run<device::bf16>(logits, targets, losses, rows, V, scale, wrap, gradient, stream)
                              : loss::run<float>(logits, targets, losses, rows, V, scale, wrap, gradient, stream);
}
