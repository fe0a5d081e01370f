// Registration of the head's loss with torch, on its stable ABI. No maths here.
#define TORCH_TARGET_VERSION ((2ULL << 56) | (11ULL << 48))
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "../common/isa.h"
#include "head_ce.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Tensor weight, Tensor targets, int64_t chunk, double l2wrap, bool need_dx, bool need_dw) {
  const int64_t n = x.size(0), C = x.size(1), V = weight.size(0);
  const bool is_bf16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(is_bf16 || x.scalar_type() == ScalarType::Float, "head_ce: expected bfloat16 or float32");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.size(1) == C && targets.size(0) == n && n > 0 && chunk > 0 &&
                      (!is_bf16 || C % 2 == 0) && targets.scalar_type() == ScalarType::Long && x.is_contiguous() &&
                      weight.is_contiguous() && targets.is_contiguous(),
                  "head_ce: inputs do not fit; expected contiguous x [n, C], weight [V, C], targets [n] of int64");
  Tensor loss = torch::stable::new_empty(x, {}, ScalarType::Float);
  Tensor dx = torch::stable::new_empty(x, {need_dx ? n : 0, C});
  Tensor dw = torch::stable::new_empty(x, {need_dw ? V : 0, C});
  *static_cast<float*>(loss.data_ptr()) = float(loss::head_ce(
      {.is_bf16 = is_bf16, .n = n, .V = V, .C = C, .chunk = chunk, .l2wrap = float(l2wrap), .x = x.data_ptr(), .weight = weight.data_ptr(),
       .targets = static_cast<const int64_t*>(targets.data_ptr()), .dx = need_dx ? dx.data_ptr() : nullptr,
       .dw = need_dw ? dw.data_ptr() : nullptr}));
  return {loss, dx, dw};
}

bool supported(bool is_bf16) { return loss::head_ce_supported(is_bf16); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  m.def(
      "head_ce(Tensor x, Tensor weight, Tensor targets, int chunk, float l2wrap, bool need_dx, bool need_dw)"
      " -> (Tensor loss, Tensor dx, Tensor dw)");
  m.def("head_ce_supported(bool is_bf16) -> bool");
  m.def("head_ce_limit_isa(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CPU, m) { m.impl("head_ce", TORCH_BOX(&forward)); }

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CompositeExplicitAutograd, m) {
  m.impl("head_ce_supported", TORCH_BOX(&supported));
  m.impl("head_ce_limit_isa", TORCH_BOX(&isa::limit_level));
}
