"""WKV7 token by token, straight from the formula: the oracle that every other backend is tested against.

Source: the RWKV-7 paper, arXiv 2503.14456, with the decay of the released models, exp(-exp(-1/2) sigmoid(w)).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import state_dtype
from .packing import per_sequence

DECAY_SCALE = -math.exp(-0.5)


def decay(w: Tensor) -> Tensor:
    """Raw decay (any real number) -> the factor in (0.545, 1) that a token multiplies the state with."""
    return torch.exp(DECAY_SCALE * torch.sigmoid(w))


@per_sequence
def wkv7_reference(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """r, w, k, v, a, b [B, T, H, N], state [B, H, N, N] -> y [B, T, H, N], final state.

    Everything is computed in float32, or float64 for float64 inputs. Rows of the state are value channels, columns key channels.
    """
    dtype, (B, T, H, N) = state_dtype(r.dtype), r.shape
    r_, d_, k_, v_, a_, b_ = (x.unbind(1) for x in (r.to(dtype), decay(w.to(dtype)), *(x.to(dtype) for x in (k, v, a, b))))
    S = r.new_zeros(B, H, N, N, dtype=dtype) if initial_state is None else initial_state
    y = []
    for t in range(T):
        removed = S @ a_[t].unsqueeze(-1)
        S = S * d_[t].unsqueeze(-2) + removed * b_[t].unsqueeze(-2) + v_[t].unsqueeze(-1) * k_[t].unsqueeze(-2)
        y.append((S @ r_[t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(y, dim=1).to(r.dtype), S
