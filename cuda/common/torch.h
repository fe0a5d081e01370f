// Torch as an op.cpp sees it: the stable ABI as of torch 2.11, whose headers take seconds to compile. The first header of its file.
#pragma once
#define TORCH_TARGET_VERSION ((2ULL << 56) | (11ULL << 48))
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
