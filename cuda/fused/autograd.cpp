// The elementwise parts of a block as operators with derivatives, whatever device they run on: for each X the operators
// X_forward and X_backward, and X over both. op.cpp has their form for the CPU (but of norm_mix, which is put together
// from others there: rwkvlm/ops/fused), gpu.cpp that for a GPU. Kept for backward are the inputs, or what replaces
// them; the rest is computed again.
#include "../common/autograd.h"

namespace {

using autograd::BelowAutograd;
using autograd::Context;
using autograd::contiguous;
using autograd::Maybe;
using autograd::maybe;
using autograd::maybe_contiguous;
using autograd::once;
using autograd::operation;
using autograd::or_none;
using autograd::Tensor;
using autograd::TensorList;
using autograd::Tensors;
using torch::autograd::Function;

// Rows of the sums of a backward, each with the shape of the parameter that it is the gradient of.
void add_rows(Tensors& out, const Tensor& sums, TensorList parameters) {
  const Tensors rows = sums.unbind(0);
  for (size_t i = 0; i < parameters.size(); i++) out.push_back(rows[i].view_as(parameters[i]));
}

// The stream, and of each token its mean and the inverse of its deviation, are kept; what is normalised is computed
// again. The stream is an output also where nothing is added to it, so that backward adds its gradient up in the same
// pass.
struct NormMix : Function<NormMix> {
  static Tensors forward(Context* ctx, const Tensor& given, const Maybe& branch, const Tensor& weight, const Tensor& bias, double eps,
                         const Maybe& last, const Maybe& bounds, TensorList mixes) {
    static const auto run =
        operation<Tensors(const Tensor&, const Maybe&, const Tensor&, const Tensor&, double, const Maybe&, TensorList, const Maybe&)>(
            "rwkvlm::norm_mix_forward");
    const BelowAutograd below;
    const Tensor x = given.contiguous();
    Tensors out = run.call(x, branch, weight, bias, eps, last, mixes, bounds);
    if (!branch) out[0] = x;
    ctx->set_materialize_grads(false);
    ctx->saved_data["added"] = branch.has_value();
    Tensors kept{out[0], out[2], weight, bias, or_none(last)};
    kept.insert(kept.end(), mixes.begin(), mixes.end());
    ctx->save_for_backward(std::move(kept));
    out.erase(out.begin() + 2);
    return out;
  }

  static Tensors backward(Context* ctx, const Tensors& grads) {
    static const auto run =
        operation<std::tuple<Tensor, Tensor, Tensor>(const Maybe&, const Maybe&, TensorList, const Tensor&, const Tensor&, const Tensor&,
                                                     const Tensor&, const Maybe&, TensorList)>("rwkvlm::norm_mix_backward");
    return once(grads, [&] {
      const Tensors saved = ctx->get_saved_variables();
      const Tensor &stream = saved[0], &weight = saved[2], &bias = saved[3], &last = saved[4];
      const Tensors mixes(saved.begin() + 5, saved.end());
      Tensors douts(grads.begin() + 2, grads.end());
      for (Tensor& dout : douts)
        if (!dout.defined()) dout = at::zeros_like(stream);
      const BelowAutograd below;
      const auto [dx, dlast, sums] = run.call(maybe(grads[0]), maybe(grads[1]), douts, stream, saved[1], weight, bias, maybe(last), mixes);
      Tensors of_parameters;
      of_parameters.reserve(mixes.size() + 2);
      Tensors parameters = mixes;
      parameters.insert(parameters.end(), {weight, bias});
      add_rows(of_parameters, sums, parameters);
      const size_t n = mixes.size();
      Tensors out{dx, ctx->saved_data["added"].toBool() ? dx : Tensor(), of_parameters[n], of_parameters[n + 1], Tensor(),
                  last.defined() ? dlast : Tensor(), Tensor()};
      out.insert(out.end(), of_parameters.begin(), of_parameters.begin() + n);
      return out;
    });
  }
};

struct TokenMix : Function<TokenMix> {
  static Tensors forward(Context* ctx, const Tensor& given, const Maybe& last_given, TensorList mixes) {
    static const auto run = operation<Tensors(const Tensor&, const Maybe&, TensorList)>("rwkvlm::token_mix_forward");
    const BelowAutograd below;
    const Tensor x = given.contiguous();
    const Maybe last = contiguous(last_given);
    Tensors kept{x, or_none(last)};
    kept.insert(kept.end(), mixes.begin(), mixes.end());
    ctx->save_for_backward(std::move(kept));
    return run.call(x, last, mixes);
  }

