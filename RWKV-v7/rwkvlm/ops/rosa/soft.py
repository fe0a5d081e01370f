"""A soft ROSA in plain PyTorch, whose gradient stands in for the exact flips where `grad="soft"` asks for it."""

from __future__ import annotations

import torch
from torch import Tensor

SHARPNESS = 4.0  # of the choice between matches, by symbol of soft length
NO_MATCH = 0.5  # the soft length that a match must exceed to count more than a miss
AT_ONCE = 1 << 24  # numbers of a [rows, T, T]


def soft_rosa(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, bits: int, miss_low: bool) -> Tensor:
    """Bits as probabilities, (1 + tanh x) / 2; everything else follows.

        m_ij = product over bits of P(q_i and k_j have the same bit)        s_ij = m_ij (1 + s_{i-1,j-1}), the length of a match
        out_i = sum over j < i of softmax(SHARPNESS s_ij + a tenth for the latest) value(v_{j+1}), against a miss of length NO_MATCH

    q, k, v: [R, T, bits] with R rows; low, high: [R, 1, bits]. Returns [R, T, bits].
    """
    R, T, _ = q.shape
    q, k, v = torch.tanh(q), torch.tanh(k), torch.tanh(v)
    value = low + (high - low) * (1 + v) / 2
    nothing = low if miss_low else torch.zeros_like(low)
    match = ((1 + q.unsqueeze(2) * k.unsqueeze(1)) / 2).prod(-1)  # [R, i, j]
    length, outs = q.new_zeros(R, T), []
    for i in range(T):
        length = match[:, i] * (1 + torch.nn.functional.pad(length, (1, -1)))  # j - 1 before
        recency = 0.1 * torch.arange(i, device=q.device) / T
        score = torch.cat([length.new_full((R, 1), NO_MATCH), length[:, :i] + recency], 1)
        weight = torch.softmax(SHARPNESS * score, 1).unsqueeze(1)
        outs.append(weight @ torch.cat([nothing, value[:, 1 : i + 1]], 1))
    return torch.cat(outs, 1)


def _recorded():
    """Lets autograd see what is computed inside an operator, where torch has put it out of the way."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradOther", "AutogradCPU", "AutogradCUDA", "AutogradMPS", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


@torch.library.custom_op("rwkvlm::rosa_soft_gradients", mutates_args=())
def gradients(dout: Tensor, inputs: list[Tensor], low: Tensor, high: Tensor, bits: int, miss_low: bool) -> list[Tensor]:
    """The gradients of q, k, v, or of x alone (then of all its three parts), in their dtype; a few rows at a time."""
    B, T, C = dout.shape

    def rows(x: Tensor) -> Tensor:
        return x.detach().float().unflatten(2, (-1, bits)).transpose(1, 2).flatten(0, 1)

    slopes, rowed = rows(dout), [rows(x) for x in inputs]
    ends = [rows(t.view(1, 1, C).expand(B, 1, C)) for t in (low, high)]
    sums = [torch.zeros_like(x) for x in rowed]
    several = max(1, AT_ONCE // (T * T))
    for begin in range(0, len(slopes), several):
        here = slice(begin, begin + several)
        with _recorded(), torch.enable_grad():
            parts = [x[here].requires_grad_() for x in rowed]
            out = soft_rosa(*(parts * 3)[:3], ends[0][here], ends[1][here], bits, miss_low)
            found = torch.autograd.grad(out, parts, slopes[here])
        for total, part in zip(sums, found):
            total[here] = part
    return [g.unflatten(0, (B, C // bits)).transpose(1, 2).flatten(2).to(x.dtype).contiguous() for g, x in zip(sums, inputs)]


@gradients.register_fake
def _(dout, inputs, low, high, bits, miss_low):
    return [torch.empty_like(x) for x in inputs]
