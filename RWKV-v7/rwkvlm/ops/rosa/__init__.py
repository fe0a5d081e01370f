"""ROSA, the Rapid Online Suffix Automaton of RWKV-8: the contract, and the choice of who computes it.

For each i let w(j), 0 <= j < i, be how many symbols back from j agree with those back from i: q[i-r] == k[j-r] for all r < w. The largest w wins,
the latest j among equals; if w >= 1 the output is v[j+1], what followed the last time that the longest known suffix was seen, else it is a miss.

Source: RWKV-LM, folder RWKV-v8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .arguments import RosaState, check, check_tokens

__all__ = ["RosaState", "rosa", "rosa_self", "rosa_tokens"]


def rosa_tokens(x: Tensor, state: RosaState | None = None, return_state: bool = False) -> Tensor | tuple[Tensor, RosaState]:
    """What followed the last time that the longest known suffix of the tokens was seen; -1 on a miss.

    x: [B, T] int64, T >= 1. Returns [B, T] int64, with return_state also what is needed to go on (see `rosa`). No gradient.
    ValueError for anything else.
    """
    check_tokens(x, state)
    out, after = reference.tokens(x, state)
    return (out, after) if return_state else out


def rosa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int = 1,
    miss: str = "zero",
    tau: float = 1e-3,
    grad: str = "flip",
    state: RosaState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, RosaState]:
    """ROSA over symbols of 1 to 8 bits; a bit is x > 0.

    q, k, v: [B, T, C], T >= 1, one dtype; channels g bits .. g bits + bits - 1 form a symbol, least significant bit first, each group a sequence of its own.
    low, high: [C], the output where the output symbol's bit is 0, and where it is 1. miss: "zero", then the output is 0, or "low", it is `low`.
    grad: what q, k and v receive.
        "flip"  d x_t = (phi(bit 1) - phi(bit 0)) / (2 max(|x_t|, tau)), phi = sum(d out * out): exact, by turning each single bit
        "soft"  the gradient of a soft ROSA (soft.py): dense, also where two bits would have to change together
    low and high receive the exact sums over where they were put out.
    state: what `return_state` gave, to go on behind it: token by token, in pieces or at once, the outputs are the same. Inference only: an
        input that wants a gradient is an error then. It grows with the text, by 6 bytes for each symbol.
    Returns out [B, T, C] in the dtype of q, with return_state also the state. ValueError for anything else.
    """
    return _rosa(q, k, v, low, high, bits, miss, tau, grad, state, return_state)


def rosa_self(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    bits: int = 1,
    miss: str = "zero",
    tau: float = 1e-3,
    grad: str = "flip",
    state: RosaState | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, RosaState]:
    """`rosa` with q = k = v = x: turning a bit of x turns it in all three."""
    return _rosa(x, None, None, low, high, bits, miss, tau, grad, state, return_state)


def _rosa(q, k, v, low, high, bits, miss, tau, grad, state, return_state):
    check(q, k, v, low, high, bits, miss, tau, grad, state, return_state)
    low, high = low.to(q.dtype), high.to(q.dtype)
    if state is not None or return_state:
        with torch.no_grad():
            out, after = reference.resumed(q, k, v, low, high, bits, miss == "low", state)
        return (out, after) if return_state else out
    return reference.Rosa.apply(q, k, v, low, high, bits, miss == "low", tau, grad)