  static Tensors backward(Context* ctx, const Tensors& grads) {
    static const auto run =
        operation<std::tuple<Tensor, Tensor, Tensor>(TensorList, const Tensor&, const Maybe&, TensorList)>("rwkvlm::token_mix_backward");
    return once(grads, [&] {
      const Tensors saved = ctx->get_saved_variables();
      const Tensors mixes(saved.begin() + 2, saved.end());
      Tensors douts;
      for (const Tensor& dout : grads) douts.push_back(dout.contiguous());
      const BelowAutograd below;
      const auto [dx, dlast, sums] = run.call(douts, saved[0], maybe(saved[1]), mixes);
      Tensors out{dx, saved[1].defined() ? dlast : Tensor()};
      add_rows(out, sums, mixes);
      return out;
    });
  }
};

struct TimeMixInputs : Function<TimeMixInputs> {
  static Tensors forward(Context* ctx, const Tensor& w_low, const Tensor& k, const Tensor& a_low, const Tensor& v, const Maybe& v_first,
                         const Maybe& v_low, const Tensor& w0, const Tensor& k_k, const Tensor& k_a, const Tensor& a0, const Maybe& v0,
                         int64_t head_size) {
    static const auto run =
        operation<Tensors(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Tensor&,
                          const Tensor&, const Tensor&, const Tensor&, const Maybe&, int64_t)>("rwkvlm::time_mix_inputs_forward");
    const BelowAutograd below;
    const Tensors t{w_low.contiguous(), k.contiguous(), a_low.contiguous(), v.contiguous(), or_none(contiguous(v_first)),
                    or_none(contiguous(v_low)), w0.contiguous(), k_k.contiguous(), k_a.contiguous(), a0.contiguous(),
                    or_none(contiguous(v0))};
    ctx->set_materialize_grads(false);
    ctx->saved_data["head_size"] = head_size;
    ctx->save_for_backward(t);
    Tensors out = run.call(t[0], t[1], t[2], t[3], maybe(t[4]), maybe(t[5]), t[6], t[7], t[8], t[9], maybe(t[10]), head_size);
    if (v_first) out.push_back(t[4]);
    return out;
  }

  static Tensors backward(Context* ctx, const Tensors& grads) {
    static const auto run =
        operation<Tensors(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Maybe&, const Tensor&, const Tensor&,
                          const Tensor&, const Tensor&, const Maybe&, const Maybe&, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor&, const Maybe&, int64_t, const Maybe&)>("rwkvlm::time_mix_inputs_backward");
    return once(grads, [&] {
      const Tensors t = ctx->get_saved_variables();
      const bool residual = t[4].defined();
      const auto given = [&](size_t i) { return grads[i].defined() ? grads[i].contiguous() : at::zeros_like(t[1]); };
      const Tensor dw = given(0), dk = given(1), da = given(2), db = given(3);
      // more: of v_first, from its other uses
      const Maybe dv = residual ? Maybe(given(4)) : std::nullopt, more = residual ? maybe_contiguous(grads[5]) : std::nullopt;
      const BelowAutograd below;
      const Tensors made = run.call(dw, dk, da, db, dv, t[0], t[1], t[2], t[3], maybe(t[4]), maybe(t[5]), t[6], t[7], t[8], t[9],
                                    maybe(t[10]), ctx->saved_data["head_size"].toInt(), more);
      Tensors out{dw, made[0], made[1], Tensor(), Tensor(), Tensor()};
      if (residual) std::copy(made.begin() + 2, made.begin() + 5, out.begin() + 3);
      add_rows(out, made.back(), {t[6], t[7], t[8], t[9]});
      out.push_back(residual ? made.back().select(0, 4).view_as(t[10]) : Tensor());
      out.emplace_back();
      return out;
    });
  }
};

struct TimeMixOutput : Function<TimeMixOutput> {
  static Tensor forward(Context* ctx, const Tensor& y, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& g,
                        const Tensor& weight, const Tensor& bias, const Tensor& r_k, double eps) {
    static const auto run = operation<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                             const Tensor&, const Tensor&, int64_t, double)>("rwkvlm::time_mix_output_forward");
    const BelowAutograd below;
    const Tensors t{y.contiguous(), r.contiguous(), k.contiguous(), v.contiguous(), g.contiguous(), weight.contiguous(),
                    bias.contiguous(), r_k.contiguous()};
    ctx->saved_data["eps"] = eps;
    ctx->save_for_backward(t);
    return run.call(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], r_k.size(1), eps);
  }

  static Tensors backward(Context* ctx, const Tensors& grads) {
    static const auto run =
        operation<Tensors(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor&, const Tensor&, int64_t, double)>("rwkvlm::time_mix_output_backward");
    return once(grads, [&] {
      const Tensors t = ctx->get_saved_variables();
      const Tensor dout = grads[0].contiguous();
      const BelowAutograd below;
      Tensors out = run.call(dout, t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[7].size(1), ctx->saved_data["eps"].toDouble());
      const Tensor sums = out.back();
      out.pop_back();
      add_rows(out, sums, {t[5], t[6], t[7]});
      out.emplace_back();
      return out;
    });
  }
};

