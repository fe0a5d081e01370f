// max(x, 0)^2 of the channel mixing, and its backward.
//
// Backward reads y = max(x, 0)^2, which the next product keeps anyway, so that x need not be kept. Nothing is lost: in
// binary, the square root of a rounded square is the number itself. For x in [1, 2) with a spacing of e, y below 2 is
// off by e/2 at most and y from 2 on by e, its root by e/4 or e/2^1.5: less than half the spacing. Only where y leaves
// the normal numbers, below x = 2^-63 = 1e-19, is the root another number, and 0 from about 2^-67 (bf16) or 2^-75
// (fp32) on: gradients of 1e-19 dy, that no sum over tokens keeps. Above 2^64 the loss is infinite already.
#include "rows.cuh"

namespace fused {
namespace {

constexpr int each = 4;  // groups of four that a thread loads before it stores any

__device__ __forceinline__ Four positive(Four x) {  // a NaN stays one
    return {x.x[0] < 0.f ? 0.f : x.x[0], x.x[1] < 0.f ? 0.f : x.x[1], x.x[2] < 0.f ? 0.f : x.x[2], x.x[3] < 0.f ? 0.f : x.x[3]};
}

template <class T> __device__ __forceinline__ Four root(Four y) {  // max(x, 0) of y
#pragma unroll
    for (int i = 0; i < 4; ++i) y.x[i] = to_float(from_float<T>(sqrtf(y.x[i])));
    return y;
}

// dy null: out = max(x, 0)^2, else x is such an out, and out = 2 sqrt(x) dy.
template <class T> __launch_bounds__(threads) __global__ void relu_square(const T* x, const T* dy, T* out, int64_t count) {
    const int64_t first = (int64_t(blockIdx.x) * each * threads + threadIdx.x) * 4;
    Four in[each], slope[each];
#pragma unroll
    for (int i = 0; i < each; ++i) {
        const int64_t at = first + int64_t(i) * threads * 4;
        if (at < count) {
            in[i] = load(x + at);
            if (dy) slope[i] = load(dy + at);
        }
    }
#pragma unroll
    for (int i = 0; i < each; ++i) {
        const int64_t at = first + int64_t(i) * threads * 4;
        if (at < count) store(out + at, dy ? root<T>(in[i]) * (slope[i] * 2.f) : positive(in[i]) * positive(in[i]));
    }
}

template <class T> int run(const void* x, const void* dy, void* out, int64_t count, void* stream) {
    const int64_t of_block = int64_t(each) * threads * 4, blocks = (count + of_block - 1) / of_block;
    if (count < 4 || count % 4 || blocks > INT32_MAX) return FUSED_UNSUPPORTED;
    return launch(relu_square<T>, dim3(unsigned(blocks)), threads, 0, stream, static_cast<const T*>(x), static_cast<const T*>(dy),
                  static_cast<T*>(out), count);
}

}  // namespace
}  // namespace fused

extern "C" int fused_relu_square(const void* x, void* y, int64_t count, int dtype, void* stream) {
    return dtype == FUSED_BF16 ? fused::run<fused::bf16>(x, nullptr, y, count, stream) : fused::run<float>(x, nullptr, y, count, stream);
}

extern "C" int fused_relu_square_backward(const void* dy, const void* y, void* dx, int64_t count, int dtype, void* stream) {
    return dtype == FUSED_BF16 ? fused::run<fused::bf16>(y, dy, dx, count, stream) : fused::run<float>(y, dy, dx, count, stream);
}
