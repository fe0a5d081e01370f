// Copies from global to shared memory that no register waits for (cp.async). A card before compute capability 8.0 has
// none: there they are plain.
#pragma once

#include "device.cuh"

namespace device {

// Shared memory is addressed by byte offsets from the beginning of the block's dynamic shared memory.
template <class T> __device__ __forceinline__ T& shared(int offset) { return *reinterpret_cast<T*>(shared_memory() + offset); }
#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(int offset) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared_memory())) + offset;
}
#endif

// 16 or 8 bytes from global to shared memory, zeros where !valid: `from` is then not read. This thread sees them after
// copy_wait, others behind a barrier. 16 go past the first-level cache.
template <int bytes = 16> __device__ __forceinline__ void copy_async(int to, const void* from, bool valid) {
    static_assert(bytes == 16 || bytes == 8, "what these instructions copy");
#if !defined(__CUDACC__)
    emulation::copy_async(shared_memory() + to, from, bytes, valid ? bytes : 0);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#pragma unroll
    for (int i = 0; i < bytes; i += 8)
        shared<uint2>(to + i) = valid ? *reinterpret_cast<const uint2*>(static_cast<const char*>(from) + i) : make_uint2(0, 0);
#else
    if constexpr (bytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 8 : 0) : "memory");
#endif
}

__device__ __forceinline__ void copy_commit() {
#if !defined(__CUDACC__)
    emulation::commit_copies();
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most `left` of this thread's committed groups are still in flight.
template <int left> __device__ __forceinline__ void copy_wait() {
#if !defined(__CUDACC__)
    emulation::finish_copies(left);
#elif !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
#endif
}

}  // namespace device
