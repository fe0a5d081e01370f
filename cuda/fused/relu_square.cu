// max(x, 0)^2 of the channel mixing, and its backward.
#include "rows.cuh"

namespace fused {
namespace {

constexpr int each = 4;  // groups of four that a thread loads before it stores any

__device__ __forceinline__ Four positive(Four x) {  // a NaN stays one
    return {x.x[0] < 0.f ? 0.f : x.x[0], x.x[1] < 0.f ? 0.f : x.x[1], x.x[2] < 0.f ? 0.f : x.x[2], x.x[3] < 0.f ? 0.f : x.x[3]};
}

// dy null: y = max(x, 0)^2, else y = 2 max(x, 0) dy.
template <class T> __launch_bounds__(threads) __global__ void relu_square(const T* x, const T* dy, T* y, int64_t count) {
    const int64_t first = (int64_t(blockIdx.x) * each * threads + threadIdx.x) * 4;
    Four in[each], slope[each];
#pragma unroll
    for (int i = 0; i < each; ++i) {
        const int64_t at = first + int64_t(i) * threads * 4;
        if (at < count) {
            in[i] = positive(load(x + at));
            slope[i] = dy ? load(dy + at) * 2.f : in[i];
        }
    }
#pragma unroll
    for (int i = 0; i < each; ++i) {
        const int64_t at = first + int64_t(i) * threads * 4;
        if (at < count) store(y + at, in[i] * slope[i]);
    }
}

template <class T> int run(const void* x, const void* dy, void* y, int64_t count, void* stream) {
    const int64_t of_block = int64_t(each) * threads * 4, blocks = (count + of_block - 1) / of_block;
    if (count < 4 || count % 4 || blocks > INT32_MAX) return FUSED_UNSUPPORTED;
    return launch(relu_square<T>, dim3(unsigned(blocks)), threads, 0, stream, static_cast<const T*>(x), static_cast<const T*>(dy), static_cast<T*>(y), count);
}

}  // namespace
}  // namespace fused

extern "C" int fused_relu_square(const void* x, void* y, int64_t count, int dtype, void* stream) {
    return dtype == FUSED_BF16 ? fused::run<fused::bf16>(x, nullptr, y, count, stream) : fused::run<float>(x, nullptr, y, count, stream);
}

extern "C" int fused_relu_square_backward(const void* dy, const void* x, void* dx, int64_t count, int dtype, void* stream) {
    return dtype == FUSED_BF16 ? fused::run<fused::bf16>(x, dy, dx, count, stream) : fused::run<float>(x, dy, dx, count, stream);
}
