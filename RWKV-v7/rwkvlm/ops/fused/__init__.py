"""The elementwise parts of a block, one pass over memory each way, and the choice of who makes it.

    norm_mix(...) -> x, newest, blends             from the residual stream to what the projections read
    token_mix(x, last, mixes) -> blends            the last part of it: the token shift and the blends
    time_mix_inputs(...) -> w, k, a, b, v, v_first between projections and the wkv7 operator
    time_mix_output(...) -> o                      between the operator and the output projection
    relu_square(x)                                 of the channel mixing

In plain PyTorch these are some fifty passes over [B, T, C] a block, and on a CPU a third of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ..launch import on_either_device
from . import native, reference

__all__ = ["backend_for", "norm_mix", "relu_square", "time_mix_inputs", "time_mix_output", "token_mix"]


def norm_mix(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    last: Tensor | None,
    mixes: list[Tensor],
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`token_mix(LayerNorm(x + branch))`: residual addition, norm, and each token blended with the one before.

    x, branch: [B, T, C], without a branch nothing is added; weight, bias: [C], eps: of the LayerNorm; last: [B, C], the
    normalised token before x[:, 0], None for zeros; mixes: [1, 1, C] each. bounds: [documents + 1] int32 for documents
    in a row, B = 1, from 0 to T: each one's last token is padding, for which the normalised token is zeros. Returns x +
    branch, the last normalised token [B, C], and a [B, T, C] for each mix. One kernel on a GPU for as many mixes as
    RWKV-7 has; else its parts.
    """
    if len(mixes) in native.NORM_MIXES and _in_one(x, weight, bias, *mixes, *(t for t in (branch, last) if t is not None)):
        return native.norm_mix(x, branch, weight, bias, eps, last, mixes, bounds)
    return reference.norm_mix(x, branch, weight, bias, eps, last, mixes, bounds, token_mix)


def token_mix(x: Tensor, last: Tensor | None, mixes: list[Tensor]) -> list[Tensor]:
    """`x_t + (x_{t-1} - x_t) * mix` for each mix.

    x: [B, T, C]; last: [B, C], the token before x[:, 0], None for zeros; mixes: [1, 1, C] each. Returns a [B, T, C] for each.
    """
    return _form(x, *mixes, *([] if last is None else [last])).token_mix(x, last, mixes)


def time_mix_inputs(
    w_low: Tensor, k: Tensor, a_low: Tensor, v: Tensor, v_first: Tensor | None, v_low: Tensor | None,
    w0: Tensor, k_k: Tensor, k_a: Tensor, a0: Tensor, v0: Tensor | None, head_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """What the wkv7 operator reads, from the projections.

        rate = sigmoid(a0 + a_low)      kk = k * k_k, of length 1 in each head (torch.nn.functional.normalize, eps 1e-12)
        w = w0 + w_low    k (1 + (rate - 1) k_a)    a = -kk    b = kk * rate    v + (v_first - v) sigmoid(v0 + v_low)

    w_low, k, a_low, v, v_first, v_low: [B, T, C]; w0, k_k, k_a, a0, v0: [1, 1, C]. Without v_first, v stays as it is.
    Returns w, k, a, b, v, each [B, T, C], and v_first as it came, for what reads it afterwards: what these uses give is
    then added in the same backward pass. Source: RWKV-7 paper (arXiv 2503.14456), section 4.
    """
    inputs = (k, w_low, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0)
    return _form(*(t for t in inputs if t is not None)).time_mix_inputs(w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0, head_size)


def time_mix_output(y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float) -> Tensor:
    """`(GroupNorm(y) + (sum over the head of r k r_k) v) * g`, a group a head.

    y, r, k, v, g: [B, T, C]; weight, bias: [C]; r_k: [H, N]. Returns [B, T, C]. Source: RWKV-7 paper (arXiv 2503.14456), section 4.
    """
    return _form(y, r, k, v, g, weight, bias, r_k).time_mix_output(y, r, k, v, g, weight, bias, r_k, eps)


def relu_square(x: Tensor) -> Tensor:
    """`max(x, 0)^2`; x: [..., C]."""
    return _form(x).relu_square(x)


def _form(*inputs: Tensor):
    x = inputs[0]
    # native: the operators of cuda/fused, which have a form for either device
    return reference if backend_for(x.device, tuple({t.dtype for t in inputs}), x.shape[-1]) == "torch" else native


def _in_one(*inputs: Tensor) -> bool:
    """Whether norm_mix is one kernel."""
    return inputs[0].device.type == "cuda" and _form(*inputs) is native


@backend.decided_while_tracing
def backend_for(device: torch.device, dtypes: tuple[torch.dtype, ...], width: int) -> str:
    """Who computes them here: "cuda", "cpu" or "torch"; builds what is missing. UserError for a kernel asked for that cannot run."""
    return backend.choose("elementwise parts", device, on_either_device("fused", lambda: native.why_not(dtypes, width)))
