// One token through a whole RWKV-7 model.
#pragma once
#include <vector>

#include "cpu.h"

namespace rwkv7_step {

struct Block {
  Matrix receptance, key, value, w1, a1, v1, g1, w2, a2, v2, g2, output, ffn_key, ffn_value;
  Vectors vectors;
  const float *att_x, *wkv, *ffn_x;           // the state before the token: [C], [H, N, N], [C]
  float *next_att_x, *next_wkv, *next_ffn_x;  // and after it
};

struct Model {
  bool is_bf16;  // the matrices; else float
  int64_t channels, head_size;
  std::vector<Block> blocks;
  const float *ln0_weight, *ln0_bias, *ln_out_weight, *ln_out_bias;
  Matrix head;
};

// x: [C], the token's embedding. logits: [V].
void step(const Model& model, const float* x, float* logits);

}  // namespace rwkv7_step
