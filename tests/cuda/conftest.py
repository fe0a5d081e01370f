"""The CUDA kernels, compiled once a session for the host."""

from __future__ import annotations

import ctypes

import pytest

from oracles.emulated_wkv7 import CUDA, Kernels, compile_kernels


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(compile_kernels(tmp_path_factory.mktemp("emulation"), "-O2"))


@pytest.fixture(scope="session")
def block_kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Those around wkv7: cuda/adamw, cuda/fused, cuda/loss, cuda/rosa and cuda/wkv4."""
    sources = sorted(x for folder in ("common", "adamw", "fused", "loss", "rosa", "wkv4") for x in (CUDA / folder).glob("*.cu"))
    return ctypes.CDLL(str(compile_kernels(tmp_path_factory.mktemp("emulation"), "-O1", sources=sources)))
