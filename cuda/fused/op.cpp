// Registration of the elementwise parts of a block with torch, on its stable ABI. Work is cut into blocks of rows of fixed size, whose
// sums for the gradients of parameters are added up in order: the same bits for any number of threads. No maths here.
#include "../common/torch.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "../common/expect.h"
#include "../common/isa.h"
#include "cpu.h"

namespace {

using fused::Finish;
using fused::Kernels;
using fused::Prepare;
using fused::TokenMix;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Maybe = std::optional<Tensor>;

constexpr int64_t kRows = 32;          // of a block with sums
constexpr int64_t kElements = 1 << 14;  // of a block without

Kernels kernels_for(const Tensor& like) {
  const bool is_bf16 = like.scalar_type() == ScalarType::BFloat16;
  expect(is_bf16 || like.scalar_type() == ScalarType::Float, "fused: expected bfloat16 or float32");
  return OF_ISA_IN_USE(fused::kernels, is_bf16);
}

// Sizes of an operator's tensors: those like `like`, [..., C] with `rows` rows, and vectors of C numbers.
struct Shape {
  Tensor like;
  int64_t rows, C;

  explicit Shape(const Tensor& like) : like(like), rows(0), C(like.dim() ? like.size(like.dim() - 1) : 0) {
    expect(C > 0 && C % 16 == 0 && like.numel() > 0, "fused: the last dimension must be a multiple of 16, and none 0, got ", C);
    rows = like.numel() / C;
  }
  void* at(const Tensor& x, int64_t count) const {
    expect(x.scalar_type() == like.scalar_type() && x.is_contiguous() && x.numel() == count,
           "fused: expected contiguous tensors of one dtype whose sizes fit, got ", x.numel(), " elements instead of ", count,
           " or another dtype");
    return x.data_ptr();
  }
  void* whole(const Tensor& x) const {
    bool same = x.dim() == like.dim();
    for (int64_t i = 0; same && i < x.dim(); i++) same = x.size(i) == like.size(i);
    expect(same, "fused: expected tensors of one shape");
    return at(x, rows * C);
  }
  void* vector(const Tensor& x) const { return at(x, C); }
  void* maybe(const Maybe& x) const { return x ? whole(*x) : nullptr; }
};

// Calls kernel(task, begin, end) over all rows.
template <class Task>
void over_rows(const Task& task, void (*kernel)(const Task&, int64_t, int64_t), const Shape& shape) {
  const int64_t rows = std::max<int64_t>(1, kElements / shape.C), blocks = (shape.rows + rows - 1) / rows;
  torch::stable::parallel_for(0, blocks, 1,
                              [&](int64_t begin, int64_t end) { kernel(task, begin * rows, std::min(end * rows, shape.rows)); });
}

// The same with sums; returns them as [count, C].
template <class Task>
Tensor with_sums(const Task& task, void (*kernel)(const Task&, int64_t, int64_t, float*), const Shape& shape, int64_t count,
                 const Tensor& like) {
  const int64_t blocks = (shape.rows + kRows - 1) / kRows, width = count * shape.C;
  const Kernels kernels = kernels_for(like);
  const Tensor parts = torch::stable::new_empty(like, {blocks, width}, ScalarType::Float);
  float* sums = static_cast<float*>(parts.data_ptr());
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    std::fill(sums + begin * width, sums + end * width, 0.f);
    for (int64_t i = begin; i < end; i++) kernel(task, i * kRows, std::min((i + 1) * kRows, shape.rows), sums + i * width);
  });
  Tensor result = torch::stable::new_empty(like, {count, shape.C});
  kernels.collect(sums, blocks, width, width, result.data_ptr());
  return result;
}

TokenMix token_mix_task(const Shape& shape, const Tensor& x, const Maybe& last, const Tensors& mixes) {
  expect(x.dim() == 3 && mixes.size() <= fused::kMost, "token_mix: expected x [B, T, C] and at most 8 mixes");
  expect(!last || (last->dim() == 2 && last->size(0) == x.size(0)), "token_mix: expected last [B, C]");
  TokenMix task{.T = x.size(1), .C = shape.C, .n = int64_t(mixes.size()), .x = shape.whole(x),
                .last = last ? shape.at(*last, x.size(0) * shape.C) : nullptr};
  for (size_t i = 0; i < mixes.size(); i++) task.mix[i] = shape.vector(mixes[i]);
  return task;
}

