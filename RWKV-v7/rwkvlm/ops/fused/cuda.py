"""The CUDA kernels (cuda/fused) as the operators of native.py on a GPU: the same schemas, fakes and autograd, another device."""

from __future__ import annotations

import ctypes

import torch

from ..launch import register_in_cpp, why_not_built
from . import native


def why_not(dtypes: tuple[torch.dtype, ...], width: int) -> str:
    """"" when the kernels run here on inputs of these dtypes and this last dimension (they are then built and registered), else the reason."""
    # The first also defines the operators: a machine with nvcc has a C++ compiler.
    return native.why_not(dtypes, width) or why_not_built("fused", register)


def register(registration: torch.library.Library, library: ctypes.CDLL, key: str) -> None:
    """Makes the library's kernels the operators' form for the dispatch key: "CUDA"; in tests "CPU", with emulated kernels. Tensors are checked in cuda/fused/gpu.cpp."""
    register_in_cpp("fused", registration, library, key)
