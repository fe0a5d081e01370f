"""ROSA in plain PyTorch: run lengths by lag, gradients by running again with each bit turned. The oracle, and the form for every device and dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .arguments import RosaState
from .soft import soft_gradients

FLIPS_AT_ONCE = 1 << 22  # symbols


def longest(q: Tensor, k: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    """Where each output comes from.

    q: [R, T], the new symbols; k: [R, L + T], all of them; runs: [R, L] as in RosaState. Returns the index of the output in v, [R, T], -1 on a miss,
    and the runs after it, [R, L + T].
    """
    (R, T), L = q.shape, runs.shape[1]
    sources = torch.full((R, T), -1, dtype=torch.int64, device=q.device)
    for n in range(T):
        i = L + n
        if i:
            runs = torch.where(k[:, :i].flip(1) == q[:, n : n + 1], runs + 1, 0)  # lag 1 first
            nearest = torch.arange(i, 0, -1, device=q.device)
            best = (runs.long() * (i + 1) + nearest).argmax(1)  # the longest, of these the one of least lag
            sources[:, n] = torch.where(runs.gather(1, best[:, None])[:, 0] > 0, i - best, -1)
        runs = F.pad(runs, (0, 1))
    return sources, runs


def symbols(x: Tensor, bits: int) -> Tensor:
    """[B, T, C] to [B, C / bits, T], uint8."""
    place = 2 ** torch.arange(bits, device=x.device)
    return ((x > 0).unflatten(2, (-1, bits)) * place).sum(-1).to(torch.uint8).transpose(1, 2)


def values(y: Tensor, low: Tensor, high: Tensor, bits: int, miss_low: bool) -> Tensor:
    """Output symbols [B, G, T], -1 on a miss, to [B, T, C]."""
    y = y.transpose(1, 2).unsqueeze(-1)
    ones = (y.clamp(min=0) >> torch.arange(bits, device=y.device)) & 1
    out = torch.where(ones.flatten(2) > 0, high, low)
    return out if miss_low else torch.where((y < 0).expand(ones.shape).flatten(2), 0, out)


def followers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output symbols of rows [R, T], -1 on a miss."""
    sources, _ = longest(q, k, q.new_zeros(len(q), 0, dtype=torch.int32))
    return torch.where(sources < 0, -1, v.long().gather(1, sources.clamp(min=0)))


def tokens(x: Tensor, state: RosaState | None) -> tuple[Tensor, RosaState]:
    L = 0 if state is None else state.k.shape[1]
    k = x if state is None else torch.cat([state.k, x], 1)
    sources, runs = longest(x, k, x.new_zeros(len(x), 0, dtype=torch.int32) if L == 0 else state.runs)
    return torch.where(sources < 0, -1, k.gather(1, sources.clamp(min=0))), RosaState(k, k, runs)


def resumed(q, k, v, low, high, bits: int, miss_low: bool, state: RosaState | None) -> tuple[Tensor, RosaState]:
    """Forward from a state, or from the beginning: the output, and the state after it. k, v None: they are q."""
    new = [symbols(x, bits) for x in ((q,) if k is None else (q, k, v))]
    (B, G, T), L = new[0].shape, 0 if state is None else state.k.shape[2]
    before = [] if state is None else [state.k, state.v]
    k_all, v_all = (torch.cat([*before[i : i + 1], s], 2) for i, s in enumerate(new[-2:] if len(new) > 1 else new * 2))
    runs = torch.zeros(B, G, 0, dtype=torch.int32, device=q.device) if state is None else state.runs
    sources, runs = longest(new[0].flatten(0, 1), k_all.flatten(0, 1), runs.flatten(0, 1))
    sources = sources.view(B, G, T)
    y = torch.where(sources < 0, -1, v_all.long().gather(2, sources.clamp(min=0)))
    after = RosaState(k_all, k_all if k is None else v_all, runs.view(B, G, L + T))
    return values(y, low, high, bits, miss_low), after


def flips(dout: Tensor, inputs: list[Tensor], low: Tensor, high: Tensor, bits: int, miss_low: bool, tau: float) -> list[Tensor]:
    """The gradient of each of q, k, v, or of x alone, in its dtype: every bit of every symbol turned, and all run again."""
    B, T, C = dout.shape
    base = [symbols(x, bits).flatten(0, 1) for x in inputs]
    G, R = C // bits, len(base[0])
    slopes = dout.double()
    weight = low.double(), high.double()
    before = values(followers(*(base * 3)[:3] if len(base) == 1 else base).view(B, G, T), *weight, bits, miss_low)
    several = max(1, FLIPS_AT_ONCE // max(1, R * T))
    gradients = []
    for which, x in enumerate(inputs):
        numerator = torch.zeros(B, T, C, dtype=torch.float64, device=x.device)
        for begin in range(0, T * bits, several):
            places = torch.arange(begin, min(T * bits, begin + several), device=x.device)
            turned = [s.expand(len(places), R, T) for s in base]
            mask = torch.zeros(len(places), 1, T, dtype=torch.uint8, device=x.device)
            mask[torch.arange(len(places), device=x.device), 0, places // bits] = (1 << (places % bits)).to(torch.uint8)
            turned[which] = turned[which] ^ mask
            turned = [s.reshape(-1, T) for s in turned]
            y = followers(*(turned * 3)[:3] if len(base) == 1 else turned).view(len(places) * B, G, T)
            change = (values(y, *weight, bits, miss_low).view(-1, B, T, C) - before) * slopes
            change = change.unflatten(3, (G, bits)).sum((2, 4))  # [places, B, G]
            for place, c in zip(places.tolist(), change):
                numerator[:, place // bits, place % bits :: bits] = c
        sign = torch.where(x > 0, -1.0, 1.0)  # phi(turned) - phi(as it is), to phi(bit 1) - phi(bit 0)
        gradients.append((numerator * sign / (2 * x.double().abs().clamp(min=tau))).to(x.dtype))
    return gradients


class Rosa(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, low, high, bits, miss_low, tau, grad):
        ctx.save_for_backward(q, k, v, low, high)
        ctx.options = bits, miss_low, tau, grad
        return resumed(q, k, v, low, high, bits, miss_low, None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, low, high = ctx.saved_tensors
        bits, miss_low, tau, grad = ctx.options
        inputs = [q] if k is None else [q, k, v]
        gradients = [None] * len(inputs)
        if any(ctx.needs_input_grad[:3]):
            gradients = (
                soft_gradients(dout, inputs, low, high, bits, miss_low)
                if grad == "soft"
                else flips(dout, inputs, low, high, bits, miss_low, tau)
            )
        nought, one = torch.zeros_like(low, dtype=torch.float32), torch.ones_like(low, dtype=torch.float32)
        is_high = resumed(q, k, v, nought, one, bits, miss_low, None)[0]
        is_low = resumed(q, k, v, one, nought, bits, miss_low, None)[0]
        dlow, dhigh = ((dout.double() * mask).sum((0, 1)).to(low.dtype) for mask in (is_low, is_high))
        return *gradients, *[None] * (3 - len(gradients)), dlow, dhigh, None, None, None, None
