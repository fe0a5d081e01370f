"""The native kernels (cuda/fused): C++ on the CPU, CUDA on a GPU. Their derivatives, in C++ for both: cuda/fused/autograd.cpp."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from rwkvlm import native

NORM_MIXES = (1, 6)  # how many mixes the kernel of norm_mix is compiled for


def why_not(dtypes: tuple[torch.dtype, ...], width: int) -> str:
    """Empty when the kernels run here on these dtypes and this last dimension (they are then built and registered), else the reason."""
    if dtypes not in ((torch.bfloat16,), (torch.float32,)):
        return f"they take bfloat16 or float32 alone, not {', '.join(sorted(map(str, dtypes)))}"
    if width % 16:
        return f"they take a multiple of 16 features, not {width}"
    built, reason = native.available("fused")
    if built:
        _register()
    return reason


def norm_mix(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    last: Tensor | None,
    mixes: list[Tensor],
    bounds: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """On a GPU only."""
    bounds = None if bounds is None else bounds.to(torch.int32)
    stream, newest, *mixed = torch.ops.rwkvlm.norm_mix(x, branch, weight, bias, eps, last, bounds, mixes)
    return stream, newest, mixed


def token_mix(x: Tensor, last: Tensor | None, mixes: list[Tensor]) -> list[Tensor]:
    return torch.ops.rwkvlm.token_mix(x, last, mixes)


def time_mix_inputs(
    w_low: Tensor, k: Tensor, a_low: Tensor, v: Tensor, v_first: Tensor | None, v_low: Tensor | None,
    w0: Tensor, k_k: Tensor, k_a: Tensor, a0: Tensor, v0: Tensor | None, head_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    out = torch.ops.rwkvlm.time_mix_inputs(w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0, head_size)
    return tuple(out) if v_first is not None else (*out, v, None)


def time_mix_output(y: Tensor, r: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, bias: Tensor, r_k: Tensor, eps: float) -> Tensor:
    return torch.ops.rwkvlm.time_mix_output(y, r, k, v, g, weight, bias, r_k, eps)


def relu_square(x: Tensor) -> Tensor:
    return torch.ops.rwkvlm.relu_square(x)


@functools.cache
def _register() -> None:
    """What fake tensors need to know."""

    def register(name: str):
        return torch.library.register_fake(f"rwkvlm::{name}", allow_override=True)

    @register("norm_mix_forward")
    def _(x, branch, weight, bias, eps, last, mixes, bounds):
        B, T, C = x.shape
        stream, moments = x.new_empty(0 if branch is None else x.shape), x.new_empty(B, T, 2, dtype=torch.float32)
        return [stream, x.new_empty(B, C), moments, *(torch.empty_like(x) for _ in mixes)]

    @register("norm_mix_backward")
    def _(dstream, dnewest, douts, stream, moments, weight, bias, last, mixes):
        B, _, C = stream.shape
        return torch.empty_like(stream), stream.new_empty(0 if last is None else B, C), stream.new_empty(len(mixes) + 2, C)

    @register("token_mix_forward")
    def _(x, last, mixes):
        return [torch.empty_like(x) for _ in mixes]

    @register("token_mix_backward")
    def _(douts, x, last, mixes):
        return torch.empty_like(x), x.new_empty(0 if last is None else x.shape[0], x.shape[2]), x.new_empty(len(mixes), x.shape[2])

    @register("time_mix_inputs_forward")
    def _(w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0, head_size):
        return [torch.empty_like(k) for _ in range(4 if v_first is None else 5)]

    @register("time_mix_inputs_backward")
    def _(dw, dk_out, da, db, dv_out, w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0, head_size, more_dv_first=None):
        return [torch.empty_like(k) for _ in range(2 if v_first is None else 5)] + [k.new_empty(5, k.shape[-1])]

    @register("time_mix_output_forward")
    def _(y, r, k, v, g, weight, bias, r_k, head_size, eps):
        return torch.empty_like(y)

    @register("time_mix_output_backward")
    def _(dout, y, r, k, v, g, weight, bias, r_k, head_size, eps):
        return [torch.empty_like(y) for _ in range(5)] + [y.new_empty(3, y.shape[-1])]

    @register("relu_square_forward")
    def _(x):
        return torch.empty_like(x)

    @register("relu_square_backward")
    def _(dy, y):
        return torch.empty_like(y)
