// What every CUDA kernel needs: its two homes (nvcc, host emulation), its launch, dynamic shared memory, bf16 and fp32 alike.
#pragma once

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#else
#include "../emulation/cuda_emulation.h"
#endif

#include <stdint.h>

namespace device {

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
    return emulation::on_stream(stream, [=] { return emulation::launch(grid, threads, shared_bytes, [=] { kernel(arguments...); }); });
#endif
}

// Of the GPU in use: its multiprocessors, and the bytes of shared memory that a block may have.
inline int multiprocessors() {
#ifdef __CUDACC__
    int device = 0, count = 1;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
#else
    return 4;  // few: each block of a test has a lot to do; and enough for all parts of a head of 128 channels
#endif
}
inline size_t shared_limit() {
#ifdef __CUDACC__
    int device = 0, bytes = 48 * 1024;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return size_t(bytes);
#else
    return emulation::machine.shared_limit;
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

// x / y to within two units of the last digit, 0 for y above 2^126. The exact one calls a function, around which registers spill.
__device__ __forceinline__ float quotient(float x, float y) {
#ifdef __CUDACC__
    return __fdividef(x, y);
#else
    return x / y;
#endif
}

__host__ __device__ constexpr int ceil_div(int x, int y) { return (x + y - 1) / y; }

}  // namespace device
