// The entry point of the CUDA kernel for cross entropy with L2Wrap, free of CUDA and torch headers.
#pragma once

#include <stdint.h>

enum { LOSS_BF16 = 0, LOSS_FP32 = 1 };
enum { LOSS_UNSUPPORTED = -1 };

extern "C" {
// logits [rows, V] bf16 or fp32, contiguous; any V. losses [rows] fp32: log(sum of exp) - logit of the target, NaN for
// a target outside [0, V). With gradient != 0 the logits become softmax * scale, minus scale at the target, plus
// wrap * max at the first arg-max.
// Arithmetic is fp32. Asynchronous on `stream`; 0, a cudaError_t or LOSS_UNSUPPORTED. The same bits on each run.
int loss_of_logits(void* logits, const int64_t* targets, float* losses, int64_t rows, int64_t V, float scale, float wrap, int gradient,
                   int dtype, void* stream);
}
