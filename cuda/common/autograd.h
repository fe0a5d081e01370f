// What operators with a derivative in C++ have in common.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace autograd {

using at::Tensor;
using at::TensorList;
using Maybe = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Context = torch::autograd::AutogradContext;
using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

// The operator of this name: call(...) runs its form for the tensors' device.
template <class Signature>
auto operation(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline Maybe maybe(const Tensor& x) { return x.defined() ? Maybe(x) : std::nullopt; }
inline Maybe maybe_contiguous(const Tensor& x) { return x.defined() ? Maybe(x.contiguous()) : std::nullopt; }
inline Maybe contiguous(const Maybe& x) { return x ? Maybe(x->contiguous()) : x; }
inline Tensor or_none(const Maybe& x) { return x.value_or(Tensor()); }

// What `work` makes of the gradients that a backward was given. Where those have a graph of their own, the result cannot be differentiated
// again: an error, when somebody tries, as with Python's once_differentiable.
template <class Work>
Tensors once(const Tensors& gradients, const Work& work) {
  const bool again = at::GradMode::is_enabled() &&
                     std::any_of(gradients.begin(), gradients.end(), [](const Tensor& x) { return x.defined() && x.requires_grad(); });
  Tensors made;
  {
    const at::AutoGradMode off(false);
    made = work();
  }
  if (!again) return made;
  for (Tensor& x : made)
    if (x.defined()) x = x.detach().set_requires_grad(true);
  return torch::autograd::DelayedError("trying to differentiate twice an operator that has one derivative", made.size())
      .apply(std::move(made));
}

}  // namespace autograd
