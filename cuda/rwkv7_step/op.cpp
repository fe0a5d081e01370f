// Registration of the single-token step with torch, on its stable ABI. No maths here.
#include "../common/torch.h"

#include <string.h>

#include <tuple>
#include <vector>

#include "../common/isa.h"
#include "step.h"

namespace {

using rwkv7_step::Block;
using rwkv7_step::Matrix;
using rwkv7_step::Vectors;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const float* floats(const Tensor& x, int64_t count) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == count,
                  "rwkv7_step: expected ", count, " contiguous float32 numbers");
  return static_cast<const float*>(x.data_ptr());
}

// The matrices of a call: all of one element type.
struct Reader {
  ScalarType dtype;
  Matrix matrix(const Tensor& x, int64_t rows, int64_t columns) const {  // -1: whatever it is
    STD_TORCH_CHECK(x.scalar_type() == dtype && x.is_contiguous() && x.dim() == 2 && (rows < 0 || x.size(0) == rows) &&
                        (columns < 0 || x.size(1) == columns),
                    "rwkv7_step: expected contiguous matrices of one type that fit together");
    return {x.data_ptr(), x.size(0), x.size(1)};
  }
};

constexpr int64_t kMatrices = 14, kVectors = sizeof(Vectors) / sizeof(float*);

std::tuple<Tensor, Tensor, Tensor, Tensor> step(Tensor x, std::vector<Tensor> matrices, std::vector<Tensor> vectors, Tensor norms,
                                                Tensor head, std::vector<Tensor> att_x, std::vector<Tensor> wkv, std::vector<Tensor> ffn_x,
                                                int64_t head_size) {
  const int64_t C = x.numel(), L = int64_t(vectors.size()), N = head_size;
  STD_TORCH_CHECK(head.scalar_type() == ScalarType::BFloat16 || head.scalar_type() == ScalarType::Float,
                  "rwkv7_step: expected bfloat16 or float32 matrices");
  STD_TORCH_CHECK(N > 0 && N % 16 == 0 && N <= rwkv7_step::kMaxHead && C % N == 0, "rwkv7_step: head size ", N, " does not fit ", C,
                  " channels");
  STD_TORCH_CHECK(L > 0 && int64_t(matrices.size()) == L * kMatrices && int64_t(att_x.size()) == L && int64_t(wkv.size()) == L &&
                      int64_t(ffn_x.size()) == L,
                  "rwkv7_step: lists do not fit ", L, " blocks");
  Tensor logits = torch::stable::new_empty(x, {head.size(0)});
  Tensor next_att_x = torch::stable::new_empty(x, {L, 1, C}), next_ffn_x = torch::stable::new_empty(x, {L, 1, C});
  Tensor next_wkv = torch::stable::new_empty(x, {L, 1, C / N, N, N});
  const auto row = [](const Tensor& t, int64_t i, int64_t size) { return static_cast<float*>(t.data_ptr()) + i * size; };

  const Reader read{head.scalar_type()};
  const float* norm = floats(norms, 4 * C);
  rwkv7_step::Model model{.is_bf16 = read.dtype == ScalarType::BFloat16, .channels = C, .head_size = N, .blocks = {},
                          .ln0_weight = norm, .ln0_bias = norm + C, .ln_out_weight = norm + 2 * C, .ln_out_bias = norm + 3 * C,
                          .head = read.matrix(head, -1, C)};
  for (int64_t i = 0; i < L; i++) {
    const Tensor* m = &matrices[i * kMatrices];
    const auto square = [&](int j) { return read.matrix(m[j], C, C); };
    const auto down = [&](int j) { return read.matrix(m[j], -1, C); };
    const auto up = [&](int j, int from) { return read.matrix(m[j], C, m[from].size(0)); };
    const float* v = floats(vectors[i], kVectors * C);
    const float* rows[kVectors];
    for (int64_t j = 0; j < kVectors; j++) rows[j] = v + j * C;
    Vectors named;
    static_assert(sizeof rows == sizeof named);
    memcpy(&named, rows, sizeof named);
    model.blocks.push_back({.receptance = square(0), .key = square(1), .value = square(2),
                            .w1 = down(3), .a1 = down(4), .v1 = down(5), .g1 = down(6),
                            .w2 = up(7, 3), .a2 = up(8, 4), .v2 = up(9, 5), .g2 = up(10, 6),
                            .output = square(11), .ffn_key = down(12), .ffn_value = up(13, 12), .vectors = named,
                            .att_x = floats(att_x[i], C), .wkv = floats(wkv[i], C * N), .ffn_x = floats(ffn_x[i], C),
                            .next_att_x = row(next_att_x, i, C), .next_wkv = row(next_wkv, i, C * N), .next_ffn_x = row(next_ffn_x, i, C)});
  }
  rwkv7_step::step(model, floats(x, C), static_cast<float*>(logits.data_ptr()));
  return {logits, next_att_x, next_wkv, next_ffn_x};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  m.def(
      "rwkv7_step(Tensor x, Tensor[] matrices, Tensor[] vectors, Tensor norms, Tensor head, Tensor[] att_x, Tensor[] wkv, Tensor[] ffn_x,"
      " int head_size) -> (Tensor logits, Tensor att_x, Tensor wkv, Tensor ffn_x)");
  m.def("rwkv7_step_limit_isa(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CPU, m) { m.impl("rwkv7_step", TORCH_BOX(&step)); }

STABLE_TORCH_LIBRARY_IMPL(rwkvlm, CompositeExplicitAutograd, m) { m.impl("rwkv7_step_limit_isa", TORCH_BOX(&isa::limit_level)); }