Tensors token_mix(Tensor x, Maybe last, Tensors mixes) {
  const Shape shape(x);
  TokenMix task = token_mix_task(shape, x, last, mixes);
  Tensors outs;
  for (size_t i = 0; i < mixes.size(); i++) {
    outs.push_back(torch::stable::empty_like(x));
    task.out[i] = outs[i].data_ptr();
  }
  over_rows(task, kernels_for(x).token_mix, shape);
  return outs;
}

std::tuple<Tensor, Tensor, Tensor> token_mix_backward(Tensors douts, Tensor x, Maybe last, Tensors mixes) {
  const Shape shape(x);
  TokenMix task = token_mix_task(shape, x, last, mixes);
  expect(douts.size() == mixes.size(), "token_mix: a gradient for each mix");
  for (size_t i = 0; i < mixes.size(); i++) task.dout[i] = shape.whole(douts[i]);
  Tensor dx = torch::stable::empty_like(x), dlast = torch::stable::new_empty(x, {last ? x.size(0) : 0, shape.C});
  task.dx = dx.data_ptr(), task.dlast = last ? dlast.data_ptr() : nullptr;
  Tensor sums = with_sums(task, kernels_for(x).token_mix_backward, shape, task.n, x);
  return {dx, dlast, sums};
}

Prepare prepare_task(const Shape& shape, int64_t N, const Tensor& w_low, const Tensor& k, const Tensor& a_low, const Tensor& v,
                     const Maybe& v_first, const Maybe& v_low, const Tensor& w0, const Tensor& k_k, const Tensor& k_a, const Tensor& a0,
                     const Maybe& v0) {
  expect(N > 0 && N % 16 == 0 && shape.C % N == 0 && v_first.has_value() == v_low.has_value() && v_first.has_value() == v0.has_value(),
         "time_mix_inputs: heads must be a multiple of 16 wide and divide C; v_first, v_low and v0 come together");
  return {.C = shape.C, .N = N, .w_low = shape.whole(w_low), .k = shape.whole(k), .a_low = shape.whole(a_low), .v = shape.whole(v),
          .v_first = shape.maybe(v_first), .v_low = shape.maybe(v_low), .w0 = shape.vector(w0), .k_k = shape.vector(k_k),
          .k_a = shape.vector(k_a), .a0 = shape.vector(a0), .v0 = v0 ? shape.vector(*v0) : nullptr};
}

Tensors prepare(Tensor w_low, Tensor k, Tensor a_low, Tensor v, Maybe v_first, Maybe v_low, Tensor w0, Tensor k_k, Tensor k_a, Tensor a0,
                Maybe v0, int64_t N) {
  const Shape shape(k);
  Prepare task = prepare_task(shape, N, w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0);
  Tensors out;
  for (int i = 0; i < (v_first ? 5 : 4); i++) out.push_back(torch::stable::empty_like(k));
  task.w = out[0].data_ptr(), task.k_out = out[1].data_ptr(), task.a = out[2].data_ptr(), task.b = out[3].data_ptr();
  task.v_out = v_first ? out[4].data_ptr() : nullptr;
  over_rows(task, kernels_for(k).prepare, shape);
  return out;
}

// dk, da_low, [dv, dv_first, dv_low], sums [5, C] of w0, k_k, k_a, a0, v0
Tensors prepare_backward(Tensor dw, Tensor dk_out, Tensor da, Tensor db, Maybe dv_out, Tensor w_low, Tensor k, Tensor a_low, Tensor v,
                         Maybe v_first, Maybe v_low, Tensor w0, Tensor k_k, Tensor k_a, Tensor a0, Maybe v0, int64_t N,
                         Maybe more_dv_first) {
  const Shape shape(k);
  Prepare task = prepare_task(shape, N, w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0);
  expect(dv_out.has_value() == v_first.has_value(), "time_mix_inputs: a gradient for each output");
  task.dw = shape.whole(dw), task.dk_out = shape.whole(dk_out), task.da = shape.whole(da), task.db = shape.whole(db),
  task.dv_out = shape.maybe(dv_out);
  task.more_dv_first = shape.maybe(more_dv_first);
  Tensors out;
  for (int i = 0; i < (v_first ? 5 : 2); i++) out.push_back(torch::stable::empty_like(k));
  task.dk = out[0].data_ptr(), task.da_low = out[1].data_ptr();
  if (v_first) task.dv = out[2].data_ptr(), task.dv_first = out[3].data_ptr(), task.dv_low = out[4].data_ptr();
  out.push_back(with_sums(task, kernels_for(k).prepare_backward, shape, Prepare::sums, k));
  return out;
}

