// Linked into every CUDA library: does this GPU run what is in it, and what does an error code mean.
#include "device.cuh"

namespace {

__global__ void nothing() {}

}  // namespace

// Runs an empty kernel on the current device and waits for it: 0, or the cudaError_t of a driver that is too old, a binary for another GPU, ...
extern "C" int cuda_probe() {
    const int error = device::launch(nothing, dim3(1), 32, 0, nullptr);
#ifdef __CUDACC__
    if (!error) return cudaDeviceSynchronize();
#endif
    return error;
}

extern "C" const char* cuda_message(int code) {
    if (code < 0) return "a shape or dtype that this kernel does not take";
#ifdef __CUDACC__
    return cudaGetErrorString(cudaError_t(code));
#else
    return emulation::machine.error.c_str();
#endif
}
