// The CUDA kernels as the operators of op.cpp on a GPU: looks at the tensors, makes memory, starts the kernels. No maths here.
#include "../common/launch.h"
#include "api.cuh"

#include <algorithm>
#include <initializer_list>

namespace {

using at::ScalarType;
using at::Tensor;
using at::TensorList;
using launch::floats;
using launch::Maybe;

struct Library : launch::Library {
  using launch::Library::Library;
  ENTRY(adamw_step);
  ENTRY(adamw_norm_parts);
  ENTRY(adamw_norms);
};

std::vector<int64_t> sizes_of(TensorList tensors) {
  std::vector<int64_t> sizes;
  sizes.reserve(tensors.size());
  for (const Tensor& x : tensors) sizes.push_back(x.numel());
  return sizes;
}

bool fits(const Tensor& x, int64_t size, std::initializer_list<ScalarType> dtypes, c10::Device device) {
  return x.numel() == size && x.device() == device && x.is_contiguous() &&
         std::find(dtypes.begin(), dtypes.end(), x.scalar_type()) != dtypes.end();
}

// Whether there is one contiguous tensor of each size, all on the device.
bool fit(TensorList tensors, const std::vector<int64_t>& sizes, std::initializer_list<ScalarType> dtypes, c10::Device device) {
  bool all = tensors.size() == sizes.size();
  for (size_t i = 0; all && i < sizes.size(); i++) all = fits(tensors[i], sizes[i], dtypes, device);
  return all;
}

template <class T>
std::vector<T*> places_of(TensorList tensors) {
  std::vector<T*> places;
  places.reserve(tensors.size());
  for (const Tensor& x : tensors) places.push_back(static_cast<T*>(x.data_ptr()));
  return places;
}

std::vector<uint8_t> narrow_among(TensorList grads) {
  std::vector<uint8_t> narrow;
  narrow.reserve(grads.size());
  for (const Tensor& x : grads) narrow.push_back(x.scalar_type() == at::kBFloat16);
  return narrow;
}

void step(const Library& library, TensorList masters, TensorList rounded, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,
          TensorList steps, const Maybe& scale, const Maybe& found_inf, double lr, double beta1, double beta2, double eps,
          double weight_decay) {
  const std::vector<int64_t> sizes = sizes_of(masters), ones(masters.size(), 1);
  const auto all_fit = [&] {
    const c10::Device device = masters[0].device();
    const auto scalar = [&](const Maybe& x) { return !x || fits(*x, 1, {at::kFloat}, device); };
    return fit(masters, sizes, {at::kFloat}, device) && fit(exp_avgs, sizes, {at::kFloat}, device) &&
           fit(exp_avg_sqs, sizes, {at::kFloat}, device) && fit(steps, ones, {at::kFloat}, device) &&
           fit(grads, sizes, {at::kFloat, at::kBFloat16}, device) && scalar(scale) && scalar(found_inf) &&
           (rounded.empty() || fit(rounded, sizes, {at::kBFloat16}, device));
  };
  TORCH_CHECK_VALUE(
      !masters.empty() && all_fit(),
      "adamw: expected contiguous tensors of the same sizes on one device: fp32 masters, moments and steps, bf16 or fp32 gradients,"
      " bf16 to round to");
  const auto p = places_of<float>(masters), m = places_of<float>(exp_avgs), v = places_of<float>(exp_avg_sqs), t = places_of<float>(steps);
  const auto g = places_of<const void>(grads);
  const auto to = places_of<void>(rounded);
  const std::vector<uint8_t> narrow = narrow_among(grads);
  const Tensor rates = launch::empty(masters[0], {int64_t(sizes.size()), 4});
  AdamwStep task{.n = int64_t(sizes.size()), .sizes = sizes.data(), .masters = p.data(), .rounded = rounded.empty() ? nullptr : to.data(),
                 .grads = g.data()};
  task.narrow = narrow.data(), task.exp_avgs = m.data(), task.exp_avg_sqs = v.data(), task.steps = t.data(), task.rates = floats(rates);
  task.scale = scale ? floats(*scale) : nullptr, task.found_inf = found_inf ? floats(*found_inf) : nullptr;
  task.lr = lr, task.beta1 = beta1, task.beta2 = beta2, task.eps = eps, task.weight_decay = weight_decay;
  launch::OnDevice(library, masters[0])(library.adamw_step, &task);
}

Tensor gradient_norms(const Library& library, TensorList grads) {
  const std::vector<int64_t> sizes = sizes_of(grads);
  TORCH_CHECK_VALUE(!grads.empty() && fit(grads, sizes, {at::kFloat, at::kBFloat16}, grads[0].device()),
                    "gradient_norms: expected contiguous bf16 or fp32 gradients on one device");
  const int64_t n = int64_t(sizes.size());
  const auto places = places_of<const void>(grads);
  const std::vector<uint8_t> narrow = narrow_among(grads);
  const Tensor norms = launch::empty_fp32(grads[0], {n}),
               parts = launch::empty_fp32(grads[0], {library.adamw_norm_parts.call(n, sizes.data())});
  launch::OnDevice(library, grads[0])(library.adamw_norms, n, sizes.data(), places.data(), narrow.data(), floats(parts), floats(norms));
  return norms;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  launch::define_registration<Library>(m, "adamw", [](const auto& add) {
    add("adamw_", step);
    add("gradient_norms", gradient_norms);
  });
}
