"""ROSA as torch operators: schemas, what fake tensors and autograd need to know; the same for the native kernels and for the plain form."""

from __future__ import annotations

import functools

import torch
from torch.autograd.function import once_differentiable

from . import soft

FORWARD = (
    "(Tensor q, Tensor? k, Tensor? v, Tensor low, Tensor high, int bits, bool miss_low, float tau, bool soft, Tensor? old_k, Tensor? old_v,"
    " Tensor? old_runs, bool with_state) -> (Tensor out, Tensor k, Tensor v, Tensor runs)"
)
BACKWARD = (
    "(Tensor dout, Tensor q, Tensor? k, Tensor? v, Tensor low, Tensor high, int bits, bool miss_low, float tau, bool flips) -> Tensor[]"
)
TOKENS = "(Tensor x, Tensor? old, Tensor? old_runs, bool with_state) -> (Tensor y, Tensor k, Tensor runs)"


@functools.cache
def register(name: str) -> None:
    """For the operators `name`, `name`_backward and `name`_tokens, which exist."""
    torch.library.register_fake(f"rwkvlm::{name}", _fake_forward)
    torch.library.register_fake(f"rwkvlm::{name}_backward", _fake_backward)
    torch.library.register_fake(f"rwkvlm::{name}_tokens", _fake_tokens)
    torch.library.register_autograd(f"rwkvlm::{name}", once_differentiable(functools.partial(_backward, name)), setup_context=_save)


def _fake_forward(q, k, v, low, high, bits, miss_low, tau, soft, old_k, old_v, old_runs, with_state):
    (B, T, C), L = q.shape, 0 if old_k is None else old_k.shape[2]
    n = L + T if with_state else 0
    symbols = functools.partial(q.new_empty, dtype=torch.uint8)
    return (
        torch.empty_like(q),
        symbols(B, C // bits, n),
        symbols(B, C // bits, 0 if k is None else n),
        q.new_empty(B, C // bits, n, dtype=torch.int32),
    )


def _fake_backward(dout, q, k, v, low, high, bits, miss_low, tau, flips):
    inputs = ([q] if k is None else [q, k, v]) if flips else []
    return [torch.empty_like(x) for x in (*inputs, low, high)]


def _fake_tokens(x, old, old_runs, with_state):
    n = x.shape[1] + (0 if old is None else old.shape[1]) if with_state else 0
    return torch.empty_like(x), x.new_empty(x.shape[0], n), x.new_empty(x.shape[0], n, dtype=torch.int32)


def _save(ctx, inputs, output):
    q, k, v, low, high, bits, miss_low, tau, soft, *_ = inputs
    ctx.save_for_backward(q, k, v, low, high)  # nothing else: matches are found again on the way
    ctx.options = bits, miss_low, tau, soft


def _backward(name, ctx, dout, *_):
    q, k, v, low, high = ctx.saved_tensors
    bits, miss_low, tau, is_soft = ctx.options
    wanted = any(ctx.needs_input_grad[:3])
    dout = dout.contiguous()
    of_values = any(ctx.needs_input_grad[3:5])
    grads = []
    if of_values or not is_soft:
        operator = getattr(torch.ops.rwkvlm, f"{name}_backward")
        grads = operator(dout, q, k, v, low, high, bits, miss_low, tau, wanted and not is_soft)
    *of_inputs, dlow, dhigh = [*grads] if grads else (None, None)
    if wanted and is_soft:
        of_inputs = soft.gradients(dout, [q] if k is None else [q, k, v], low, high, bits, miss_low)
    return *of_inputs, *[None] * (3 - len(of_inputs)), dlow, dhigh, *[None] * 8
