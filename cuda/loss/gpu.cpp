// The CUDA kernel as the operator of rwkvlm/ops/cross_entropy/cuda.py on a GPU: looks at the tensors, starts the kernel. No maths here.
#include "../common/launch.h"
#include "api.cuh"

namespace {

using at::Tensor;

struct Library : launch::Library {
  using launch::Library::Library;
  ENTRY(loss_of_logits);
};

void of_logits(const Library& library, const Tensor& logits, const Tensor& targets, const Tensor& losses, double scale, double wrap,
               bool gradient) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.is_contiguous(), "loss_of_logits: logits must be [rows, V] and contiguous, got ",
                    logits.sizes(), " with strides ", logits.strides());
  launch::Given given("loss_of_logits", "logits", logits);
  const int64_t rows = logits.size(0), V = logits.size(1);
  auto* const to = static_cast<float*>(given.to_write("losses", losses, {rows}, at::kFloat));
  const auto* const wanted = static_cast<int64_t*>(given.at("targets", targets, {rows}, at::kLong));
  launch::OnDevice(library, logits)(library.loss_of_logits, logits.data_ptr(), wanted, to, rows, V, float(scale), float(wrap), gradient,
                                    given.fp32());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  launch::define_registration<Library>(m, "loss", [](const auto& add) { add("loss_of_logits", of_logits); });
}
