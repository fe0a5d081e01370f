"""The CUDA kernels (cuda/adamw) as the operators of native.py on a GPU: the same schemas, another device."""

from __future__ import annotations

import ctypes

import torch

from ..launch import register_in_cpp, why_not_built
from . import native


def why_not() -> str:
    """"" when the kernels run here (they are then built and registered), else the reason."""
    # The first also defines the operators: a machine with nvcc has a C++ compiler.
    return native.why_not() or why_not_built("adamw", register)


def register(registration: torch.library.Library, library: ctypes.CDLL, key: str) -> None:
    """Makes the library's kernels the operators' form for the dispatch key: "CUDA"; in tests "CPU", with emulated kernels. Tensors are checked in cuda/adamw/gpu.cpp."""
    register_in_cpp("adamw", registration, library, key)
