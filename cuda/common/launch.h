// Calling the functions of a CUDA library (native.cuda_library) with tensors: their addresses, their device's stream, their error codes.
// And what makes them the operators' form for a GPU. In C++, since from Python an operator takes three times as long to start.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace launch {

using at::IntArrayRef;
using at::ScalarType;
using at::Tensor;
using Maybe = std::optional<Tensor>;

// A function of the library, by its name in an api.cuh.
template <class Signature>
struct Entry {
  const char* name;
  Signature call;
  Entry(void* library, const char* name) : name(name), call(reinterpret_cast<Signature>(dlsym(library, name))) {
    TORCH_CHECK(call, name, " is not in the library");
  }
};

// What every library has. An operator's own library derives from it, with an ENTRY for each function of its api.cuh.
struct Library {
  void* handle;  // of dlopen
  Entry<const char* (*)(int)> cuda_message{handle, "cuda_message"};
  explicit Library(int64_t handle) : handle(reinterpret_cast<void*>(handle)) {}
};
#define ENTRY(function) \
  launch::Entry<decltype(&::function)> function { handle, #function }

// The device of the operator's tensors is the current one while this lives: the library's own CUDA runtime uses that of
// the driver's current context. On the CPU (emulated kernels) there is no stream.
class OnDevice {
 public:
  OnDevice(const Library& library, const Tensor& like) : library_(library) {
    if (like.is_cpu()) return;
    guard_.reset_device(like.device());
    const c10::impl::VirtualGuardImpl device(like.device().type());
    stream_ = device.getStreamNativeHandle(device.getStream(like.device()));
  }
  // ValueError where the library does not take what it was given, RuntimeError where the GPU fails.
  template <class Signature, class... Arguments>
  void operator()(const Entry<Signature>& entry, Arguments... arguments) const {
    const int code = entry.call(arguments..., stream_);
    if (code == 0) return;
    const char* message = library_.cuda_message.call(code);
    TORCH_CHECK_VALUE(code > 0, entry.name, ": ", message, " (", code, ")");
    TORCH_CHECK(false, entry.name, ": ", message, " (", code, ")");
  }

 private:
  const Library& library_;
  c10::OptionalDeviceGuard guard_;
  void* stream_ = nullptr;
};

inline std::string python_name(ScalarType dtype) { return "torch." + std::string(c10::getDtypeNames(dtype).first); }

// Looks at the tensors that an operator was given: at(name, x, shape) is the address of x. One of them, `first` by
// name, is bfloat16 or float32; the others are on its device, and of its dtype where at is told no other. The kernels
// read in order and in pieces of 16 bytes: of a tensor that is not contiguous and aligned a copy is made, which lives
// as long as this does: until the kernels are on their stream.
class Given {
 public:
  Given(const char* op, const char* first, const Tensor& like) : op(op), first_(first), device_(like.device()), own_(like.scalar_type()) {
    TORCH_CHECK_VALUE(own_ == at::kBFloat16 || own_ == at::kFloat, op, ": ", first, " must be torch.bfloat16 or torch.float32, got ",
                      python_name(own_));
  }
  void* at(const char* name, const Tensor& x, IntArrayRef shape) { return at(name, x, shape, own_); }
  void* at(const char* name, const Tensor& x, IntArrayRef shape, ScalarType dtype) {
    check(name, x, shape, dtype);
    return readable(x);
  }
  void* at(const char* name, const Maybe& x, IntArrayRef shape) { return x ? at(name, *x, shape, own_) : nullptr; }
  void* at(const char* name, const Maybe& x, IntArrayRef shape, ScalarType dtype) { return x ? at(name, *x, shape, dtype) : nullptr; }
  // A vector of so many numbers, in any shape.
  void* vector(const char* name, const Tensor& x, int64_t count) {
    TORCH_CHECK_VALUE(x.numel() == count, op, ": ", name, " must have ", count, " elements, got ", x.sizes());
    check(name, x, x.sizes(), own_);
    return readable(x);
  }
  void* vector(const char* name, const Maybe& x, int64_t count) { return x ? vector(name, *x, count) : nullptr; }
  // A result that the caller has made: it is written to as it lies.
  void* to_write(const char* name, const Tensor& x, IntArrayRef shape, ScalarType dtype) {
    check(name, x, shape, dtype);
    TORCH_CHECK_VALUE(x.is_contiguous(), op, ": ", name, " must be contiguous, got strides ", x.strides(), "; call .contiguous() first");
    return x.data_ptr();
  }
  bool fp32() const { return own_ == at::kFloat; }

  const char* const op;

 private:
  void check(const char* name, const Tensor& x, IntArrayRef shape, ScalarType dtype) const {
    TORCH_CHECK_VALUE(x.sizes() == shape, op, ": ", name, " must have the shape ", shape, ", got ", x.sizes());
    TORCH_CHECK_VALUE(x.device() == device_, op, ": ", name, " must be on ", device_, ", where ", first_, " is, got ", x.device());
    TORCH_CHECK_VALUE(x.scalar_type() == dtype, op, ": ", name, " must be ", python_name(dtype), ", got ", python_name(x.scalar_type()));
  }
  void* readable(const Tensor& x) {
    void* place = x.data_ptr();
    if (reinterpret_cast<uintptr_t>(place) % 16 == 0 && x.is_contiguous()) return place;
    copies_.push_back(x.clone(at::MemoryFormat::Contiguous));
    return copies_.back().data_ptr();
  }

  const char* first_;
  c10::Device device_;
  ScalarType own_;
  std::vector<Tensor> copies_;
};

inline Tensor like(const Tensor& x) { return at::empty_like(x, at::MemoryFormat::Contiguous); }
inline Tensor empty(const Tensor& x, IntArrayRef shape) { return at::empty(shape, x.options()); }
inline Tensor empty_fp32(const Tensor& x, IntArrayRef shape) { return at::empty(shape, x.options().dtype(at::kFloat)); }
inline float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// While it lives torch does not warn that a form takes the place of another: emulated kernels do, on the CPU.
class Quiet : c10::WarningHandler {
  void process(const c10::Warning&) override {}
  c10::WarningUtils::WarningHandlerGuard guard_{this};
};

// A kernel over the functions of one library, as an operator's form.
template <class Library, class Result, class... Arguments>
auto over(const std::shared_ptr<const Library>& library, Result (*kernel)(const Library&, Arguments...)) {
  return [library, kernel](Arguments... arguments) -> Result { return kernel(*library, std::forward<Arguments>(arguments)...); };
}

// Defines NAME_register, which makes the kernels of a library (of dlopen) their operators' form for a dispatch key, and
// NAME_unregister, the end of what the first returned. forms(add) calls add("operator", kernel) for each; a kernel
// takes the Library, and then what its operator takes.
template <class Library, class Forms>
void define_registration(torch::Library& m, const std::string& name, Forms forms) {
  m.def((name + "_register(int library, str key) -> int").c_str(), [forms](int64_t handle, std::string key) {
    const Quiet quiet;
    const auto library = std::make_shared<const Library>(handle);
    auto made = std::make_unique<torch::Library>(torch::Library::IMPL, "rwkvlm", c10::parseDispatchKey(key), __FILE__, __LINE__);
    forms([&](const char* op, auto kernel) { made->impl(op, over(library, kernel)); });
    return reinterpret_cast<int64_t>(made.release());
  });
  m.def((name + "_unregister(int forms) -> ()").c_str(), [](int64_t forms) { delete reinterpret_cast<torch::Library*>(forms); });
}

}  // namespace launch
