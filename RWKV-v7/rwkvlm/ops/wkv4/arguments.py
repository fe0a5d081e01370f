"""The contract of the WKV4 operator as checks: what every backend may rely on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_tensor, state_dtype

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
EMPTY = -1e38  # p of a state that has seen nothing: far below any exponent, and no infinity, of which differences are not numbers


def check_arguments(w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None) -> None:
    """ValueError that says what was expected, for shapes, dtypes, devices and contiguity."""
    if k.dim() != 3 or min(k.shape) < 1:
        raise ValueError(f"wkv4: k must be [B, T, C] with B, T, C >= 1, got {list(k.shape)}")
    if k.dtype not in DTYPES:
        raise ValueError(f"wkv4: k must be bfloat16, float32 or float64, got {k.dtype}")
    B, _, C = k.shape
    carried = state_dtype(k.dtype)
    for name, x in (("k", k), ("v", v)):
        check_tensor("wkv4", name, x, tuple(k.shape), (k.dtype,), "k", k.device)
    for name, x in (("w", w), ("u", u)):
        check_tensor("wkv4", name, x, (C,), (k.dtype, carried), "k", k.device)
    if initial_state is not None:
        check_tensor("wkv4", "initial_state", initial_state, (B, 3, C), (carried,), "k", k.device)
