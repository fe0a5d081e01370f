"""The CUDA kernels, compiled once a session for the host."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from oracles.emulated_all import registered
from oracles.emulated_wkv7 import AROUND, Kernels, compile_kernels
from rwkvlm.native import available
from rwkvlm.ops import backend


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(compile_kernels(tmp_path_factory.mktemp("emulation"), "-O2"))


@pytest.fixture(scope="session")
def block_kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Those around wkv7: cuda/adamw, cuda/fused, cuda/loss, cuda/rosa and cuda/wkv4."""
    return ctypes.CDLL(str(compile_kernels(tmp_path_factory.mktemp("emulation"), "-O1", sources=AROUND)))


@pytest.fixture(params=["emulated", "gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where a file's operators run: CPU tensors over the kernels in emulation, or the GPU. All new memory is filled with NaN.

    The file says which in OPERATORS: the folder in cuda/, the package's modules of its CUDA and of its C++ form, and what their why_not takes.
    Without the second the operators are defined where the first is imported.
    """
    folder, cuda, native, arguments = request.module.OPERATORS
    torch.use_deterministic_algorithms(True, warn_only=True)
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        monkeypatch.setattr(backend, "_requested", "cuda")
        assert cuda.why_not(*arguments) == ""  # registers the operators
        yield torch.device("cuda", 0)
    else:
        monkeypatch.setattr(backend, "_requested", "cpu")
        if native is not None:
            if not available(folder)[0]:
                pytest.skip(available(folder)[1])
            assert native.why_not(*arguments) == ""  # defines the operators
        kernels = request.getfixturevalue("block_kernels")
        kernels.emulation_reverse(0)
        with registered(kernels, folder):
            yield torch.device("cpu")
    torch.use_deterministic_algorithms(False)
