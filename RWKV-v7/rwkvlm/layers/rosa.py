"""ROSA as a layer: what followed the last occurrence of the longest suffix seen before, of symbols made from the inputs.

Names, starting values and what a miss gives are those of the official files (RWKV-LM, RWKV-v8).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import nn

from ..config.rosa import RosaConfig
from ..ops.rosa import RosaState, rosa
from .norm_mix import NormMix
from .packed import Packed, by_document

# the part of the bits' gradient that goes on below: all of it would grow from block to block, and drown what the text
# says (records/2026-11-26-rosa-gradient)
TO_STREAM = 0.1
# the part that stays of what would train queries and keys to differ: a query that has moved by itself no longer finds the
# keys of its like (records/2026-11-28-rosa-rates)
APART = 0.02


class _Damped(torch.autograd.Function):
    """The input itself, and TO_STREAM of its gradient."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return grad * TO_STREAM


class _Together(torch.autograd.Function):
    """q and k themselves; the mean of their gradients for both, and APART of what each has beside it."""

    @staticmethod
    def forward(ctx, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return q.view_as(q), k.view_as(k)

    @staticmethod
    def backward(ctx, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, beside = (q + k) / 2, (q - k) * (APART / 2)
        return mean + beside, mean - beside


class RosaMixState(NamedTuple):
    """last: [B, C] last normalised input; seen: the symbols read so far, which grow with the text; None at its beginning."""

    last: torch.Tensor
    seen: RosaState | None


class RosaQKV(nn.Module):
    """What the values hold where the keys matched the queries longest: +emb for a bit of 1, -emb for 0.

    A miss gives -emb (symbols of 1 bit) or 0 (of 4 bits).
    """

    def __init__(self, width: int, bits: int, tau: float, grad: str) -> None:
        super().__init__()
        self.settings = dict(bits=bits, miss="low" if bits == 1 else "zero", tau=tau, grad=grad)
        self.emb = nn.Parameter(torch.empty(1, 1, width))

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        seen: RosaState | None = None,
        return_state: bool = False,
        packed: Packed | None = None,
    ) -> tuple[torch.Tensor, RosaState | None]:
        """q, k, v: [B, T, C]; packed: documents in one row, without states. Returns [B, T, C], and the new state or None."""
        emb = self.emb.flatten()
        operator = functools.partial(rosa, low=-emb, high=emb, **self.settings, state=seen, return_state=return_state)
        out = by_document(operator, packed, q, k, v)
        return out if return_state else (out, None)


class RosaMix(nn.Module):
    """`o(rosa_qkv(q(x + xx x_q), k(x + xx x_k), v(x + xx x_v)))`, xx = shift(x) - x: tokens mixed by exact recall.

    A branch of a block. The whole of the bits' gradient trains q, k and v, TO_STREAM of it the blends, the norm and the
    stream; q and k learn mostly together. With --rosa_grad none there is no such gradient: the symbols are those of
    projections that stay as they are, and only what is made of the output is trained.
    """

    def __init__(self, config: RosaConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.x_q, self.x_k, self.x_v = (nn.Parameter(torch.empty(1, 1, C)) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(C, C) for _ in range(3))
        self.fixed = config.rosa_grad == "none"
        if self.fixed:
            self.requires_grad_(False)
        self.rosa_qkv = RosaQKV(C, config.rosa_bits, config.rosa_tau, "flip" if self.fixed else config.rosa_grad)
        self.o = nn.Linear(C, C)

    def forward(
        self, x: torch.Tensor, norm: NormMix, state: RosaMixState | None = None, return_state: bool = False, packed: Packed | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, RosaMixState | None]:
        """x: [B, T, C], the residual stream, which norm leads in; packed: documents in one row.

        Returns x, the output [B, T, C] for it, and the new state or None.
        """
        last, seen = state if state is not None else (None, None)
        x, last, (xq, xk, xv) = norm(x, None, last, [self.x_q, self.x_k, self.x_v], packed)
        xq, xk, xv = (t.detach() if self.fixed else _Damped.apply(t) for t in (xq, xk, xv))
        q, k = _Together.apply(self.q(xq), self.k(xk))
        y, seen = self.rosa_qkv(q, k, self.v(xv), seen, return_state, packed)
        return x, self.o(y), RosaMixState(last, seen) if return_state else None
