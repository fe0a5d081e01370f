"""ROSA, the Rapid Online Suffix Automaton of RWKV-8: the contract, and the choice of who computes it.

For each i let w(j), 0 <= j < i, be how many symbols back from j agree with those back from i: q[i-r] == k[j-r] for all
r < w. The largest w wins, the latest j among equals; if w >= 1 the output is v[j+1], what followed the last time that
the longest known suffix was seen, else it is a miss.

Source: RWKV-LM, folder RWKV-v8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ..launch import on_either_device
from . import native, reference  # noqa: F401  (defines what runs in plain PyTorch)
from .arguments import RosaState, check, check_tokens

__all__ = ["RosaState", "backend_for", "rosa", "rosa_self", "rosa_tokens"]


def rosa_tokens(x: Tensor, state: RosaState | None = None, return_state: bool = False) -> Tensor | tuple[Tensor, RosaState]:
    """What followed the last time that the longest known suffix of the tokens was seen; -1 on a miss.

    x: [B, T] int64, T >= 1. Returns [B, T] int64, with return_state also what is needed to go on (see `rosa`). No gradient.
    ValueError for anything else.
    """
    check_tokens(x, state)
    old = (None, None) if state is None else (state.k.contiguous(), state.runs.contiguous())
    y, k, runs = _operator("_tokens", x)(x.contiguous(), *old, return_state)
    return (y, RosaState(k, k, runs)) if return_state else y


def rosa(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
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

    q, k, v: [B, T, C], T >= 1, one dtype; channels g bits .. g bits + bits - 1 form a symbol, least significant bit first,
        each group a sequence of its own. k and v None: they are q, and turning a bit turns it in all three.
    low, high: [C], the output where the output symbol's bit is 0, and where it is 1.
    miss: "zero", then the output there is 0, or "low", then it is `low`.
    grad: what q, k and v receive (low and high receive the exact sums over where they were put out):
        "flip"  d x_t = (phi(bit 1) - phi(bit 0)) / (2 max(|x_t|, tau)), phi = sum(d out * out): exact, by turning each single bit
        "soft"  the gradient of a soft ROSA (soft.py): dense, also where two bits would have to change together
    state: what `return_state` gave, to go on behind it: token by token, in pieces or at once, the outputs are the same.
        Inference only: an input that wants a gradient is an error then. It grows with the text, by 6 bytes for each
        symbol (q = k = v: 5).
    Returns out [B, T, C] in the dtype of q, with return_state also the state. ValueError for anything else.
    """
    check(q, k, v, low, high, bits, miss, tau, grad, state, return_state)
    wide = backend.computed_in(q.dtype)
    inputs = [x if x is None else x.to(wide).contiguous() for x in (q, k, v, low, high)]
    old = (None, None, None) if state is None else (x.contiguous() for x in state)
    out, k_after, v_after, runs = _operator("", q)(*inputs, bits, miss == "low", tau, grad == "soft", *old, return_state)
    out = out.to(q.dtype)
    return (out, RosaState(k_after, k_after if k is None else v_after, runs)) if return_state else out


def rosa_self(x: Tensor, low: Tensor, high: Tensor, *more, **options) -> Tensor | tuple[Tensor, RosaState]:
    """`rosa` with q = k = v = x; what follows `high` is as there."""
    return rosa(x, None, None, low, high, *more, **options)


def _operator(part: str, x: Tensor):
    # rosa: the operators of cuda/rosa, which have a form for either device
    name = "rosa_plain" if backend_for(x.device, x.dtype) == "torch" else "rosa"
    return getattr(torch.ops.rwkvlm, name + part)


@backend.decided_while_tracing
def backend_for(device: torch.device, dtype: torch.dtype) -> str:
    """Who computes it here: "cuda", "cpu" or "torch"; builds what is missing. UserError for a kernel asked for that cannot run.

    dtype: of q, k, v; int64 for tokens.
    """
    dtype = backend.computed_in(dtype)
    return backend.choose("rosa", device, on_either_device("rosa", lambda: native.why_not(dtype)))
