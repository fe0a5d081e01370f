// The PTX instructions that the chunked kernels use, each with its host body. Compiled for a card before compute
// capability 8.0, which has no mma of bf16, the kernels end in a trap: such a card runs sequential.cu.
#pragma once

#include "../common/copy.cuh"
#include "../common/pack.cuh"
#include "device.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define WKV7_OLD_CARD
#endif

namespace wkv7 {

// 2^x: error 2 ulp, and that of the argument.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef __CUDACC__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

__device__ __forceinline__ float sigmoid_fast(float x) {
#ifdef __CUDACC__
    return __fdividef(1.f, 1.f + exp2_fast(-1.4426950408889634f * x));
#else
    return sigmoid(x);
#endif
}

// log_decay_slope of device.cuh. With |w| both sigmoids come from one power, and none of them is the rest of a 1.
__device__ __forceinline__ float log_decay_slope_fast(float w) {
    const float x = fabsf(w), s = sigmoid_fast(x);
    return decay_scale * exp2_fast(-1.4426950408889634f * x) * s * s;
}

// d [16, 8] += a [16, 16] b [16, 8], bf16 in, fp32 sums. With g = lane / 4 and c = lane % 4 * 2 a lane holds
//     d: (g, c) (g, c + 1) (g + 8, c) (g + 8, c + 1)                                   [row, column]
//     a: (g, c..) (g + 8, c..) (g, c + 8..) (g + 8, c + 8..)                           pairs along k
//     b: (c.., g) (c + 8.., g)                                                         pairs along k
// so two neighbouring d tiles, packed, are an a tile; and a d tile, packed, is the b tile of its transpose.
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(WKV7_OLD_CARD)
    __trap();
#elif defined(__CUDACC__)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    emulation::mma_m16n8k16(d, a, b);
#endif
}

// Four 8 x 8 matrices of bf16 in shared memory; lane 8 i + j gives the offset of row j of matrix i, register i receives matrix i.
template <bool transposed> __device__ __forceinline__ void ldmatrix(uint32_t (&x)[4], int row) {
#if defined(WKV7_OLD_CARD)
    __trap();
#elif defined(__CUDACC__)
    if constexpr (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(shared_address(row))
                     : "memory");
#else
    emulation::ldmatrix_x4(x, shared_memory() + row, transposed);
#endif
}

// A store with a condition, but without a branch: behind one the compiler would put all that leads to x, and a loop
// would do one step after the other.
__device__ __forceinline__ void store_if(bool condition, uint32_t* to, uint32_t x) {
#ifdef __CUDACC__
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %0, 0; @p st.global.b32 [%1], %2; }" ::"r"(int(condition)), "l"(to), "r"(x) : "memory");
#else
    if (condition) *to = x;
#endif
}

// A line of global memory towards the L2 cache: a hint.
__device__ __forceinline__ void prefetch(const void* from) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#else
    (void)from;
#endif
}

}  // namespace wkv7
