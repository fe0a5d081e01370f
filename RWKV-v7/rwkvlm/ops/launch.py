"""The CUDA kernels of a folder of cuda/ as the operators' form on a GPU. Their launch is in C++: its gpu.cpp, over cuda/common/launch.h."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from rwkvlm import native


def on_either_device(name: str, why_not: Callable[[], str]) -> dict[str, Callable[[], str]]:
    """For `backend.choose`: operators of cuda/<name>/ that have a form for the CPU and one for a GPU, under the same schemas.

    why_not: of the C++ form. It also defines the operators: a machine with nvcc has a C++ compiler.
    """
    return {"cpu": why_not, "cuda": lambda: why_not() or why_not_built(name)}


def why_not_built(name: str) -> str:
    """Empty when the CUDA kernels of cuda/<name>/ run here (they are then built, and registered once), else the reason."""
    built, reason = native.cuda_available(name)
    if built:
        _registered(name)
    return reason


@functools.cache
def _registered(name: str) -> int:
    return register(name, native.cuda_library(name), "CUDA")


def register(name: str, library: ctypes.CDLL, key: str) -> int:
    """Makes the library's kernels the form of their operators for the dispatch key: "CUDA"; in tests "CPU", with emulated kernels.

    Until rwkvlm::<name>_unregister is given the result.
    """
    native.load_launches(name)
    return getattr(torch.ops.rwkvlm, f"{name}_register")(library._handle, key)
