// The operators of gpu.cpp with derivatives. With pass_on their outputs are followed by r, k and v as they came, for
// what reads them afterwards: what those uses give arrives with dy, and the backward kernel adds it to what it stores.
// Otherwise autograd would add up two tensors each.
#include "../common/autograd.h"

namespace {

using autograd::BelowAutograd;
using autograd::Context;
using autograd::Maybe;
using autograd::maybe;
using autograd::once;
using autograd::operation;
using autograd::or_none;
using autograd::Tensor;
using autograd::Tensors;
using torch::autograd::Function;

using Three = std::tuple<Tensor, Tensor, Tensor>;
constexpr size_t kInitialState = 6;  // its place among the inputs

template <class... Inputs>
bool needed(const Inputs&... inputs) {
  const auto wants = [](const Maybe& x) { return x && x->defined() && x->requires_grad(); };
  return at::GradMode::is_enabled() && (wants(inputs) || ...);
}

Tensors results(const Three& made, bool pass_on, const Tensor& r, const Tensor& k, const Tensor& v) {
  Tensors out{std::get<0>(made), std::get<1>(made)};
  if (pass_on) out.insert(out.end(), {r, k, v});
  return out;
}

// What came for r, k and v, where they were passed on.
Maybe more(const Tensors& grads, size_t i) { return grads.size() > 2 ? maybe(grads[2 + i]) : std::nullopt; }

struct Wkv7 : Function<Wkv7> {
  static Tensors forward(Context* ctx, const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
                         const Maybe& initial_state, const Maybe& cu_seqlens, bool pass_on, bool save, int64_t machine) {
    static const auto run = operation<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                            const Maybe&, const Maybe&, bool, int64_t)>("rwkvlm::wkv7_cuda_forward");
    const BelowAutograd below;
    const Three made = run.call(r, w, k, v, a, b, initial_state, cu_seqlens, save, machine);
    ctx->set_materialize_grads(false);
    ctx->saved_data["machine"] = machine;
    ctx->save_for_backward({r, w, k, v, a, b, or_none(initial_state), or_none(cu_seqlens), std::get<2>(made)});
    return results(made, pass_on, r, k, v);
  }

  static Tensors backward(Context* ctx, const Tensors& grads) {
    static const auto run = operation<Tensors(const Tensor&, const Maybe&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                              const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Tensor&, bool, int64_t,
                                              const Maybe&, const Maybe&, const Maybe&)>("rwkvlm::wkv7_cuda_backward");
    return once(grads, [&] {
      const Tensors t = ctx->get_saved_variables();
      const bool wanted = t[6].defined() && ctx->needs_input_grad(kInitialState);
      const Tensor dy = grads[0].defined() ? grads[0] : at::zeros_like(t[0]);
      const BelowAutograd below;
      Tensors out = run.call(dy, maybe(grads[1]), t[0], t[1], t[2], t[3], t[4], t[5], maybe(t[6]), maybe(t[7]), t[8], wanted,
                             ctx->saved_data["machine"].toInt(), more(grads, 0), more(grads, 1), more(grads, 2));
      if (!wanted) out.back() = Tensor();
      out.resize(11);
      return out;
    });
  }
};

struct Ttt : Function<Ttt> {
  static Tensors forward(Context* ctx, const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
                         const Maybe& initial_state, const Tensor& rate, const Maybe& head, int64_t rows, int64_t segment, bool stored,
                         bool pass_on, bool save, int64_t machine) {
    static const auto run =
        operation<Three(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&,
                        const Tensor&, const Maybe&, int64_t, int64_t, bool, bool, int64_t)>("rwkvlm::wkv7_ttt_cuda_forward");
    const BelowAutograd below;
    const Three made = run.call(r, w, k, v, a, b, initial_state, rate, head, rows, segment, stored, save, machine);
    ctx->set_materialize_grads(false);
    ctx->saved_data["rows"] = rows, ctx->saved_data["segment"] = segment, ctx->saved_data["stored"] = stored,
    ctx->saved_data["machine"] = machine;
    ctx->saved_data["state"] = initial_state.has_value();
    ctx->save_for_backward({r, w, k, v, a, b, rate, or_none(head), std::get<2>(made)});
    return results(made, pass_on, r, k, v);
  }

  static Tensors backward(Context* ctx, const Tensors& grads) {
    static const auto run =
        operation<Tensors(const Tensor&, const Maybe&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor&, const Tensor&, const Maybe&, const Tensor&, int64_t, int64_t, bool, bool, int64_t, const Maybe&,
                          const Maybe&, const Maybe&)>("rwkvlm::wkv7_ttt_cuda_backward");
    return once(grads, [&] {
      const Tensors t = ctx->get_saved_variables();
      auto& settings = ctx->saved_data;
      const bool wanted = settings["state"].toBool() && ctx->needs_input_grad(kInitialState);
      const Tensor dy = grads[0].defined() ? grads[0] : at::zeros_like(t[0]);
      const BelowAutograd below;
      Tensors out = run.call(dy, maybe(grads[1]), t[0], t[1], t[2], t[3], t[4], t[5], t[6], maybe(t[7]), t[8], settings["rows"].toInt(),
                             settings["segment"].toInt(), settings["stored"].toBool(), wanted, settings["machine"].toInt(), more(grads, 0),
                             more(grads, 1), more(grads, 2));
      if (!wanted) out[6] = Tensor();
      if (!t[7].defined()) out[8] = Tensor();
      out.resize(15);
      return out;
    });
  }
};

}  // namespace

// y, the state after the last token, and with pass_on r, k and v.
TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  m.def(
      "wkv7_cuda(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? initial_state, Tensor? cu_seqlens, bool pass_on,"
      " int machine) -> Tensor[]",
      [](const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b, const Maybe& initial_state,
         const Maybe& cu_seqlens, bool pass_on, int64_t machine) {
        return Wkv7::apply(r, w, k, v, a, b, initial_state, cu_seqlens, pass_on, needed(r, w, k, v, a, b, initial_state), machine);
      });
  m.def(
      "wkv7_ttt_cuda(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? initial_state, Tensor rate, Tensor? head,"
      " int rows, int segment, bool stored, bool pass_on, int machine) -> Tensor[]",
      [](const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b, const Maybe& initial_state,
         const Tensor& rate, const Maybe& head, int64_t rows, int64_t segment, bool stored, bool pass_on, int64_t machine) {
        return Ttt::apply(r, w, k, v, a, b, initial_state, rate, head, rows, segment, stored, pass_on,
                          needed(r, w, k, v, a, b, initial_state, rate, head), machine);
      });
}
