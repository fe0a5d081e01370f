// The order of the work and its threads. Every matrix product is split by rows, time mixing by heads, so that the result does not
// depend on the number of threads; what lies between takes a microsecond and runs on one.
#include "step.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "../common/isa.h"

namespace rwkv7_step {
namespace {

Kernels kernels_for(bool is_bf16) {
  return OF_ISA_IN_USE(kernels, is_bf16);
}

struct Product {  // y = matrix x
  const Matrix& matrix;
  const float* x;
  float* y;
};

// All rows of all products as one range, divided among the threads.
void multiply(const Kernels& kernels, std::initializer_list<Product> products) {
  int64_t rows = 0;
  for (const Product& product : products) rows += product.matrix.rows;
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    int64_t start = 0;  // of this product in the range
    for (const auto& [matrix, x, y] : products) {
      const int64_t first = std::max<int64_t>(begin - start, 0), last = std::min(end - start, matrix.rows);
      if (first < last) kernels.multiply(matrix, x, y + first, first, last);
      start += matrix.rows;
    }
  });
}

float sigmoid(float x) { return 1.f / (1.f + std::exp(-x)); }

}  // namespace

void step(const Model& model, const float* embedding, float* logits) {
  const Kernels kernels = kernels_for(model.is_bf16);
  const int64_t C = model.channels, N = model.head_size, H = C / N;
  std::vector<float> x(C), xr(C), xw(C), xk(C), xv(C), xa(C), xg(C), r(C), k(C), v(C), v_first(C), y(C), w1, a1, v1, g1, hidden;

  kernels.layer_norm(embedding, model.ln0_weight, model.ln0_bias, x.data(), C);
  for (const Block& block : model.blocks) {
    const Vectors& p = block.vectors;
    const bool first = &block == &model.blocks.front();
    w1.resize(block.w1.rows), a1.resize(block.a1.rows), v1.resize(block.v1.rows), g1.resize(block.g1.rows),
        hidden.resize(block.ffn_key.rows);

    kernels.layer_norm(x.data(), p.ln1_weight, p.ln1_bias, block.next_att_x, C);
    const auto blend = [&](const float* mix, std::vector<float>& to) { kernels.blend(block.next_att_x, block.att_x, mix, to.data(), C); };
    blend(p.x_r, xr), blend(p.x_w, xw), blend(p.x_k, xk), blend(p.x_v, xv), blend(p.x_a, xa), blend(p.x_g, xg);
    multiply(kernels, {{block.receptance, xr.data(), r.data()},
                       {block.key, xk.data(), k.data()},
                       {block.value, xv.data(), v.data()},
                       {block.w1, xw.data(), w1.data()},
                       {block.a1, xa.data(), a1.data()},
                       {block.v1, xv.data(), v1.data()},
                       {block.g1, xg.data(), g1.data()}});
    for (float& value : w1) value = std::tanh(value);
    for (float& value : g1) value = sigmoid(value);

    torch::stable::parallel_for(0, H, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; h++)
        kernels.head({.size = N, .first = h * N, .vectors = &p, .w2 = block.w2, .a2 = block.a2, .v2 = block.v2, .g2 = block.g2,
                      .w1 = w1.data(), .a1 = a1.data(), .v1 = first ? nullptr : v1.data(), .g1 = g1.data(),
                      .r = r.data(), .k = k.data(), .v = v.data(), .v_first = v_first.data(),
                      .state = block.wkv + h * N * N, .next = block.next_wkv + h * N * N, .out = y.data()});
    });
    multiply(kernels, {{block.output, y.data(), r.data()}});
    for (int64_t c = 0; c < C; c++) x[c] += r[c];

    kernels.layer_norm(x.data(), p.ln2_weight, p.ln2_bias, block.next_ffn_x, C);
    kernels.blend(block.next_ffn_x, block.ffn_x, p.ffn_x_k, xk.data(), C);
    multiply(kernels, {{block.ffn_key, xk.data(), hidden.data()}});
    for (float& value : hidden) value = value < 0 ? 0 : value * value;  // a NaN stays one
    multiply(kernels, {{block.ffn_value, hidden.data(), r.data()}});
    for (int64_t c = 0; c < C; c++) x[c] += r[c];
  }
  kernels.layer_norm(x.data(), model.ln_out_weight, model.ln_out_bias, y.data(), C);
  multiply(kernels, {{model.head, y.data(), logits}});
}

}  // namespace rwkv7_step
