"""The CUDA kernels (cuda/wkv4) as the operators of native.py on a GPU: the same schemas, fakes and autograd, another device."""

from __future__ import annotations

import torch

from ..launch import why_not_built
from . import native


def why_not(dtype: torch.dtype, channels: int) -> str:
    """Empty when the kernels run here on this dtype and this many channels (they are then built and registered), else the reason."""
    # The first also defines the operators: a machine with nvcc has a C++ compiler.
    return native.why_not(dtype, channels) or why_not_built("wkv4")
