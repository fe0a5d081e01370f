"""WKV4 token by token, straight from the formula: the oracle that every other backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import state_dtype
from .arguments import EMPTY


def empty_state(k: Tensor) -> Tensor:
    """[B, 3, C]: of rows that have seen nothing."""
    B, _, C = k.shape
    zeros = k.new_zeros(B, 2, C, dtype=state_dtype(k.dtype))
    return torch.cat([zeros, torch.full_like(zeros[:, :1], EMPTY)], dim=1)


def wkv4_reference(w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """w [C], the logarithm of the decay, u [C], k, v [B, T, C], state [B, 3, C] -> y [B, T, C], final state.

    Everything is computed in float32, or float64 for float64 inputs.
    """
    dtype = state_dtype(k.dtype)
    a, b, p = (empty_state(k) if initial_state is None else initial_state).unbind(1)
    y = []
    for kt, vt in zip(k.to(dtype).unbind(1), v.to(dtype).unbind(1)):
        most = torch.maximum(p, u + kt)
        before, now = torch.exp(p - most), torch.exp(u + kt - most)
        y.append((before * a + now * vt) / (before * b + now))
        most = torch.maximum(p + w, kt)
        before, now = torch.exp(p + w - most), torch.exp(kt - most)
        a, b, p = before * a + now * vt, before * b + now, most
    return torch.stack(y, dim=1).to(k.dtype), torch.stack([a, b, p], dim=1)
