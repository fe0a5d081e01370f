// What the parts of the fake GPU have in common: work on streams.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

#define API extern "C" __attribute__((visibility("default")))

// Puts work on a stream: it runs at once, later (FAKE_GPU_LAZY), or each time that the graph is launched which the stream captures.
extern "C" void fake_gpu_submit(void* stream, const std::function<void()>& work);
