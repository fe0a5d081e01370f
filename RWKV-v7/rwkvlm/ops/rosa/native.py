"""The native kernels (cuda/rosa): C++ on the CPU, CUDA on a GPU; only inputs are kept for backward."""

from __future__ import annotations

import torch

from rwkvlm import native

from .operator import register


def why_not(dtype: torch.dtype) -> str:
    """Empty when the kernels run here on inputs of this dtype (int64: tokens; they are then built and registered), else the reason."""
    if dtype not in (torch.bfloat16, torch.float32, torch.int64):
        return f"it takes bfloat16 or float32, not {dtype}"
    built, reason = native.available("rosa")
    if built:
        register("rosa")
    return reason
