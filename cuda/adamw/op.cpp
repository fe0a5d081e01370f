// Registration of the optimizer's step and of gradient norms with torch, on its stable ABI. Work is cut into pieces of fixed size, so
// that results do not depend on the number of threads.
#include "../common/torch.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "../common/expect.h"
#include "../common/isa.h"
#include "../common/parallel.h"
#include "cpu.h"

namespace {

using adamw::Kernels;
using adamw::Piece;
using adamw::Rates;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

constexpr int64_t kPiece = 1 << 15;  // elements

Kernels kernels_here() {
  return OF_ISA_IN_USE(adamw::kernels);
}

bool is_bf16(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16; }

void check(bool fits) {
  expect(fits,
         "adamw: expected contiguous tensors of the same sizes: fp32 masters, moments and steps, bf16 or fp32 gradients, bf16 to round to");
}

float* floats(const Tensor& x, int64_t count) {
  check(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == count);
  return static_cast<float*>(x.data_ptr());
}

char* gradient(const Tensor& x, int64_t count) {
  check((is_bf16(x) || x.scalar_type() == ScalarType::Float) && x.is_contiguous() && x.numel() == count);
  return static_cast<char*>(x.data_ptr());
}

void step(Tensors masters, Tensors rounded, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors steps,
          std::optional<Tensor> scale, std::optional<Tensor> found_inf, double lr, double beta1, double beta2, double eps,
          double weight_decay) {
  const size_t n = masters.size();
  check(grads.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n && steps.size() == n &&
        (rounded.empty() || rounded.size() == n));
  if (found_inf && *floats(*found_inf, 1) != 0) return;
  std::vector<Rates> rates;
  struct Task {
    size_t parameter;
    Piece piece;
  };
  std::vector<Task> tasks;
  for (size_t i = 0; i < n; i++) {
    const int64_t count = masters[i].numel();
    const bool narrow = is_bf16(grads[i]);
    float *p = floats(masters[i], count), *m = floats(exp_avgs[i], count), *v = floats(exp_avg_sqs[i], count);
    char *g = gradient(grads[i], count), *to = rounded.empty() ? nullptr : gradient(rounded[i], count);
    check(!to || is_bf16(rounded[i]));
    const double t = *floats(steps[i], 1) + 1;
    rates.push_back({float(1 - lr * weight_decay), float(beta1), float(1 - beta1), float(beta2), float(1 - beta2),
                     float(lr / (1 - std::pow(beta1, t))), float(1 / std::sqrt(1 - std::pow(beta2, t))), float(eps),
                     scale ? *floats(*scale, 1) : 1});
    for (int64_t at = 0; at < count; at += kPiece)
      tasks.push_back(
          {i, {p + at, m + at, v + at, g + at * (narrow ? 2 : 4), to ? to + 2 * at : nullptr, std::min(kPiece, count - at), narrow}});
  }
  for (const Tensor& made : steps) *floats(made, 1) += 1;  // when nothing can be refused any more
  const Kernels kernels = kernels_here();
  in_parallel(int64_t(tasks.size()), [&](const auto& next) {
    for (int64_t i; next(i);) kernels.update(tasks[i].piece, rates[tasks[i].parameter]);
  });
}

Tensor norms(Tensors grads) {
  struct Part {
    size_t tensor;
    const char* at;
    int64_t count;
    double sum;
  };
  std::vector<Part> parts;
  for (size_t i = 0; i < grads.size(); i++) {
    const int64_t count = grads[i].numel(), size = is_bf16(grads[i]) ? 2 : 4;
    const char* g = gradient(grads[i], count);
    for (int64_t at = 0; at < count; at += kPiece) parts.push_back({i, g + at * size, std::min(kPiece, count - at), 0});
  }
  const Kernels kernels = kernels_here();
  in_parallel(int64_t(parts.size()), [&](const auto& next) {
    for (int64_t i; next(i);) parts[i].sum = kernels.sum_of_squares(parts[i].at, is_bf16(grads[parts[i].tensor]), parts[i].count);
  });
  std::vector<double> sums(grads.size());
  for (const Part& part : parts) sums[part.tensor] += part.sum;
  check(!grads.empty());
  Tensor result = torch::stable::new_empty(grads[0], {int64_t(grads.size())}, ScalarType::Float);
  for (size_t i = 0; i < sums.size(); i++) static_cast<float*>(result.data_ptr())[i] = float(std::sqrt(sums[i]));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  m.def(
      "adamw_(Tensor(a!)[] masters, Tensor(b!)[] rounded, Tensor[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs,"
      " Tensor(e!)[] steps, Tensor? scale, Tensor? found_inf, float lr, float beta1, float beta2, float eps, float weight_decay) -> ()");
  m.def("gradient_norms(Tensor[] grads) -> Tensor");
  m.def("adamw_limit_isa(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CPU, m) {
  m.impl("adamw_", TORCH_BOX(&step));
  m.impl("gradient_norms", TORCH_BOX(&norms));
}

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CompositeExplicitAutograd, m) { m.impl("adamw_limit_isa", TORCH_BOX(&isa::limit_level)); }
