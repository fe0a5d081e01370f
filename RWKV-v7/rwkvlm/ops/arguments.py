"""What the contracts of the operators have in common: the check of a tensor, and the dtype of a state."""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The state is float32 always; float64 inputs (a test's business) carry a float64 state."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_fit(op: str, name: str, x: Tensor, shape: tuple[int, ...] | int, first: str, device: torch.device) -> None:
    """ValueError where x has not this shape (this many elements), or is not on the device where the argument `first` is."""
    if (tuple(x.shape) if isinstance(shape, tuple) else x.numel()) != shape:
        raise ValueError(
            f"{op}: {name} must have {f'the shape {list(shape)}' if isinstance(shape, tuple) else f'{shape} elements'}, got {list(x.shape)}"
        )
    if x.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, where {first} is, got {x.device}")


def check_tensor(
    op: str, name: str, x: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], first: str, device: torch.device
) -> None:
    """ValueError that says what was expected. first: the argument that is on this device."""
    check_fit(op, name, x, shape, first, device)
    if x.dtype not in dtypes:
        raise ValueError(f"{op}: {name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {x.dtype}")
    if not x.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {list(x.stride())}; call .contiguous() first")
