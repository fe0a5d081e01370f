// Head and cross entropy on the CPU, for op.cpp.
#pragma once
#include <stdint.h>

namespace loss {

// Row-major arrays of bf16 or fp32.
struct Problem {
  bool is_bf16;
  int64_t n, V, C;         // tokens, vocabulary, features (even for bf16)
  int64_t chunk;           // tokens whose logits are in the cache at a time
  float l2wrap;
  const void* x;           // [n, C]
  const void* weight;      // [V, C]
  const int64_t* targets;  // [n], each in [0, V)
  void* dx;                // [n, C], null: not needed
  void* dw;                // [V, C], null: not needed
  double* nats;            // [n], each token's loss, null: not needed
  int64_t* likeliest;      // [n], the token with the largest logit, null: not needed
};

// The mean loss in nats; writes what is needed.
double head_ce(const Problem& problem);

// Whether this processor has the matrix products that head_ce calls.
bool head_ce_supported(bool is_bf16);

}  // namespace loss
