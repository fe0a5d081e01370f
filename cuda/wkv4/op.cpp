// Registration of the WKV4 CPU kernels with torch, on its stable ABI; their CUDA forms: gpu.cpp; fake tensors and
// autograd: rwkvlm/ops/wkv4/native.py. No maths here.
#include "../common/torch.h"

#include <algorithm>
#include <optional>
#include <tuple>

#include "../common/isa.h"
#include "cpu.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using wkv4::Kernels;
using wkv4::Task;
using Maybe = std::optional<Tensor>;

Kernels kernels_for(const Tensor& like) {
  const bool is_bf16 = like.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(is_bf16 || like.scalar_type() == ScalarType::Float, "wkv4: expected bfloat16 or float32");
  return OF_ISA_IN_USE(wkv4::kernels, is_bf16);
}

void* of_size(const Tensor& x, ScalarType type, int64_t count) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous() && x.numel() == count,
                  "wkv4: expected contiguous tensors whose dtypes and sizes fit");
  return x.data_ptr();
}

float* floats(const Tensor& x, int64_t count) { return static_cast<float*>(of_size(x, ScalarType::Float, count)); }

struct Shape {
  int64_t B, T, C, slots;

  explicit Shape(const Tensor& k) : B(k.size(0)), T(k.size(1)), C(k.size(2)), slots((T + wkv4::kCheckpoint - 1) / wkv4::kCheckpoint) {
    STD_TORCH_CHECK(k.numel() > 0 && C % 16 == 0, "wkv4: channels must be a multiple of 16, got ", C);
  }
};

// The task of strip i of B * strips: `whole` moved to its sequence and channels.
Task part_of(const Task& whole, int64_t i, int64_t strips, int64_t slots, int64_t element) {
  Task task = whole;
  const int64_t b = i / strips, tokens = b * task.T * task.C * element, state = b * 3 * task.C;
  const auto in = [&](const void*& p) { if (p) p = static_cast<const char*>(p) + tokens; };
  const auto out = [&](void*& p) { if (p) p = static_cast<char*>(p) + tokens; };
  in(task.k), in(task.v), in(task.dy), out(task.y), out(task.dk), out(task.dv);
  if (task.initial) task.initial += state;
  if (task.final) task.final += state;
  if (task.d_final) task.d_final += state;
  if (task.d_initial) task.d_initial += state;
  if (task.checkpoints) task.checkpoints += state * slots;
  if (task.dw) task.dw += 2 * b * task.C, task.du += 2 * b * task.C;
  task.begin = i % strips * wkv4::kStrip;
  task.end = std::min(task.begin + wkv4::kStrip, task.C);
  return task;
}

void run(const Task& whole, void (*kernel)(const Task&), const Shape& shape, const Tensor& k) {
  const int64_t strips = (shape.C + wkv4::kStrip - 1) / wkv4::kStrip, element = k.scalar_type() == ScalarType::Float ? 4 : 2;
  torch::stable::parallel_for(0, shape.B * strips, 1, [&](int64_t begin, int64_t end) {
    for (; begin < end; begin++) kernel(part_of(whole, begin, strips, shape.slots, element));
  });
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor w, Tensor u, Tensor k, Tensor v, Maybe initial, bool save) {
  const Shape shape(k);
  const auto [B, T, C, slots] = shape;
  Tensor y = torch::stable::empty_like(k), final = torch::stable::new_empty(w, {B, 3, C});
  Tensor checkpoints = torch::stable::new_empty(w, {save ? B : 0, slots, 3, C});
  const ScalarType type = k.scalar_type();
  const Task task{.T = T, .C = C, .w = floats(w, C), .u = floats(u, C), .k = of_size(k, type, B * T * C), .v = of_size(v, type, B * T * C),
                  .initial = initial ? floats(*initial, B * 3 * C) : nullptr, .y = y.data_ptr(), .final = floats(final, B * 3 * C),
                  .checkpoints = save ? floats(checkpoints, B * slots * 3 * C) : nullptr};
  run(task, kernels_for(k).forward, shape, k);
  return {y, final, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Maybe d_final, Tensor w, Tensor u, Tensor k, Tensor v, Tensor checkpoints) {
  const Shape shape(k);
  const auto [B, T, C, slots] = shape;
  const Kernels kernels = kernels_for(k);
  Tensor dk = torch::stable::empty_like(k), dv = torch::stable::empty_like(k), d_initial = torch::stable::new_empty(w, {B, 3, C});
  Tensor parts = torch::stable::new_empty(w, {B, 2, C}), sums = torch::stable::new_empty(w, {2, C});
  const ScalarType type = k.scalar_type();
  float* part = floats(parts, B * 2 * C);
  const Task task{.T = T, .C = C, .w = floats(w, C), .u = floats(u, C), .k = of_size(k, type, B * T * C), .v = of_size(v, type, B * T * C),
                  .checkpoints = floats(checkpoints, B * slots * 3 * C), .dy = of_size(dy, type, B * T * C),
                  .d_final = d_final ? floats(*d_final, B * 3 * C) : nullptr, .dk = dk.data_ptr(), .dv = dv.data_ptr(),
                  .dw = part, .du = part + C, .d_initial = floats(d_initial, B * 3 * C)};
  run(task, kernels.backward, shape, k);
  kernels.collect(part, B, 2 * C, floats(sums, 2 * C));
  return {sums, dk, dv, d_initial};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  m.def(
      "wkv4_forward(Tensor w, Tensor u, Tensor k, Tensor v, Tensor? initial_state, bool save)"
      " -> (Tensor y, Tensor final_state, Tensor checkpoints)");
  m.def(
      "wkv4_backward(Tensor dy, Tensor? d_final, Tensor w, Tensor u, Tensor k, Tensor v, Tensor checkpoints)"
      " -> (Tensor sums, Tensor dk, Tensor dv, Tensor d_initial)");
  m.def("wkv4_limit_isa(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CPU, m) {
  m.impl("wkv4_forward", TORCH_BOX(&forward));
  m.impl("wkv4_backward", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CompositeExplicitAutograd, m) { m.impl("wkv4_limit_isa", TORCH_BOX(&isa::limit_level)); }
