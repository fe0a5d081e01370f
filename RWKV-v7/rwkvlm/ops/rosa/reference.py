"""ROSA in plain PyTorch, the oracle and the form for every device and dtype: run lengths by lag, gradients by turning each bit.

To turn a bit means to run all again with it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .operator import BACKWARD, FORWARD, TOKENS, register

FLIPS_AT_ONCE = 1 << 22  # symbols


def longest(q: Tensor, k: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    """Where each output comes from.

    q: [R, T], the new symbols; k: [R, L + T], all of them; runs: [R, L] as in RosaState. Returns the index of the
    output in v, [R, T], -1 on a miss, and the runs after it, [R, L + T].
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


def rosa(q, k, v, low, high, bits, miss_low, tau, soft, old_k, old_v, old_runs, with_state) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and with_state the symbols and runs after it; k and v None: they are q."""
    (B, T, C), L = q.shape, 0 if old_k is None else old_k.shape[2]
    G = C // bits

    def behind(old: Tensor | None, x: Tensor) -> Tensor:
        return torch.cat([old, symbols(x, bits)], 2) if L else symbols(x, bits)

    all_k = behind(old_k, q if k is None else k)
    new_q, all_v = (all_k[:, :, L:], all_k) if k is None else (symbols(q, bits), behind(old_v, v))
    runs = old_runs.flatten(0, 1) if L else torch.zeros(B * G, 0, dtype=torch.int32, device=q.device)
    sources, runs = longest(new_q.flatten(0, 1), all_k.flatten(0, 1), runs)
    sources = sources.view(B, G, T)
    y = torch.where(sources < 0, -1, all_v.long().gather(2, sources.clamp(min=0)))
    out, nothing = values(y, low, high, bits, miss_low).contiguous(), all_k[:, :, :0]
    if not with_state:
        return out, nothing.clone(), nothing.clone(), nothing.int()
    return out, all_k.contiguous(), nothing.clone() if k is None else all_v.contiguous(), runs.view(B, G, L + T)


def rosa_backward(dout, q, k, v, low, high, bits, miss_low, tau, flips) -> list[Tensor]:
    """The gradients of q, k, v, or of q alone where k and v are None, of which none without `flips`; then those of low and high."""
    gradients = turned(dout, [q] if k is None else [q, k, v], low, high, bits, miss_low, tau) if flips else []
    for ends in ((1.0, 0.0), (0.0, 1.0)):  # where `low` has been put out, where `high` has
        mask = rosa(q, k, v, *(torch.full_like(low, x) for x in ends), bits, miss_low, tau, False, None, None, None, False)[0]
        gradients.append((dout.double() * mask).sum((0, 1)).to(low.dtype))
    return gradients


def rosa_tokens(x: Tensor, old: Tensor | None, old_runs: Tensor | None, with_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    k = x.clone() if old is None else torch.cat([old, x], 1)
    sources, runs = longest(x, k, x.new_zeros(len(x), 0, dtype=torch.int32) if old is None else old_runs)
    y = torch.where(sources < 0, -1, k.gather(1, sources.clamp(min=0)))
    return (y, k, runs) if with_state else (y, k[:, :0].clone(), runs[:, :0].clone())


def turned(dout: Tensor, inputs: list[Tensor], low: Tensor, high: Tensor, bits: int, miss_low: bool, tau: float) -> list[Tensor]:
    """The gradient of each of q, k, v, or of x alone, in its dtype: every bit of every symbol turned, and all run again."""
    B, T, C = dout.shape
    base = [symbols(x, bits).flatten(0, 1) for x in inputs]
    G, R = C // bits, len(base[0])
    slopes = dout.double()
    weight = low.double(), high.double()
    before = values(followers(*(base * 3)[:3]).view(B, G, T), *weight, bits, miss_low)
    if B == 0:
        return [torch.zeros_like(x) for x in inputs]
    several = max(1, FLIPS_AT_ONCE // (R * T))
    gradients = []
    for which, x in enumerate(inputs):
        numerator = torch.zeros(B, T, C, dtype=torch.float64, device=x.device)
        for begin in range(0, T * bits, several):
            places = torch.arange(begin, min(T * bits, begin + several), device=x.device)
            rows = [s.expand(len(places), R, T) for s in base]
            mask = torch.zeros(len(places), 1, T, dtype=torch.uint8, device=x.device)
            mask[torch.arange(len(places), device=x.device), 0, places // bits] = (1 << (places % bits)).to(torch.uint8)
            rows[which] = rows[which] ^ mask
            rows = [s.reshape(-1, T) for s in rows]
            y = followers(*(rows * 3)[:3]).view(len(places) * B, G, T)
            change = (values(y, *weight, bits, miss_low).view(-1, B, T, C) - before) * slopes
            change = change.unflatten(3, (G, bits)).sum((2, 4))  # [places, B, G]
            for place, c in zip(places.tolist(), change):
                numerator[:, place // bits, place % bits :: bits] = c
        sign = torch.where(x > 0, -1.0, 1.0)  # phi(turned) - phi(as it is), to phi(bit 1) - phi(bit 0)
        gradients.append((numerator * sign / (2 * x.double().abs().clamp(min=tau))).to(x.dtype))
    return gradients


for _name, _schema, _form in (
    ("rosa_plain", FORWARD, rosa),
    ("rosa_plain_backward", BACKWARD, rosa_backward),
    ("rosa_plain_tokens", TOKENS, rosa_tokens),
):
    torch.library.define(f"rwkvlm::{_name}", _schema)
    torch.library.impl(f"rwkvlm::{_name}", "CompositeExplicitAutograd", _form)
register("rosa_plain")
