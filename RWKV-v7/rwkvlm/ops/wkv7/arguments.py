"""The contract of the WKV7 operator as checks: what every backend may rely on."""

from __future__ import annotations

import torch
from torch import Tensor

from rwkvlm.config import HEAD_SIZES

from ..arguments import check_tensor, state_dtype

NAMES = ("r", "w", "k", "v", "a", "b")
DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def check_arguments(inputs: tuple[Tensor, ...], initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """ValueError that says what was expected, for shapes, dtypes, devices and contiguity (the values of cu_seqlens: `sequence_bounds`)."""
    r = inputs[0]
    if r.dim() != 4 or r.shape[3] not in HEAD_SIZES or min(r.shape[:3]) < 1:
        raise ValueError(f"wkv7: r must be [B, T, H, N] with B, T, H >= 1 and N in {sorted(HEAD_SIZES)}, got {list(r.shape)}")
    if r.dtype not in DTYPES:
        raise ValueError(f"wkv7: r must be bfloat16, float32 or float64, got {r.dtype}")
    for name, x in zip(NAMES, inputs):
        check_tensor("wkv7", name, x, tuple(r.shape), (r.dtype,), "r", r.device)
    sequences = r.shape[0]
    if cu_seqlens is not None:
        if r.shape[0] != 1:
            raise ValueError(f"wkv7: with cu_seqlens all documents lie in one row, so B must be 1, got {r.shape[0]}")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "wkv7: cu_seqlens must be a 1-D int32 or int64 tensor [0, ..., T] of at least 2 entries, "
                f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
            )
        sequences = cu_seqlens.numel() - 1
    if initial_state is not None:
        shape = (sequences, r.shape[2], r.shape[3], r.shape[3])
        check_tensor("wkv7", "initial_state", initial_state, shape, (state_dtype(r.dtype),), "r", r.device)


def sequence_bounds(cu_seqlens: Tensor, length: int) -> list[int]:
    """The entries of cu_seqlens as a list, after checking that they rise from 0 to `length` (T)."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(p >= q for p, q in zip(bounds, bounds[1:])):
        raise ValueError(f"wkv7: cu_seqlens must rise strictly from 0 to T = {length}, got {bounds}")
    return bounds
