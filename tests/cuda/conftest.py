"""The kernels of cuda/wkv7, compiled once a session for the host."""

from __future__ import annotations

import pytest

from oracles.emulated_wkv7 import Kernels, compile_kernels


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    return Kernels(compile_kernels(tmp_path_factory.mktemp("emulation"), "-O1"))