Finish finish_task(const Shape& shape, int64_t N, double eps, const Tensor& y, const Tensor& r, const Tensor& k, const Tensor& v,
                   const Tensor& g, const Tensor& weight, const Tensor& bias, const Tensor& r_k) {
  expect(N > 0 && N % 16 == 0 && shape.C % N == 0, "time_mix_output: heads must be a multiple of 16 wide and divide C");
  return {.C = shape.C, .N = N, .eps = float(eps), .y = shape.whole(y), .r = shape.whole(r), .k = shape.whole(k), .v = shape.whole(v),
          .g = shape.whole(g), .weight = shape.vector(weight), .bias = shape.vector(bias), .r_k = shape.vector(r_k)};
}

Tensor finish(Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor weight, Tensor bias, Tensor r_k, int64_t N, double eps) {
  const Shape shape(y);
  Finish task = finish_task(shape, N, eps, y, r, k, v, g, weight, bias, r_k);
  Tensor out = torch::stable::empty_like(y);
  task.out = out.data_ptr();
  over_rows(task, kernels_for(y).finish, shape);
  return out;
}

// dy, dr, dk, dv, dg, sums [3, C] of weight, bias, r_k
Tensors finish_backward(Tensor dout, Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor weight, Tensor bias, Tensor r_k, int64_t N,
                        double eps) {
  const Shape shape(y);
  Finish task = finish_task(shape, N, eps, y, r, k, v, g, weight, bias, r_k);
  task.dout = shape.whole(dout);
  Tensors out;
  for (int i = 0; i < 5; i++) out.push_back(torch::stable::empty_like(y));
  task.dy = out[0].data_ptr(), task.dr = out[1].data_ptr(), task.dk = out[2].data_ptr(), task.dv = out[3].data_ptr(),
  task.dg = out[4].data_ptr();
  out.push_back(with_sums(task, kernels_for(y).finish_backward, shape, Finish::sums, y));
  return out;
}

template <class Work>
void over_elements(const Tensor& x, const Work& work) {
  const int64_t size = x.scalar_type() == ScalarType::Float ? 4 : 2, blocks = (x.numel() + kElements - 1) / kElements;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    work(begin * kElements * size, std::min(end * kElements, x.numel()) - begin * kElements);
  });
}

char* bytes(const Tensor& x) { return static_cast<char*>(x.data_ptr()); }

Tensor relu_square(Tensor x) {
  const Shape shape(x);
  shape.whole(x);
  Tensor y = torch::stable::empty_like(x);
  const Kernels kernels = kernels_for(x);
  over_elements(x, [&](int64_t at, int64_t count) { kernels.relu_square(bytes(x) + at, bytes(y) + at, count); });
  return y;
}

Tensor relu_square_backward(Tensor dy, Tensor y) {
  const Shape shape(y);
  shape.whole(y), shape.whole(dy);
  Tensor dx = torch::stable::empty_like(y);
  const Kernels kernels = kernels_for(y);
  over_elements(y, [&](int64_t at, int64_t count) { kernels.relu_square_backward(bytes(dy) + at, bytes(y) + at, bytes(dx) + at, count); });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rwkvlm, m) { m.def("fused_limit_isa(int level) -> int"); }

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CPU, m) {
  m.impl("token_mix_forward", TORCH_BOX(&token_mix));
  m.impl("token_mix_backward", TORCH_BOX(&token_mix_backward));
  m.impl("time_mix_inputs_forward", TORCH_BOX(&prepare));
  m.impl("time_mix_inputs_backward", TORCH_BOX(&prepare_backward));
  m.impl("time_mix_output_forward", TORCH_BOX(&finish));
  m.impl("time_mix_output_backward", TORCH_BOX(&finish_backward));
  m.impl("relu_square_forward", TORCH_BOX(&relu_square));
  m.impl("relu_square_backward", TORCH_BOX(&relu_square_backward));
}

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CompositeExplicitAutograd, m) { m.impl("fused_limit_isa", TORCH_BOX(&isa::limit_level)); }
