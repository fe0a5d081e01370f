"""Every kernel source compiled: by nvcc for each architecture (registers that spill fail), and by g++ under the sanitizers."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from oracles.emulated_wkv7 import SOURCES, compile_kernels, run_sanitized

ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120")
# Bytes of spills that a thread may have. chunk_gradients holds two 16 x 64 sums and a factor in the 128 registers that two blocks per
# multiprocessor leave it (sm_90, sm_100). In the sequential backward a row of N = 128 fills the registers; it is not a hot kernel.
ALLOWED = {"chunk_gradients": 144, "sequential_backward": 256}


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvcc_compiles_without_spills(architecture: str, source: Path, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = ["nvcc", "-std=c++17", target, "-Xptxas", "-v", "-c", str(source), "-o", str(tmp_path / "out.o")]
    build = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert build.returncode == 0, build.stderr
    assert "warning" not in build.stderr, build.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers", build.stderr, re.S)
    assert kernels or source.parent.name == "common"
    for name, stack, stores, registers in kernels:
        allowed = max((limit for kernel, limit in ALLOWED.items() if kernel in name), default=0)
        # A stack without spills is an array that ptxas could not keep in registers: as slow.
        assert max(int(stores), int(stack)) <= allowed, f"sm_{architecture} {name}: {stores} bytes spilled, stack {stack}, {registers} registers"


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path) -> None:
    path = compile_kernels(tmp_path, "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    program = f"""
from pathlib import Path
from oracles.emulated_wkv7 import Kernels, make_case
kernels = Kernels(Path({str(path)!r}))
for reverse in (False, True):
    for options in (dict(T=67, H=2), dict(T=35, N=32), dict(T=17, N=16, B=2), dict(T=70, documents=[1, 64, 5])):
        kernels.run("chunked", make_case(**options), reverse=reverse)
        kernels.run("sequential", make_case(**options), reverse=reverse)
    kernels.run("sequential", make_case(T=18, N=128, H=1), reverse=reverse)
print("clean")
"""
    done = run_sanitized(program)
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]
