// Registration of the head's loss with torch, on its stable ABI. No maths here.
#include "../common/torch.h"

#include <algorithm>
#include <tuple>

#include "../common/isa.h"
#include "head_ce.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Without l2wrap and the places of the results, which the caller adds.
loss::Problem problem(const Tensor& x, const Tensor& weight, const Tensor& targets, int64_t chunk) {
  const int64_t n = x.size(0), C = x.size(1), V = weight.size(0);
  const bool is_bf16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(is_bf16 || x.scalar_type() == ScalarType::Float, "head_ce: expected bfloat16 or float32");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.size(1) == C && targets.size(0) == n && n > 0 && chunk > 0 &&
                      (!is_bf16 || C % 2 == 0) && targets.scalar_type() == ScalarType::Long && x.is_contiguous() &&
                      weight.is_contiguous() && targets.is_contiguous(),
                  "head_ce: inputs do not fit; expected contiguous x [n, C], weight [V, C], targets [n] of int64");
  const int64_t* const given = static_cast<const int64_t*>(targets.data_ptr());
  STD_TORCH_CHECK(std::all_of(given, given + n, [V](int64_t target) { return target >= 0 && target < V; }),
                  "head_ce: targets must lie in [0, ", V, ")");
  return {.is_bf16 = is_bf16, .n = n, .V = V, .C = C, .chunk = chunk, .x = x.data_ptr(), .weight = weight.data_ptr(),
          .targets = given};
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor x, Tensor weight, Tensor targets, int64_t chunk, double l2wrap, bool need_dx,
                                           bool need_dw) {
  loss::Problem p = problem(x, weight, targets, chunk);
  Tensor loss = torch::stable::new_empty(x, {}, ScalarType::Float);
  Tensor dx = torch::stable::new_empty(x, {need_dx ? p.n : 0, p.C});
  Tensor dw = torch::stable::new_empty(x, {need_dw ? p.V : 0, p.C});
  p.l2wrap = float(l2wrap);
  if (need_dx) p.dx = dx.data_ptr();
  if (need_dw) p.dw = dw.data_ptr();
  *static_cast<float*>(loss.data_ptr()) = float(loss::head_ce(p));
  return {loss, dx, dw};
}

std::tuple<Tensor, Tensor> scores(Tensor x, Tensor weight, Tensor targets, int64_t chunk) {
  loss::Problem p = problem(x, weight, targets, chunk);
  Tensor nats = torch::stable::new_empty(x, {p.n}, ScalarType::Double);
  Tensor likeliest = torch::stable::new_empty(x, {p.n}, ScalarType::Long);
  p.nats = static_cast<double*>(nats.data_ptr());
  p.likeliest = static_cast<int64_t*>(likeliest.data_ptr());
  loss::head_ce(p);
  return {nats, likeliest};
}

bool supported(bool is_bf16) { return loss::head_ce_supported(is_bf16); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  m.def(
      "head_ce(Tensor x, Tensor weight, Tensor targets, int chunk, float l2wrap, bool need_dx, bool need_dw)"
      " -> (Tensor loss, Tensor dx, Tensor dw)");
  m.def("head_scores(Tensor x, Tensor weight, Tensor targets, int chunk) -> (Tensor nats, Tensor likeliest)");
  m.def("head_ce_supported(bool is_bf16) -> bool");
  m.def("head_ce_limit_isa(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CPU, m) {
  m.impl("head_ce", TORCH_BOX(&forward));
  m.impl("head_scores", TORCH_BOX(&scores));
}

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CompositeExplicitAutograd, m) {
  m.impl("head_ce_supported", TORCH_BOX(&supported));
  m.impl("head_ce_limit_isa", TORCH_BOX(&isa::limit_level));
}
