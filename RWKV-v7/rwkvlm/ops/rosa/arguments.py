"""What the ROSA operators take, and what carries a text on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOST_BITS = 8


class RosaState(NamedTuple):
    """A text so far, L symbols long, of `rosa` and `rosa_self` ([B, C / bits, L], uint8) or of `rosa_tokens` ([B, L], int64)."""

    k: Tensor  # the symbols
    v: Tensor  # the same tensor as k where q = k = v
    runs: Tensor  # int32, how long a match ended at the last symbol, lag 1 first; 0 at lag L


def check(q, k, v, low, high, bits, miss, tau, grad, state, return_state) -> None:
    """ValueError, or q, k, v (k and v None: they are q), low and high fit."""
    x = "x" if k is None else "q"
    if q.dim() != 3 or not q.is_floating_point() or q.shape[1] < 1 or q.shape[2] < 1:
        raise ValueError(f"rosa: expected {x} [B, T, C] of floating-point numbers, T >= 1, C >= 1, got {_said(q)}")
    if (k is None) != (v is None):
        raise ValueError("rosa: expected k and v, or neither (both None: they are q)")
    for name, t in () if k is None else (("k", k), ("v", v)):
        if t.shape != q.shape or t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"rosa: expected {name} like q, {_said(q)}, got {_said(t)}")
    if not 1 <= bits <= MOST_BITS or q.shape[2] % bits:
        raise ValueError(f"rosa: expected bits from 1 to {MOST_BITS} that divide the {q.shape[2]} channels, got {bits}")
    for name, t in {"low": low, "high": high}.items():
        if t.shape != q.shape[2:] or not t.is_floating_point() or t.device != q.device:
            raise ValueError(f"rosa: expected {name} [{q.shape[2]}] of floating-point numbers on {q.device}, got {_said(t)}")
    if miss not in ("zero", "low"):
        raise ValueError(f'rosa: expected miss "zero" or "low", got {miss!r}')
    if grad not in ("flip", "soft"):
        raise ValueError(f'rosa: expected grad "flip" or "soft", got {grad!r}')
    if not tau > 0:
        raise ValueError(f"rosa: expected tau > 0, got {tau}")
    if state is not None or return_state:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, low, high)):
            raise ValueError("rosa: no gradient reaches through a state: call it under torch.no_grad()")
    if state is not None:
        _check_state(state, (q.shape[0], q.shape[2] // bits), torch.uint8, q.device)


def check_tokens(x: Tensor, state: RosaState | None) -> None:
    if x.dim() != 2 or x.dtype != torch.int64 or x.shape[1] < 1:
        raise ValueError(f"rosa_tokens: expected [B, T] int64, T >= 1, got {_said(x)}")
    if state is not None:
        _check_state(state, (x.shape[0],), torch.int64, x.device)


def _check_state(state: RosaState, rows: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    L = state.k.shape[-1]
    for name, t, kind in (("k", state.k, dtype), ("v", state.v, dtype), ("runs", state.runs, torch.int32)):
        if t.shape != (*rows, L) or t.dtype != kind or t.device != device:
            raise ValueError(f"rosa: expected state.{name} {[*rows, L]} of {kind} on {device}, got {_said(t)}")


def _said(t: Tensor) -> str:
    return f"{list(t.shape)} of {t.dtype} on {t.device}"
