"""The CUDA kernels, compiled once a run of the tests for the host: from their source, or with --ptx from what nvcc makes of it."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from oracles.emulated_all import registered
from oracles.emulated_wkv7 import AROUND, SOURCES, Kernels, compile_kernels
from oracles.ptx import compile_ptx, why_not
from rwkvlm.native import available
from rwkvlm.ops import backend
from rwkvlm.ops.launch import why_not_built


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Kernels:
    return Kernels(compiled(tmp_path_factory, "emulated_wkv7", "-O2", SOURCES, pytestconfig.getoption("ptx")))


@pytest.fixture(scope="session")
def block_kernels(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> ctypes.CDLL:
    """Those around wkv7: cuda/adamw, cuda/fused, cuda/loss, cuda/rosa and cuda/wkv4."""
    return ctypes.CDLL(str(compiled(tmp_path_factory, "emulated_around_wkv7", "-O1", AROUND, pytestconfig.getoption("ptx"))))


def compiled(tmp_path_factory: pytest.TempPathFactory, name: str, flag: str, sources: list[Path], architecture: str) -> Path:
    """By one worker of pytest-xdist, for all. architecture: "90a", with whose PTX; "": from the source."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / name
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = folder / "kernels.so"
        if made.exists():
            return made
        if not architecture:
            return compile_kernels(folder, flag, sources=sources)
        assert not (missing := why_not(architecture)), missing
        return compile_ptx(folder, architecture, sources)


@pytest.fixture(params=["emulated", "gpu"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where a file's operators run: CPU tensors over the kernels in emulation, or the GPU. All new memory is filled with NaN.

    The file says which in OPERATORS: the folder in cuda/, the package's module that defines them, and what its why_not
    takes; None: they are defined where the file imports them.
    """
    folder, native, arguments = request.module.OPERATORS
    torch.use_deterministic_algorithms(True, warn_only=True)
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        monkeypatch.setattr(backend, "_requested", "cuda")
        assert (native is None or native.why_not(*arguments) == "") and why_not_built(folder) == ""  # defines and registers the operators
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
