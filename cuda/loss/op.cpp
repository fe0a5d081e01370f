// torch.ops.rwkv_loss: registration only.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

std::tuple<at::Tensor, at::Tensor, at::Tensor> head_ce_cpu(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& targets, int64_t chunk, double l2wrap, bool need_dx, bool need_dw);
bool head_ce_supported(bool bf16);

TORCH_LIBRARY(rwkv_loss, m) {
  m.def("head_ce(Tensor x, Tensor weight, Tensor targets, int chunk, float l2wrap, bool need_dx, bool need_dw) -> (Tensor, Tensor, Tensor)");
  m.def("head_ce_supported(bool bf16) -> bool", &head_ce_supported);
}

TORCH_LIBRARY_IMPL(rwkv_loss, CPU, m) {
  m.impl("head_ce", &head_ce_cpu);
}
