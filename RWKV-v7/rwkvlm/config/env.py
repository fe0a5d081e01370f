"""Every environment variable that the package reads, in one place.

Values are read when asked for, not at import, so that tests and launchers may set them late.
"""

from __future__ import annotations

import os
from pathlib import Path


def kernel() -> str:
    """RWKV_KERNEL: the backend asked for ("" or "auto", "cuda", "cpu", "torch", and the official "@rwkv3", which means auto)."""
    return os.environ.get("RWKV_KERNEL", "")


def cache_dir() -> Path:
    """RWKV_CACHE_DIR: where native kernels are built and downloads rest; default ~/.cache/rwkvlm."""
    return Path(os.environ.get("RWKV_CACHE_DIR") or Path.home() / ".cache" / "rwkvlm")


def cxx() -> str:
    """CXX: the C++ compiler; default g++."""
    return os.environ.get("CXX", "g++")


def cxx_flags() -> list[str]:
    """RWKV_CXXFLAGS: further compiler flags for the native kernels, for example -fsanitize=address,undefined."""
    return os.environ.get("RWKV_CXXFLAGS", "").split()


def cuda_home() -> str:
    """CUDA_HOME: where nvcc is looked for when it is not on the PATH; default /usr/local/cuda."""
    return os.environ.get("CUDA_HOME", "/usr/local/cuda")
