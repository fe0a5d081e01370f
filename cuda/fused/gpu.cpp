// The CUDA kernels as the operators of autograd.cpp on a GPU: looks at the tensors, makes memory for the results,
// starts the kernel. No maths here.
#include "../common/launch.h"
#include "api.cuh"

#include <array>
#include <tuple>

namespace {

using at::Tensor;
using at::TensorList;
using launch::empty;
using launch::empty_fp32;
using launch::floats;
using launch::Given;
using launch::like;
using launch::Maybe;
using launch::OnDevice;
using Tensors = std::vector<Tensor>;

constexpr size_t kMostMixes = std::size(decltype(FusedNormMix::mix){});

struct Library : launch::Library {
  using launch::Library::Library;
  ENTRY(fused_parts);
  ENTRY(fused_norm_parts);
  ENTRY(fused_norm_mix);
  ENTRY(fused_norm_mix_backward);
  ENTRY(fused_token_mix);
  ENTRY(fused_token_mix_backward);
  ENTRY(fused_time_mix_inputs);
  ENTRY(fused_time_mix_inputs_backward);
  ENTRY(fused_time_mix_output);
  ENTRY(fused_time_mix_output_backward);
  ENTRY(fused_relu_square);
  ENTRY(fused_relu_square_backward);
};

std::array<int32_t, 3> sequences(const Given& given, const Tensor& x) {
  TORCH_CHECK_VALUE(x.dim() == 3 && x.numel() > 0 && x.size(0) * x.size(1) < int64_t(1) << 31, given.op,
                    ": expected [B, T, C], none of them 0 and B T < 2^31, got ", x.sizes());
  return {int32_t(x.size(0)), int32_t(x.size(1)), int32_t(x.size(2))};
}

template <class Pointer>
void mixes_of(Given& given, TensorList mixes, int32_t C, Pointer (&places)[kMostMixes]) {
  TORCH_CHECK_VALUE(mixes.size() <= kMostMixes, given.op, ": expected at most ", kMostMixes, " mixes, got ", mixes.size());
  for (size_t i = 0; i < mixes.size(); i++) places[i] = given.vector("a mix", mixes[i], C);
}

template <class Pointer>
void douts_of(Given& given, TensorList douts, const Tensor& x, size_t n, Pointer (&places)[kMostMixes]) {
  TORCH_CHECK_VALUE(douts.size() == n, given.op, ": expected a gradient for each of ", n, " mixes, got ", douts.size());
  for (size_t i = 0; i < n; i++) places[i] = given.at("a gradient", douts[i], x.sizes());
}

// Memory for a result like x for each of the places.
void add_likes(Tensors& out, const Tensor& x, void** places, size_t count) {
  for (size_t i = 0; i < count; i++) places[i] = out.emplace_back(like(x)).data_ptr();
}

// A result for each of the places.
Tensors likes(const Tensor& x, std::initializer_list<void**> places) {
  Tensors out;
  out.reserve(places.size() + 1);
  for (void** place : places) *place = out.emplace_back(like(x)).data_ptr();
  return out;
}

// stream (nothing without a branch: it is x), newest, moments, and the blends
Tensors norm_mix(const Library& library, const Tensor& x, const Maybe& branch, const Tensor& weight, const Tensor& bias, double eps,
                 const Maybe& last, TensorList mixes, const Maybe& bounds) {
  Given given("norm_mix", "x", x);
  const auto [B, T, C] = sequences(given, x);
  FusedNormMix task{.B = B, .T = T, .C = C, .n = int32_t(mixes.size()), .documents = bounds ? int32_t(bounds->numel() - 1) : 0,
                    .eps = float(eps)};
  task.x = given.at("x", x, x.sizes()), task.branch = given.at("branch", branch, x.sizes());
  task.weight = given.vector("weight", weight, C), task.bias = given.vector("bias", bias, C);
  task.last = given.at("last", last, {B, C});
  task.bounds = static_cast<int32_t*>(given.at("bounds", bounds, {task.documents + 1}, at::kInt));
  mixes_of(given, mixes, C, task.mix);
  Tensors out;
  out.reserve(3 + mixes.size());
  task.stream = out.emplace_back(branch ? like(x) : empty(x, {0})).data_ptr();
  task.newest = out.emplace_back(empty(x, {B, C})).data_ptr();
  task.moments = floats(out.emplace_back(empty_fp32(x, {B, T, 2})));
  add_likes(out, x, task.out, mixes.size());
  OnDevice(library, x)(library.fused_norm_mix, &task, given.fp32());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> norm_mix_backward(const Library& library, const Maybe& dstream, const Maybe& dnewest, TensorList douts,
                                                     const Tensor& stream, const Tensor& moments, const Tensor& weight, const Tensor& bias,
                                                     const Maybe& last, TensorList mixes) {
  Given given("norm_mix_backward", "stream", stream);
  const auto [B, T, C] = sequences(given, stream);
  const int32_t n = int32_t(mixes.size());
  FusedNormMix task{.B = B, .T = T, .C = C, .n = n};
  task.x = given.at("stream", stream, stream.sizes());
  task.moments = static_cast<float*>(given.at("moments", moments, {B, T, 2}, at::kFloat));
  task.weight = given.vector("weight", weight, C), task.bias = given.vector("bias", bias, C);
  task.last = given.at("last", last, {B, C});
  task.dstream = given.at("dstream", dstream, stream.sizes()), task.dnewest = given.at("dnewest", dnewest, {B, C});
  mixes_of(given, mixes, C, task.mix);
  douts_of(given, douts, stream, mixes.size(), task.dout);
  const OnDevice start(library, stream);
  task.blocks = int32_t(library.fused_norm_parts.call(&task, given.fp32()));
  const Tensor dx = like(stream), dlast = empty(stream, {last ? B : 0, C}), sums = empty(stream, {n + 2, C}),
               parts = empty_fp32(stream, {task.blocks, n + 2, C});
  task.dx = dx.data_ptr(), task.dlast = last ? dlast.data_ptr() : nullptr, task.sums = sums.data_ptr(), task.parts = floats(parts);
  start(library.fused_norm_mix_backward, &task, given.fp32());
  return {dx, dlast, sums};
}

FusedTokenMix token_mix_task(Given& given, const Tensor& x, const Maybe& last, TensorList mixes) {
  const auto [B, T, C] = sequences(given, x);
  FusedTokenMix task{.B = B, .T = T, .C = C, .n = int32_t(mixes.size())};
  task.x = given.at("x", x, x.sizes()), task.last = given.at("last", last, {B, C});
  mixes_of(given, mixes, C, task.mix);
  return task;
}

Tensors token_mix(const Library& library, const Tensor& x, const Maybe& last, TensorList mixes) {
  Given given("token_mix", "x", x);
  FusedTokenMix task = token_mix_task(given, x, last, mixes);
  Tensors out;
  add_likes(out, x, task.out, mixes.size());
  OnDevice(library, x)(library.fused_token_mix, &task, given.fp32());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> token_mix_backward(const Library& library, TensorList douts, const Tensor& x, const Maybe& last,
                                                      TensorList mixes) {
  Given given("token_mix_backward", "x", x);
  FusedTokenMix task = token_mix_task(given, x, last, mixes);
  douts_of(given, douts, x, mixes.size(), task.dout);
  const Tensor dx = like(x), dlast = empty(x, {last ? task.B : 0, task.C}), dmix = empty(x, {task.n, task.C});
  const Tensor parts = empty_fp32(x, {library.fused_parts.call(task.B, task.T), task.n, task.C});
  task.dx = dx.data_ptr(), task.dlast = last ? dlast.data_ptr() : nullptr, task.dmix = dmix.data_ptr(), task.parts = floats(parts);
  OnDevice(library, x)(library.fused_token_mix_backward, &task, given.fp32());
  return {dx, dlast, dmix};
}

FusedInputs inputs_task(Given& given, const Tensor& w_low, const Tensor& k, const Tensor& a_low, const Tensor& v, const Maybe& v_first,
                        const Maybe& v_low, const Tensor& w0, const Tensor& k_k, const Tensor& k_a, const Tensor& a0, const Maybe& v0,
                        int64_t head_size) {
  const auto [B, T, C] = sequences(given, k);
  const at::IntArrayRef shape = k.sizes();
  FusedInputs task{.rows = B * T, .C = C, .N = int32_t(head_size)};
  task.w_low = given.at("w_low", w_low, shape), task.k = given.at("k", k, shape), task.a_low = given.at("a_low", a_low, shape),
  task.v = given.at("v", v, shape);
  task.v_first = given.at("v_first", v_first, shape), task.v_low = given.at("v_low", v_low, shape), task.v0 = given.vector("v0", v0, C);
  task.w0 = given.vector("w0", w0, C), task.k_k = given.vector("k_k", k_k, C), task.k_a = given.vector("k_a", k_a, C),
  task.a0 = given.vector("a0", a0, C);
  return task;
}

// w, k, a, b, [v]
Tensors time_mix_inputs(const Library& library, const Tensor& w_low, const Tensor& k, const Tensor& a_low, const Tensor& v,
                        const Maybe& v_first, const Maybe& v_low, const Tensor& w0, const Tensor& k_k, const Tensor& k_a, const Tensor& a0,
                        const Maybe& v0, int64_t head_size) {
  Given given("time_mix_inputs", "k", k);
  FusedInputs task = inputs_task(given, w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0, head_size);
  Tensors out =
      v_first ? likes(k, {&task.w, &task.k_out, &task.a, &task.b, &task.v_out}) : likes(k, {&task.w, &task.k_out, &task.a, &task.b});
  OnDevice(library, k)(library.fused_time_mix_inputs, &task, given.fp32());
  return out;
}

// dk, da_low, [dv, dv_first, dv_low], sums [5, C] of w0, k_k, k_a, a0, v0
Tensors time_mix_inputs_backward(const Library& library, const Tensor& dw, const Tensor& dk_out, const Tensor& da, const Tensor& db,
                                 const Maybe& dv_out, const Tensor& w_low, const Tensor& k, const Tensor& a_low, const Tensor& v,
                                 const Maybe& v_first, const Maybe& v_low, const Tensor& w0, const Tensor& k_k, const Tensor& k_a,
                                 const Tensor& a0, const Maybe& v0, int64_t head_size, const Maybe& more_dv_first) {
  Given given("time_mix_inputs_backward", "k", k);
  FusedInputs task = inputs_task(given, w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0, head_size);
  const at::IntArrayRef shape = k.sizes();
  task.dw = given.at("dw", dw, shape), task.dk_out = given.at("dk_out", dk_out, shape), task.da = given.at("da", da, shape),
  task.db = given.at("db", db, shape);
  task.dv_out = given.at("dv_out", dv_out, shape), task.more_dv_first = given.at("more_dv_first", more_dv_first, shape);
  Tensors out = v_first ? likes(k, {&task.dk, &task.da_low, &task.dv, &task.dv_first, &task.dv_low}) : likes(k, {&task.dk, &task.da_low});
  const Tensor parts = empty_fp32(k, {library.fused_parts.call(1, task.rows), 5, task.C});
  task.sums = out.emplace_back(empty(k, {5, task.C})).data_ptr(), task.parts = floats(parts);
  OnDevice(library, k)(library.fused_time_mix_inputs_backward, &task, given.fp32());
  return out;
}

FusedOutput output_task(Given& given, const Tensor& y, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& g,
                        const Tensor& weight, const Tensor& bias, const Tensor& r_k, int64_t head_size, double eps) {
  const auto [B, T, C] = sequences(given, y);
  const at::IntArrayRef shape = y.sizes();
  FusedOutput task{.rows = B * T, .C = C, .N = int32_t(head_size), .eps = float(eps)};
  task.y = given.at("y", y, shape), task.r = given.at("r", r, shape), task.k = given.at("k", k, shape), task.v = given.at("v", v, shape);
  task.g = given.at("g", g, shape);
  task.weight = given.vector("weight", weight, C), task.bias = given.vector("bias", bias, C), task.r_k = given.vector("r_k", r_k, C);
  return task;
}

Tensor time_mix_output(const Library& library, const Tensor& y, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& g,
                       const Tensor& weight, const Tensor& bias, const Tensor& r_k, int64_t head_size, double eps) {
  Given given("time_mix_output", "y", y);
  FusedOutput task = output_task(given, y, r, k, v, g, weight, bias, r_k, head_size, eps);
  const Tensor out = like(y);
  task.out = out.data_ptr();
  OnDevice(library, y)(library.fused_time_mix_output, &task, given.fp32());
  return out;
}

// dy, dr, dk, dv, dg, sums [3, C] of weight, bias, r_k
Tensors time_mix_output_backward(const Library& library, const Tensor& dout, const Tensor& y, const Tensor& r, const Tensor& k,
                                 const Tensor& v, const Tensor& g, const Tensor& weight, const Tensor& bias, const Tensor& r_k,
                                 int64_t head_size, double eps) {
  Given given("time_mix_output_backward", "y", y);
  FusedOutput task = output_task(given, y, r, k, v, g, weight, bias, r_k, head_size, eps);
  task.dout = given.at("dout", dout, y.sizes());
  Tensors out = likes(y, {&task.dy, &task.dr, &task.dk, &task.dv, &task.dg});
  const Tensor parts = empty_fp32(y, {library.fused_parts.call(1, task.rows), 3, task.C});
  task.sums = out.emplace_back(empty(y, {3, task.C})).data_ptr(), task.parts = floats(parts);
  OnDevice(library, y)(library.fused_time_mix_output_backward, &task, given.fp32());
  return out;
}

Tensor relu_square(const Library& library, const Tensor& x) {
  Given given("relu_square", "x", x);
  const Tensor y = like(x);
  OnDevice(library, x)(library.fused_relu_square, given.at("x", x, x.sizes()), y.data_ptr(), x.numel(), given.fp32());
  return y;
}

Tensor relu_square_backward(const Library& library, const Tensor& dy, const Tensor& y) {
  Given given("relu_square_backward", "y", y);
  const Tensor dx = like(y);
  OnDevice(library, y)(library.fused_relu_square_backward, given.at("dy", dy, y.sizes()), given.at("y", y, y.sizes()), dx.data_ptr(),
                       y.numel(), given.fp32());
  return dx;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  launch::define_registration<Library>(m, "fused", [](const auto& add) {
    add("norm_mix_forward", norm_mix);
    add("norm_mix_backward", norm_mix_backward);
    add("token_mix_forward", token_mix);
    add("token_mix_backward", token_mix_backward);
    add("time_mix_inputs_forward", time_mix_inputs);
    add("time_mix_inputs_backward", time_mix_inputs_backward);
    add("time_mix_output_forward", time_mix_output);
    add("time_mix_output_backward", time_mix_output_backward);
    add("relu_square_forward", relu_square);
    add("relu_square_backward", relu_square_backward);
  });
}
