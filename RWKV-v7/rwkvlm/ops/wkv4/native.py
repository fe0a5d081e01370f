"""The native kernels (cuda/wkv4) as a torch operator: C++ on the CPU, CUDA on a GPU; what fakes and autograd need to know."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvlm import native

CHECKPOINT = 32  # tokens from one saved state to the next; kCheckpoint of cpu.h, WKV4_SEGMENT of api.cuh


def why_not(dtype: torch.dtype, channels: int) -> str:
    """Empty when the kernel runs here on inputs of this dtype and this many channels (it is then built and registered), else the reason."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"it takes bfloat16 or float32, not {dtype}"
    if channels % 16:
        return f"it takes a multiple of 16 channels, not {channels}"
    built, reason = native.available("wkv4")
    if built:
        _register()
    return reason


def wkv4_native(w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """w [C], the logarithm of the decay, and u [C] float32, k, v [B, T, C] bfloat16 or float32, states [B, 3, C] float32 -> y, final state.

    Only where `why_not` has returned "". States every CHECKPOINT tokens are kept for backward, all else is computed again.
    """
    inputs = (w, u, k, v, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, state, _ = torch.ops.rwkvlm.wkv4_forward(*inputs, save)
    return y, state


@functools.cache
def _register() -> None:
    torch.library.register_fake("rwkvlm::wkv4_forward", _fake_forward)
    torch.library.register_fake("rwkvlm::wkv4_backward", _fake_backward)
    torch.library.register_autograd("rwkvlm::wkv4_forward", _backward, setup_context=_save)


def _fake_forward(w, u, k, v, initial_state, save):
    B, T, C = k.shape
    return torch.empty_like(k), w.new_empty(B, 3, C), w.new_empty(B if save else 0, (T + CHECKPOINT - 1) // CHECKPOINT, 3, C)


def _fake_backward(dy, d_final, w, u, k, v, checkpoints):
    B, _, C = k.shape
    return w.new_empty(2, C), torch.empty_like(k), torch.empty_like(k), w.new_empty(B, 3, C)


def _save(ctx, inputs, output):
    *tensors, initial_state, _ = inputs
    _, state, checkpoints = output
    ctx.has_initial_state = initial_state is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, checkpoints, state)


@once_differentiable
def _backward(ctx, dy, d_final, _checkpoints):
    w, u, k, v, checkpoints, state = ctx.saved_tensors
    dy = torch.zeros_like(k) if dy is None else dy.contiguous()
    if d_final is not None:
        # The kernels carry the gradients of A and B through the tokens, in the scale of their p: a part of the gradient
        # of p is in these.
        masses = d_final[:, :2]
        rest = d_final[:, 2:] - (masses * state[:, :2]).sum(1, keepdim=True)
        d_final = torch.cat([masses, rest], dim=1)
    sums, dk, dv, d_initial = torch.ops.rwkvlm.wkv4_backward(dy, d_final, w, u, k, v, checkpoints)
    return sums[0], sums[1], dk, dv, d_initial if ctx.has_initial_state else None, None
