// What torch's own operators compute on the fake GPU. Each runs as on any GPU, down to its kernels, which do nothing
// (runtime.cpp): so it makes the outputs, takes the memory and asks for what it would ask for there. Then its form for
// the CPU, over the same memory, is put on the stream.
//
// The operators of the package are not touched: their kernels are emulated, and put themselves on the stream (run.py).
// What the CPU has no form of (flash attention, say) is left undone and named on stderr; so is what ends in an error there.
#include "runtime.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <iostream>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>

namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::OperatorHandle;
using Without = c10::impl::ExcludeDispatchKeyGuard;
using Maybe = std::optional<Tensor>;
using torch::jit::Stack;

// Fake is a key between autograd and the devices, meant for libraries outside torch. `enable` puts it on for a thread;
// threads of autograd inherit it.
const DispatchKeySet HERE(DispatchKey::Fake);
const DispatchKeySet ABOVE_THE_CPU =
    HERE | c10::autograd_dispatch_keyset_with_ADInplaceOrView | DispatchKeySet({DispatchKey::AutocastCUDA, DispatchKey::AutocastCPU});

Tensor on_cpu(const Tensor& x) {
  if (!x.defined()) return x;
  if (!x.is_cuda()) {  // a number of the host: as it is now
    const Tensor now = x.detach().clone();
    now.unsafeGetTensorImpl()->set_wrapped_number(x.unsafeGetTensorImpl()->is_wrapped_number());
    return now;
  }
  return at::from_blob(x.data_ptr(), x.sizes(), x.strides(), [](void*) {}, x.options().device(at::kCPU));
}

IValue on_cpu(const IValue& value) {
  if (value.isTensor()) return on_cpu(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& x : value.toTensorVector()) list.push_back(on_cpu(x));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<Maybe> list;
    for (const Maybe& x : value.toOptionalTensorList().vec()) list.push_back(x ? Maybe(on_cpu(*x)) : std::nullopt);
    return list;
  }
  if (value.isDevice()) return c10::Device(at::kCPU);
  if (value.isGenerator()) return IValue();  // the GPU's: the CPU's own serves
  return value;
}

std::optional<c10::Device> gpu_of(const IValue& value) {
  const auto look = [](const Tensor& x) { return x.defined() && x.is_cuda() ? std::optional(x.device()) : std::nullopt; };
  if (value.isTensor()) return look(value.toTensor());
  if (value.isTensorList())
    for (const Tensor& x : value.toTensorVector())
      if (auto found = look(x)) return found;
  if (value.isOptionalTensorList())
    for (const Maybe& x : value.toOptionalTensorList().vec())
      if (auto found = x ? look(*x) : std::nullopt) return found;
  return std::nullopt;
}

// Whether the operator has kernels of its own; what only looks at memory in another way, makes it, or calls other
// operators is left as it is.
bool computes(const OperatorHandle& op) {
  static const std::set<std::string> memory_alone = {
      "aten::empty", "aten::empty_strided", "aten::set_", "aten::resize_", "aten::_local_scalar_dense", "aten::record_stream",
      "aten::is_pinned", "aten::_pin_memory", "aten::as_strided", "aten::view", "aten::_reshape_alias", "aten::unfold"};
  thread_local std::unordered_map<c10::OperatorName, bool> known;
  const auto [found, fresh] = known.try_emplace(op.operator_name(), false);
  if (!fresh) return found->second;
  const std::string& name = op.schema().name();
  bool view = false;
  for (const auto& made : op.schema().returns()) view |= made.alias_info() && !made.alias_info()->isWrite();
  const bool kernels = name == "aten::copy_" || op.hasKernelForDispatchKey(DispatchKey::CUDA);
  return found->second = name.rfind("aten::", 0) == 0 && !memory_alone.count(name) && !view && kernels;
}

// Whether the shape of what comes out, or a number for the host, depends on what is computed: then a GPU waits.
bool waits(const OperatorHandle& op, const Stack& inputs) {
  static const std::set<std::string> names = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
                                              "aten::unique_consecutive", "aten::bincount", "aten::equal", "aten::repeat_interleave"};
  if (op.schema().name() == "aten::index")
    for (const Maybe& x : inputs[1].toOptionalTensorList().vec())
      if (x && x->defined() && (x->scalar_type() == at::kBool || x->scalar_type() == at::kByte)) return true;
  return names.count(op.schema().name());
}

