// What every WKV7 kernel needs: the two homes of a kernel (nvcc, host emulation), its launch, bf16, the decay, and where a sequence lies.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#else
#include "../emulation/cuda_emulation.h"
#endif

#include "api.cuh"

namespace wkv7 {

using bf16 = __nv_bfloat16;

// Starts kernel(arguments...) on a cudaStream_t; returns 0 or the cudaError_t.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared_bytes, void* stream, Arguments... arguments) {
#ifdef __CUDACC__
    if (shared_bytes > 48 * 1024) {
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
        if (error != cudaSuccess) {
            (void)cudaGetLastError();  // leave no error behind for the next caller
            return error;
        }
    }
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return cudaGetLastError();
#else
    (void)stream;
    return emulation::launch(grid, threads, shared_bytes, [=] { kernel(arguments...); });
#endif
}

__device__ __forceinline__ char* shared_memory() {
#ifdef __CUDACC__
    extern __shared__ __align__(128) char memory[];
    return memory;
#else
    return emulation::machine.shared;
#endif
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

constexpr float decay_scale = -0.60653065971263342f;  // -exp(-1/2)

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
__device__ __forceinline__ float log_decay(float w) { return decay_scale * sigmoid(w); }
// d log(decay) / dw. 1 - sigmoid(w) is taken as sigmoid(-w): no digit is lost where the sigmoid is near 1.
__device__ __forceinline__ float log_decay_slope(float w) { return decay_scale * sigmoid(w) * sigmoid(-w); }

__host__ __device__ constexpr int ceil_div(int x, int y) { return (x + y - 1) / y; }

// Sequences cut into chunks of C tokens. Each (chunk, head) owns a slot in the workspaces. Sequence s of packed documents begins at slot
// floor(start / C) + s: slots never overlap, a few stay empty, and their number needs no look at cu_seqlens.
struct Sequences {
    int T, H, count;
    const int* bounds;  // cu_seqlens, or null: every sequence has T tokens

    __device__ int start(int s) const { return bounds ? bounds[s] : s * T; }
    __device__ int length(int s) const { return bounds ? bounds[s + 1] - bounds[s] : T; }
    template <int C> __device__ int first_slot(int s) const { return bounds ? bounds[s] / C + s : s * ceil_div(T, C); }
    template <int C> __host__ __device__ int slots() const { return bounds ? T / C + count : count * ceil_div(T, C); }
};

inline Sequences sequences_of(const Wkv7Shape& shape) {
    return {shape.T, shape.H, shape.cu_seqlens ? shape.documents : shape.B, shape.cu_seqlens};
}

inline bool valid(const Wkv7Shape& s) {
    return s.B >= 1 && s.T >= 1 && s.H >= 1 && s.H <= 65535 && (s.cu_seqlens ? s.B == 1 && s.documents >= 1 : true) &&
           int64_t(s.B) * s.T <= INT32_MAX;
}

}  // namespace wkv7
