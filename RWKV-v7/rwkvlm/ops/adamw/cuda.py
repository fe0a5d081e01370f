"""The CUDA kernels (cuda/adamw) as the operators of native.py on a GPU: the same schemas, another device."""

from __future__ import annotations

from ..launch import why_not_built
from . import native


def why_not() -> str:
    """Empty when the kernels run here (they are then built and registered), else the reason."""
    # The first also defines the operators: a machine with nvcc has a C++ compiler.
    return native.why_not() or why_not_built("adamw")