void run_on_cpu(const OperatorHandle& op, Stack& stack) {
  const Stack inputs = stack;
  // Its buffer is the CPU's alone; the GPU has none.
  if (op.schema().name() == "aten::log_sigmoid_backward") stack[2] = at::exp(-at::abs(stack[1].toTensor()));
  try {
    op.callBoxed(&stack);
  } catch (const c10::Error& error) {
    if (std::string(error.what()).find("expected scalar type") == std::string::npos) throw;
    stack = inputs;  // statistics of the GPU are fp32 beside half precision, the CPU wants one dtype
    for (IValue& value : stack)
      if (value.isTensor() && value.toTensor().defined() && value.toTensor().is_floating_point()) value = value.toTensor().to(at::kFloat);
    op.callBoxed(&stack);
  }
}

void store(const OperatorHandle& op, const Tensor& computed, const Tensor& output) {
  if (!computed.defined() || !output.defined() || computed.data_ptr() == output.data_ptr()) return;
  if (computed.sizes() == output.sizes())
    output.copy_(computed);
  else if (output.numel())  // none: a buffer that only the CPU has
    std::cerr << "fake GPU: " << op.operator_name() << ": " << computed.sizes() << " on the CPU, " << output.sizes() << " on a GPU\n";
}

void compute(const OperatorHandle& op, Stack stack, const Stack& outputs) {
  const Without none_of(ABOVE_THE_CPU);
  try {
    run_on_cpu(op, stack);
  } catch (const std::exception& error) {
    std::cerr << "fake GPU: not computed: " << op.operator_name() << ": " << std::string(error.what()).substr(0, 300) << "\n";
    return;
  }
  for (size_t i = 0; i < outputs.size(); i++) {
    const IValue& computed = stack[stack.size() - outputs.size() + i];
    if (computed.isTensor()) store(op, computed.toTensor(), outputs[i].toTensor());
    if (!computed.isTensorList()) continue;
    const auto from = computed.toTensorVector(), to = outputs[i].toTensorVector();
    for (size_t j = 0; j < from.size(); j++) store(op, from[j], to[j]);
  }
}

Stack last_on_cpu(const Stack& stack, size_t n) {
  const Without none_of(ABOVE_THE_CPU);
  Stack found;
  for (size_t i = stack.size() - n; i < stack.size(); i++) found.push_back(on_cpu(stack[i]));
  return found;
}

void call(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const auto& arguments = op.schema().arguments();
  const size_t n = arguments.size(), made = op.schema().returns().size(), begin = stack->size() - n;
  const Stack given(stack->begin() + begin, stack->end());
  const DispatchKeySet below = keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, DispatchKey::Fake);
  std::optional<c10::Device> gpu;
  for (const IValue& value : given) gpu = gpu ? gpu : gpu_of(value);
  for (const IValue& value : given)
    if (!gpu && value.isDevice() && value.toDevice().is_cuda()) gpu = c10::Device(at::kCUDA, c10::cuda::current_device());
  // A copy from or to the host: its parts are operators themselves.
  const bool crosses = op.schema().name() == "aten::copy_" && !(gpu_of(given[0]) && gpu_of(given[1]));
  if (!gpu || crosses || !computes(op)) return op.redispatchBoxed(below, stack);

  const auto stream = c10::cuda::getCurrentCUDAStream(gpu->index());
  Stack inputs = last_on_cpu(*stack, n);
  if (waits(op, given)) {
    stream.synchronize();
    const Without none_of(ABOVE_THE_CPU);
    op.callBoxed(&inputs);
    stack->resize(begin);
    for (const IValue& value : inputs) stack->push_back(value.isTensor() ? IValue(value.toTensor().to(*gpu)) : value);
    return;
  }
  {
    const Without here(HERE);
    op.redispatchBoxed(below, stack);
  }
  {
    const Without none_of(ABOVE_THE_CPU);
    for (size_t i = 0; i < n; i++)  // an output that was given may have been resized
      if (given[i].isTensor() && arguments[i].alias_info() && arguments[i].alias_info()->isWrite()) inputs[i] = on_cpu(given[i]);
  }
  const Stack outputs = last_on_cpu(*stack, made);
  fake_gpu_submit(stream.stream(), [=] { compute(op, inputs, outputs); });
}

}  // namespace

TORCH_LIBRARY_IMPL(_, Fake, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&call>()); }
TORCH_LIBRARY(fake_gpu, m) {
  m.def("enable() -> ()", [] { c10::impl::tls_set_dispatch_key_included(DispatchKey::Fake, true); });
}
