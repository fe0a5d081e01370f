"""The C++ kernel as a torch operator: what fake tensors and autograd need to know about it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvlm import native

from .arguments import sequence_bounds

CHECKPOINT = 64  # tokens from one saved state to the next; kCheckpoint of cpu.h


def why_not(dtype: torch.dtype) -> str:
    """Empty when the kernel runs here on inputs of this dtype (it is then built and registered), else the reason."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"it takes bfloat16 or float32, not {dtype}"
    built, reason = native.available("wkv7")
    if built:
        _register()
    return reason


def wkv7_native(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
    pass_on: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """r, w, k, v, a, b [B, T, H, N] bfloat16 or float32, states [.., H, N, N] float32 -> y, final state; with pass_on also r, k, v.

    Only where `why_not` has returned "".
    """
    if cu_seqlens is not None and not torch.compiler.is_compiling():
        sequence_bounds(cu_seqlens, r.shape[1])  # under torch.compile the kernel itself refuses wrong values
    inputs = (r, w, k, v, a, b, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    operator = _PassingOn.apply if pass_on else torch.ops.rwkvlm.wkv7_forward
    y, state, _, _, *passed = operator(*inputs, cu_seqlens, save)
    return y, state, *passed


def forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, initial_state: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, final state, and where `save` the two tensors that `backward` takes: for derivatives that are written out.

    Only where `why_not` has returned "".
    """
    return torch.ops.rwkvlm.wkv7_forward(r, w, k, v, a, b, initial_state, None, save)


def backward(
    dy: Tensor,
    d_final: Tensor | None,
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    removed: Tensor,
    checkpoints: Tensor,
):
    """Gradients of the six inputs and of the initial state."""
    return torch.ops.rwkvlm.wkv7_backward(dy, d_final, r, w, k, v, a, b, None, removed, checkpoints)


@functools.cache
def _register() -> None:
    torch.library.register_fake("rwkvlm::wkv7_forward", _fake_forward)
    torch.library.register_fake("rwkvlm::wkv7_backward", _fake_backward)
    torch.library.register_autograd("rwkvlm::wkv7_forward", _backward, setup_context=_save)


def _fake_forward(r, w, k, v, a, b, initial_state, cu_seqlens, save):
    B, T, H, N = r.shape
    documents = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    slots = B * ((T + CHECKPOINT - 1) // CHECKPOINT) if cu_seqlens is None else T // CHECKPOINT + documents
    state = functools.partial(r.new_empty, dtype=torch.float32)
    return torch.empty_like(r), state(documents, H, N, N), state(B if save else 0, T, H, N), state(slots if save else 0, H, N, N)


def _fake_backward(dy, d_final, r, w, k, v, a, b, cu_seqlens, removed, checkpoints, *more):
    B, _, H, N = r.shape
    documents = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return *(torch.empty_like(r) for _ in range(6)), r.new_empty(documents, H, N, N, dtype=torch.float32)


def _save(ctx, inputs, output):
    *tensors, initial_state, cu_seqlens, _ = inputs
    _, _, removed, checkpoints = output
    ctx.has_initial_state = initial_state is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, cu_seqlens, removed, checkpoints)


@once_differentiable
def _backward(ctx, dy, d_final, _removed, _checkpoints, *more):
    *tensors, cu_seqlens, removed, checkpoints = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy.contiguous()
    d_final, *more = (None if d is None else d.contiguous() for d in (d_final, *more))
    *grads, d_initial = torch.ops.rwkvlm.wkv7_backward(dy, d_final, *tensors, cu_seqlens, removed, checkpoints, *more)
    return *grads, d_initial if ctx.has_initial_state else None, None, None


class _PassingOn(torch.autograd.Function):
    """The operator with r, k and v passed on, as they came.

    The gradients of their other uses arrive with dy, and the backward kernel adds them to what it stores.
    """

    @staticmethod
    def forward(ctx, r, w, k, v, *others):
        inputs = (r, w, k, v, *others)
        output = torch.ops.rwkvlm.wkv7_forward(*inputs)
        _save(ctx, inputs, output)
        return *output, r, k, v

    backward = _backward
