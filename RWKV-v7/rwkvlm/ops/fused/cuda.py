"""The CUDA kernels (cuda/fused) as the operators of native.py on a GPU: the same schemas, fakes and autograd, another device."""

from __future__ import annotations

import torch

from ..launch import why_not_built
from . import native


def why_not(dtypes: tuple[torch.dtype, ...], width: int) -> str:
    """Empty when the kernels run here on these dtypes and this last dimension (they are then built and registered), else the reason."""
    # The first also defines the operators: a machine with nvcc has a C++ compiler.
    return native.why_not(dtypes, width) or why_not_built("fused")
