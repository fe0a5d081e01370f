// The CUDA kernels as the operators of op.cpp on a GPU: looks at the tensors, makes memory, starts the kernels. No maths here.
#include "../common/launch.h"
#include "api.cuh"

#include <tuple>

namespace {

using at::Tensor;
using launch::empty;
using launch::floats;
using launch::Given;
using launch::like;
using launch::Maybe;
using launch::OnDevice;

struct Library : launch::Library {
  using launch::Library::Library;
  ENTRY(wkv4_forward);
  ENTRY(wkv4_backward);
};

// What both directions read.
struct Call {
  Given given;
  int64_t B, T, C, segments;
  Wkv4Task task{};

  Call(const char* op, const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v) : given(op, "k", k) {
    TORCH_CHECK_VALUE(k.dim() == 3 && k.numel() > 0 && k.size(1) <= INT32_MAX && k.size(0) * k.size(2) <= INT32_MAX, op,
                      ": k must be [B, T, C], none of them 0, T and B C < 2^31, got ", k.sizes());
    B = k.size(0), T = k.size(1), C = k.size(2), segments = (T + WKV4_SEGMENT - 1) / WKV4_SEGMENT;
    task.B = int32_t(B), task.T = int32_t(T), task.C = int32_t(C);
    task.w = numbers("w", w, {C}), task.u = numbers("u", u, {C});
    task.k = given.at("k", k, k.sizes()), task.v = given.at("v", v, k.sizes());
  }
  float* numbers(const char* name, const Maybe& x, at::IntArrayRef shape) {
    return static_cast<float*>(given.at(name, x, shape, at::kFloat));
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Library& library, const Tensor& w, const Tensor& u, const Tensor& k, const Tensor& v,
                                           const Maybe& initial_state, bool save) {
  Call call("wkv4", w, u, k, v);
  call.task.initial = call.numbers("initial_state", initial_state, {call.B, 3, call.C});
  const Tensor y = like(k), final = empty(w, {call.B, 3, call.C}), starts = empty(w, {call.B, call.segments, 3, call.C});
  call.task.y = y.data_ptr(), call.task.final = floats(final), call.task.starts = floats(starts);
  OnDevice(library, k)(library.wkv4_forward, &call.task, call.given.fp32());
  return {y, final, save ? starts : empty(w, {0, call.segments, 3, call.C})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Library& library, const Tensor& dy, const Maybe& d_final, const Tensor& w,
                                                    const Tensor& u, const Tensor& k, const Tensor& v, const Tensor& checkpoints) {
  Call call("wkv4_backward", w, u, k, v);
  call.task.dy = call.given.at("dy", dy, k.sizes());
  call.task.d_final = call.numbers("d_final", d_final, {call.B, 3, call.C});
  call.task.starts = call.numbers("checkpoints", checkpoints, {call.B, call.segments, 3, call.C});
  const Tensor dk = like(k), dv = like(k), d_initial = empty(w, {call.B, 3, call.C});
  const Tensor d_starts = empty(w, {call.B, call.segments, 4, call.C}), sums = empty(w, {2, call.B * call.segments, call.C});
  call.task.dk = dk.data_ptr(), call.task.dv = dv.data_ptr(), call.task.d_initial = floats(d_initial);
  call.task.d_starts = floats(d_starts), call.task.sums = floats(sums);
  OnDevice(library, k)(library.wkv4_backward, &call.task, call.given.fp32());
  return {sums.sum(1), dk, dv, d_initial};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  launch::define_registration<Library>(m, "wkv4", [](const auto& add) {
    add("wkv4_forward", forward);
    add("wkv4_backward", backward);
  });
}