// Keeps what it returns, which the next product keeps too, and not x, which nothing else needs.
struct ReluSquare : Function<ReluSquare> {
  static Tensor forward(Context* ctx, const Tensor& x) {
    static const auto run = operation<Tensor(const Tensor&)>("rwkvlm::relu_square_forward");
    const BelowAutograd below;
    const Tensor y = run.call(x.contiguous());
    ctx->save_for_backward({y});
    return y;
  }

  static Tensors backward(Context* ctx, const Tensors& grads) {
    static const auto run = operation<Tensor(const Tensor&, const Tensor&)>("rwkvlm::relu_square_backward");
    return once(grads, [&]() -> Tensors {
      const Tensor y = ctx->get_saved_variables()[0], dy = grads[0].contiguous();
      const BelowAutograd below;
      return {run.call(dy, y)};
    });
  }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(rwkvlm, m) {
  m.def(
      "norm_mix_forward(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float eps, Tensor? last, Tensor[] mixes, Tensor? bounds)"
      " -> Tensor[]");
  m.def(
      "norm_mix_backward(Tensor? dstream, Tensor? dnewest, Tensor[] douts, Tensor stream, Tensor moments, Tensor weight, Tensor bias,"
      " Tensor? last, Tensor[] mixes) -> (Tensor dx, Tensor dlast, Tensor sums)");
  m.def("token_mix_forward(Tensor x, Tensor? last, Tensor[] mixes) -> Tensor[]");
  m.def("token_mix_backward(Tensor[] douts, Tensor x, Tensor? last, Tensor[] mixes) -> (Tensor dx, Tensor dlast, Tensor sums)");
  m.def(
      "time_mix_inputs_forward(Tensor w_low, Tensor k, Tensor a_low, Tensor v, Tensor? v_first, Tensor? v_low, Tensor w0, Tensor k_k,"
      " Tensor k_a, Tensor a0, Tensor? v0, int head_size) -> Tensor[]");
  m.def(
      "time_mix_inputs_backward(Tensor dw, Tensor dk_out, Tensor da, Tensor db, Tensor? dv_out, Tensor w_low, Tensor k, Tensor a_low,"
      " Tensor v, Tensor? v_first, Tensor? v_low, Tensor w0, Tensor k_k, Tensor k_a, Tensor a0, Tensor? v0, int head_size,"
      " Tensor? more_dv_first=None) -> Tensor[]");
  m.def(
      "time_mix_output_forward(Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor weight, Tensor bias, Tensor r_k, int head_size,"
      " float eps) -> Tensor");
  m.def(
      "time_mix_output_backward(Tensor dout, Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor weight, Tensor bias, Tensor r_k,"
      " int head_size, float eps) -> Tensor[]");
  m.def("relu_square_forward(Tensor x) -> Tensor");
  m.def("relu_square_backward(Tensor dy, Tensor y) -> Tensor");

  // stream, newest, and the blends
  m.def(
      "norm_mix(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float eps, Tensor? last, Tensor? bounds, Tensor[] mixes) -> Tensor[]",
      [](const Tensor& x, const Maybe& branch, const Tensor& weight, const Tensor& bias, double eps, const Maybe& last, const Maybe& bounds,
         TensorList mixes) { return NormMix::apply(x, branch, weight, bias, eps, last, bounds, mixes); });
  m.def("token_mix(Tensor x, Tensor? last, Tensor[] mixes) -> Tensor[]",
        [](const Tensor& x, const Maybe& last, TensorList mixes) { return TokenMix::apply(x, last, mixes); });
  // w, k, a, b, and with v_first: v, and v_first as it came
  m.def(
      "time_mix_inputs(Tensor w_low, Tensor k, Tensor a_low, Tensor v, Tensor? v_first, Tensor? v_low, Tensor w0, Tensor k_k, Tensor k_a,"
      " Tensor a0, Tensor? v0, int head_size) -> Tensor[]",
      [](const Tensor& w_low, const Tensor& k, const Tensor& a_low, const Tensor& v, const Maybe& v_first, const Maybe& v_low,
         const Tensor& w0, const Tensor& k_k, const Tensor& k_a, const Tensor& a0, const Maybe& v0, int64_t head_size) {
        return TimeMixInputs::apply(w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0, head_size);
      });
  m.def("time_mix_output(Tensor y, Tensor r, Tensor k, Tensor v, Tensor g, Tensor weight, Tensor bias, Tensor r_k, float eps) -> Tensor",
        [](const Tensor& y, const Tensor& r, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& weight, const Tensor& bias,
           const Tensor& r_k, double eps) { return TimeMixOutput::apply(y, r, k, v, g, weight, bias, r_k, eps); });
  m.def("relu_square(Tensor x) -> Tensor", [](const Tensor& x) { return ReluSquare::apply(x); });
}
