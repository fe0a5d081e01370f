"""What the contracts of the recurrences have in common: the check of a tensor, and the dtype of a state."""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The state is float32 always; float64 inputs (a test's business) carry a float64 state."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_tensor(op: str, name: str, x: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], first: str, device: torch.device) -> None:
    """ValueError that says what was expected. first: the argument that is on this device."""
    if tuple(x.shape) != shape:
        raise ValueError(f"{op}: {name} must have the shape {list(shape)}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        raise ValueError(f"{op}: {name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, where {first} is, got {x.device}")
    if not x.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {list(x.stride())}; call .contiguous() first")
