"""The contract of the WKV4 operator as checks: what every backend may rely on."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
EMPTY = -1e38  # p of a state that has seen nothing: far below any exponent, and no infinity, of which differences are not numbers


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The state is float32 always; float64 inputs (a test's business) carry a float64 state."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_arguments(w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None) -> None:
    """ValueError that says what was expected, for shapes, dtypes, devices and contiguity."""
    if k.dim() != 3 or min(k.shape) < 1:
        raise ValueError(f"wkv4: k must be [B, T, C] with B, T, C >= 1, got {list(k.shape)}")
    if k.dtype not in DTYPES:
        raise ValueError(f"wkv4: k must be bfloat16, float32 or float64, got {k.dtype}")
    B, _, C = k.shape
    carried = state_dtype(k.dtype)
    _check("k", k, tuple(k.shape), (k.dtype,), k.device)
    _check("v", v, tuple(k.shape), (k.dtype,), k.device)
    for name, x in (("w", w), ("u", u)):
        _check(name, x, (C,), (k.dtype, carried), k.device)
    if initial_state is not None:
        _check("initial_state", initial_state, (B, 3, C), (carried,), k.device)


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if tuple(x.shape) != shape:
        raise ValueError(f"wkv4: {name} must have the shape {list(shape)}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"wkv4: {name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"wkv4: {name} must be on {device}, where k is, got {x.device}")
    if not x.is_contiguous():
        raise ValueError(f"wkv4: {name} must be contiguous, got strides {list(x.stride())}; call .contiguous() first")
