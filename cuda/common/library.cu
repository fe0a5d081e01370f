// Linked into every CUDA library: can this driver run what is in it, and what does an error code mean.
#include "device.cuh"

// 0, or the cudaError_t: a driver serves every release of its CUDA's major version and the older ones. Asking makes no
// context: each process of a run asks before it has chosen its GPU, and a context takes half a gigabyte of the one that
// happens to be current.
extern "C" int cuda_probe() {
#ifdef __CUDACC__
    int driver = 0;
    const cudaError_t error = cudaDriverGetVersion(&driver);
    return error != cudaSuccess ? error : driver / 1000 < CUDART_VERSION / 1000 ? cudaErrorInsufficientDriver : 0;
#else
    return 0;
#endif
}

extern "C" const char* cuda_message(int code) {
    if (code < 0) return "a shape or dtype that this kernel does not take";
#ifdef __CUDACC__
    return cudaGetErrorString(cudaError_t(code));
#else
    return emulation::machine.error.c_str();
#endif
}
