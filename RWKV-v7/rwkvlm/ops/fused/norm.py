"""Add, LayerNorm and token shift as one operator of a GPU (cuda/fused/norm_mix.cu): its schema, fakes and autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

COUNTS = (1, 6)  # of mixes, that the kernel is compiled for

torch.library.define(
    "rwkvlm::norm_mix",
    "(Tensor x, Tensor? branch, Tensor weight, Tensor bias, float eps, Tensor? last, Tensor[] mixes, Tensor? bounds) -> Tensor[]",
)
torch.library.define(
    "rwkvlm::norm_mix_backward",
    "(Tensor? dstream, Tensor? dnewest, Tensor[] douts, Tensor stream, Tensor moments, Tensor weight, Tensor bias, Tensor? last, Tensor[] mixes)"
    " -> (Tensor dx, Tensor dlast, Tensor sums)",
)


@torch.library.register_fake("rwkvlm::norm_mix")
def _(x, branch, weight, bias, eps, last, mixes, bounds):
    B, T, C = x.shape
    stream, moments = x.new_empty(0 if branch is None else x.shape), x.new_empty(B, T, 2, dtype=torch.float32)
    return [stream, x.new_empty(B, C), moments, *(torch.empty_like(x) for _ in mixes)]


@torch.library.register_fake("rwkvlm::norm_mix_backward")
def _(dstream, dnewest, douts, stream, moments, weight, bias, last, mixes):
    B, _, C = stream.shape
    return torch.empty_like(stream), stream.new_empty(0 if last is None else B, C), stream.new_empty(len(mixes) + 2, C)


def norm_mix(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, last: Tensor | None, mixes: list[Tensor], bounds: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    bounds = None if bounds is None else bounds.to(torch.int32)
    stream, newest, *mixed = _NormMix.apply(x, branch, weight, bias, eps, last, bounds, *mixes)
    return stream, newest, mixed


class _NormMix(torch.autograd.Function):
    """The stream, a mean and a deviation of each token are kept for backward; what is normalised is computed again.

    The stream passes through also where nothing is added to it, so that backward adds its gradient up in the same pass.
    """

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, last, bounds, *mixes):
        x = x.contiguous()
        stream, newest, moments, *mixed = torch.ops.rwkvlm.norm_mix(x, branch, weight, bias, eps, last, list(mixes), bounds)
        stream = x if branch is None else stream
        ctx.set_materialize_grads(False)
        ctx.added = branch is not None
        ctx.save_for_backward(stream, moments, weight, bias, last, *mixes)
        return stream, newest, *mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, dstream, dnewest, *douts):
        stream, moments, weight, bias, last, *mixes = ctx.saved_tensors
        douts = [torch.zeros_like(stream) if d is None else d for d in douts]
        dx, dlast, sums = torch.ops.rwkvlm.norm_mix_backward(dstream, dnewest, douts, stream, moments, weight, bias, last, mixes)
        *dmixes, dweight, dbias = sums
        dmixes = (d.view(mix.shape) for d, mix in zip(dmixes, mixes))
        return dx, dx if ctx.added else None, dweight, dbias, None, None if last is None else dlast, None, *dmixes
