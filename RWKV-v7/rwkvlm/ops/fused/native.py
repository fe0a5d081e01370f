"""The native kernels (cuda/fused), forward and backward: C++ on the CPU, CUDA (cuda.py) on a GPU; only inputs are kept for backward."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvlm import native


def why_not(dtypes: tuple[torch.dtype, ...], width: int) -> str:
    """"" when the kernels run here on inputs of these dtypes and this last dimension (they are then built and registered), else the reason."""
    if dtypes not in ((torch.bfloat16,), (torch.float32,)):
        return f"they take bfloat16 or float32 alone, not {', '.join(sorted(map(str, dtypes)))}"
    if width % 16:
        return f"they take a multiple of 16 features, not {width}"
    built, reason = native.available("fused")
    if built:
        _register()
    return reason


def token_mix(x: Tensor, last: Tensor | None, mixes: list[Tensor]) -> list[Tensor]:
    return list(_TokenMix.apply(x, last, *mixes))


def time_mix_inputs(
    w_low: Tensor, k: Tensor, a_low: Tensor, v: Tensor, v_first: Tensor | None, v_low: Tensor | None,
    w0: Tensor, k_k: Tensor, k_a: Tensor, a0: Tensor, v0: Tensor | None, head_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    out = _TimeMixInputs.apply(w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0, head_size)
    return out if v_first is not None else (*out, v, None)


def time_mix_output(
    y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float
) -> Tensor:
    return _TimeMixOutput.apply(y, r, k, v, g, weight, bias, r_k, eps)


def relu_square(x: Tensor) -> Tensor:
    return _ReluSquare.apply(x)


class _TokenMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):  # torch.compile under no_grad leaves ctx out where there are as many inputs as named parameters: four with two mixes
        x, last, *mixes = inputs
        x = x.contiguous()
        last = None if last is None else last.contiguous()
        ctx.save_for_backward(x, last, *mixes)
        return tuple(torch.ops.rwkvlm.token_mix(x, last, list(mixes)))

    @staticmethod
    @once_differentiable
    def backward(ctx, *douts):
        x, last, *mixes = ctx.saved_tensors
        dx, dlast, sums = torch.ops.rwkvlm.token_mix_backward([d.contiguous() for d in douts], x, last, mixes)
        return dx, None if last is None else dlast, *(row.view(mix.shape) for row, mix in zip(sums, mixes))


class _TimeMixInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *tensors, ctx.head_size = inputs
        tensors = [None if t is None else t.contiguous() for t in tensors]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        v_first = tensors[4]
        return *torch.ops.rwkvlm.time_mix_inputs(*tensors, ctx.head_size), *([] if v_first is None else [v_first])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors
        *grads, more = grads if len(grads) == 6 else (*grads, None)  # more: of v_first, from its other uses
        dw, dk_out, da, db, *dv_out = (torch.zeros_like(tensors[1]) if d is None else d.contiguous() for d in grads)
        more = None if more is None else more.contiguous()
        dk, da_low, *dv, sums = torch.ops.rwkvlm.time_mix_inputs_backward(dw, dk_out, da, db, *(dv_out or [None]), *tensors, ctx.head_size, more)
        *sums, dv0 = (row.view(tensors[6].shape) for row in sums)
        return dw, dk, da_low, *(dv or (None, None, None)), *sums, dv0 if dv else None, None


class _TimeMixOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *tensors, ctx.eps = inputs
        tensors = [t.contiguous() for t in tensors]
        ctx.save_for_backward(*tensors)
        return torch.ops.rwkvlm.time_mix_output(*tensors, tensors[7].shape[1], ctx.eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        tensors = ctx.saved_tensors
        *grads, sums = torch.ops.rwkvlm.time_mix_output_backward(dout.contiguous(), *tensors, tensors[7].shape[1], ctx.eps)
        return *grads, *(row.view(t.shape) for row, t in zip(sums, tensors[5:])), None


class _ReluSquare(torch.autograd.Function):
    """Keeps what it returns, which the next product keeps too, and not x, which nothing else needs."""

    @staticmethod
    def forward(ctx, x):
        y = torch.ops.rwkvlm.relu_square(x.contiguous())
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return torch.ops.rwkvlm.relu_square_backward(dy.contiguous(), *ctx.saved_tensors)


@functools.cache
def _register() -> None:
    """What fake tensors need to know."""

    def register(name: str):
        return torch.library.register_fake(f"rwkvlm::{name}", allow_override=True)

    @register("token_mix")
    def _(x, last, mixes):
        return [torch.empty_like(x) for _ in mixes]

    @register("token_mix_backward")
    def _(douts, x, last, mixes):
        return torch.empty_like(x), x.new_empty(0 if last is None else x.shape[0], x.shape[2]), x.new_empty(len(mixes), x.shape[2])

    @register("time_mix_inputs")
    def _(w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0, head_size):
        return [torch.empty_like(k) for _ in range(4 if v_first is None else 5)]

    @register("time_mix_inputs_backward")
    def _(dw, dk_out, da, db, dv_out, w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0, head_size, more_dv_first=None):
        return [torch.empty_like(k) for _ in range(2 if v_first is None else 5)] + [k.new_empty(5, k.shape[-1])]

    @register("time_mix_output")
    def _(y, r, k, v, g, weight, bias, r_k, head_size, eps):
        return torch.empty_like(y)

    @register("time_mix_output_backward")
    def _(dout, y, r, k, v, g, weight, bias, r_k, head_size, eps):
        return [torch.empty_like(y) for _ in range(5)] + [y.new_empty(3, y.shape[-1])]

    @register("relu_square")
    def _(x):
        return torch.empty_like(x)

    @register("relu_square_backward")
    def _(dy, y):
        return torch.empty_like(y)
