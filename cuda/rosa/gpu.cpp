// The CUDA kernels as the operators of op.cpp on a GPU: looks at the tensors, makes memory, starts the kernels. No maths here.
#include "../common/launch.h"
#include "api.cuh"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <initializer_list>
#include <tuple>

namespace {

using at::ScalarType;
using at::Tensor;
using launch::Given;
using launch::like;
using launch::Maybe;
using launch::OnDevice;
using Tensors = std::vector<Tensor>;

constexpr int64_t kMostBits = 8;
// Rows of a backward: each has memory of its own, for each symbol of one bit 36 bytes, or at most 57 where its lags are there too.
constexpr int64_t kRowsAtOnce = 2048;

struct Library : launch::Library {
  using launch::Library::Library;
  ENTRY(rosa_symbols);
  ENTRY(rosa_forward);
  ENTRY(rosa_token_rows);
  ENTRY(rosa_scratch_bytes);
  ENTRY(rosa_backward);
};

Tensor empty(const Tensor& x, at::IntArrayRef shape, ScalarType dtype) { return at::empty(shape, x.options().dtype(dtype)); }
Tensor zeros(const Tensor& x, at::IntArrayRef shape, ScalarType dtype) { return at::zeros(shape, x.options().dtype(dtype)); }

template <class T>
T* place(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// One call: q, k and v [B, T, C], G rows of symbols for each of B, behind L old ones.
struct Call {
  const OnDevice start;
  const Library& library;
  Given given;
  const Tensor& q;
  const bool self;
  int64_t B, T, C, M, G, L;

  Call(const char* op, const Library& library, const Tensor& q, const Maybe& k, const Maybe& v, int64_t bits, int64_t old)
      : start(library, q), library(library), given(op, "q", q), q(q), self(!k), M(bits), L(old) {
    TORCH_CHECK_VALUE(q.dim() == 3 && bits >= 1 && bits <= kMostBits && q.size(2) % bits == 0 && k.has_value() == v.has_value(), op,
                      ": expected q [B, T, C], bits from 1 to ", kMostBits, " that divide C, k and v or neither, got ", q.sizes(), ", ",
                      bits, " bits");
    B = q.size(0), T = q.size(1), C = q.size(2), G = C / M;
    TORCH_CHECK_VALUE(L + T < INT32_MAX && B * G < INT32_MAX, op, ": too long: ", L, " symbols and ", T, " in ", B * G, " rows");
    given.at("k", k, q.sizes()), given.at("v", v, q.sizes());
  }
  RosaSize size() const { return {B, T, C, M, L}; }
  // [B, G, length + T], behind the old ones, which lie before it.
  Tensor symbols(const char* name, const Tensor& x, const Maybe& old, int64_t length) {
    const Tensor to = empty(q, {B, G, length + T}, at::kByte);
    if (old) to.narrow(2, 0, length).copy_(*old);
    const RosaSize of{B, T, C, M, length};
    if (to.numel()) start(library.rosa_symbols, &of, given.at(name, x, q.sizes()), place<uint8_t>(to), given.fp32());
    return to;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Library& library, const Tensor& q, const Maybe& k, const Maybe& v,
                                                   const Tensor& low, const Tensor& high, int64_t bits, bool miss_low, double, bool,
                                                   const Maybe& old_k, const Maybe& old_v, const Maybe& old_runs, bool with_state) {
  Call call("rosa", library, q, k, v, bits, old_k ? old_k->size(-1) : 0);
  const auto [B, T, C, G, L] = std::tuple(call.B, call.T, call.C, call.G, call.L);
  TORCH_CHECK_VALUE(L == 0 || (old_runs && (old_v || call.self)), "rosa: expected old_k, old_v and old_runs, or none of them");
  call.given.at("old_k", old_k, {B, G, L}, at::kByte), call.given.at("old_runs", old_runs, {B, G, L}, at::kInt);
  if (!call.self) call.given.at("old_v", old_v, {B, G, L}, at::kByte);
  const void *const lows = call.given.at("low", low, {C}), *const highs = call.given.at("high", high, {C});
  const Tensor all_k = call.symbols(call.self ? "q" : "k", call.self ? q : *k, old_k, L);
  const Tensor new_q = call.self ? all_k : call.symbols("q", q, std::nullopt, L),
               all_v = call.self ? all_k : call.symbols("v", *v, old_v, L);
  const Tensor runs = zeros(q, {B, G, L + T}, at::kInt), out = like(q);
  if (L) runs.narrow(2, 0, L).copy_(*old_runs);
  const RosaForward task{.size = call.size(), .q = place<uint8_t>(new_q), .k = place<uint8_t>(all_k), .v = place<uint8_t>(all_v),
                         .runs = place<int32_t>(runs), .low = lows, .high = highs, .out = out.data_ptr(), .miss_low = miss_low};
  if (out.numel()) call.start(library.rosa_forward, &task, call.given.fp32());
  const auto nothing = [&](ScalarType dtype) { return empty(q, {B, G, 0}, dtype); };
  if (!with_state) return {out, nothing(at::kByte), nothing(at::kByte), nothing(at::kInt)};
  return {out, all_k, call.self ? nothing(at::kByte) : all_v, runs};
}

// With `flips` the gradients of q, k and v, or of q alone where k and v are it; then those of low and high.
Tensors backward(const Library& library, const Tensor& dout, const Tensor& q, const Maybe& k, const Maybe& v, const Tensor& low,
                 const Tensor& high, int64_t bits, bool miss_low, double tau, bool flips) {
  Call call("rosa_backward", library, q, k, v, bits, 0);
  const int64_t B = call.B, C = call.C;
  const Tensors inputs = call.self ? Tensors{q} : Tensors{q, *k, *v};
  RosaBackward task{.size = call.size(), .blocks = std::min(B * call.G, kRowsAtOnce), .tau = float(tau), .miss_low = miss_low};
  task.dout = call.given.at("dout", dout, q.sizes()), task.low = call.given.at("low", low, {C}),
  task.high = call.given.at("high", high, {C});
  const char* const names[] = {"q", "k", "v"};
  const uint8_t** const symbols_of[] = {&task.q, &task.k, &task.v};
  Tensors symbols, gradients;
  for (size_t i = 0; i < inputs.size(); i++) {
    task.inputs[i] = call.given.at(names[i], inputs[i], q.sizes());
    *symbols_of[i] = place<uint8_t>(symbols.emplace_back(call.symbols(names[i], inputs[i], std::nullopt, 0)));
    if (flips) task.gradients[i] = gradients.emplace_back(like(inputs[i])).data_ptr();
  }
  const Tensor sums = zeros(q, {2, B, C}, at::kDouble),
               scratch = empty(q, {task.blocks * library.rosa_scratch_bytes.call(call.T, bits, call.self)}, at::kByte);
  task.sums = place<double>(sums), task.scratch = place<char>(scratch);
  if (dout.numel()) call.start(library.rosa_backward, &task, call.given.fp32());
  for (const Tensor& x : sums.sum(1).to(low.scalar_type()).unbind(0)) gradients.push_back(x);
  return gradients;
}

std::tuple<Tensor, Tensor, Tensor> tokens(const Library& library, const Tensor& x, const Maybe& old, const Maybe& old_runs,
                                          bool with_state) {
  const auto said = [](const Tensor& x) { return c10::str(x.sizes(), " of ", launch::python_name(x.scalar_type()), " on ", x.device()); };
  TORCH_CHECK_VALUE(x.dim() == 2 && x.scalar_type() == at::kLong && x.size(1) >= 1, "rosa_tokens: expected [B, T] int64, T >= 1, got ",
                    said(x));
  const int64_t B = x.size(0), T = x.size(1), L = old ? old->size(-1) : 0;
  TORCH_CHECK_VALUE(L + T < INT32_MAX && B < INT32_MAX, "rosa_tokens: too long: ", L, " tokens and ", T, " in ", B, " rows");
  TORCH_CHECK_VALUE(old.has_value() == old_runs.has_value(), "rosa_tokens: expected old and old_runs, or neither");
  const auto fits = [&](const char* name, const Tensor& t, ScalarType dtype) {
    TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef({B, L}) && t.scalar_type() == dtype && t.device() == x.device(), "rosa: expected state.",
                      name, " [", B, ", ", L, "] of ", launch::python_name(dtype), " on ", x.device(), ", got ", said(t));
  };
  if (old) fits("k", *old, at::kLong), fits("runs", *old_runs, at::kInt);
  const Tensor k = empty(x, {B, L + T}, at::kLong), runs = zeros(x, {B, L + T}, at::kInt), y = empty(x, {B, T}, at::kLong);
  if (L) k.narrow(1, 0, L).copy_(*old), runs.narrow(1, 0, L).copy_(*old_runs);
  k.narrow(1, L, T).copy_(x);
  if (y.numel()) OnDevice(library, x)(library.rosa_token_rows, B, T, L, place<int64_t>(k), place<int32_t>(runs), place<int64_t>(y));
  if (with_state) return {y, k, runs};
  return {y, empty(x, {B, 0}, at::kLong), empty(x, {B, 0}, at::kInt)};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  launch::define_registration<Library>(m, "rosa", [](const auto& add) {
    add("rosa", forward);
    add("rosa_backward", backward);
    add("rosa_tokens", tokens);
  });
}
