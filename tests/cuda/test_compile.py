"""Every kernel source compiled: by nvcc for each architecture (registers that spill fail), and by g++ under the sanitizers."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from oracles.emulated_wkv7 import AROUND, CUDA, SOURCES, compile_kernels, run_sanitized
from rwkvlm import native

ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120")
# Bytes of spills that a thread may have. In the sequential backward a row of N = 128 fills the registers; it is not a hot kernel.
ALLOWED = {"sequential_backward": 256}
WRITTEN_WITH = "13.0"
ALLOWED_BY_OTHERS = 16  # by another release of nvcc: as seen of 12.4 and 13.5
# -O1 -g would compile for 111 s of the second test, of which this leaves 14, and the run would take no less.
SANITIZED = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted({*SOURCES, *AROUND}), ids=lambda path: path.stem)
def test_nvcc_compiles_without_spills(source: Path, tmp_path: Path) -> None:
    """For all architectures in one call: what is for the host is compiled once.

    One after another (no -t), or what ptxas tells would be mixed.
    """
    nvcc = native.nvcc() or pytest.skip("needs nvcc")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    architectures = [a for a in ARCHITECTURES if f"sm_{a.rstrip('a')}" in known]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    anywhere = 0 if f"release {WRITTEN_WITH}," in version else ALLOWED_BY_OTHERS
    assert "90a" in architectures and (anywhere or len(architectures) == len(ARCHITECTURES))
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    command = [nvcc, "-std=c++17", *targets, "-Xptxas", "-v", "-c", str(source), "-o", str(tmp_path / "out.o")]
    build = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert build.returncode == 0, build.stderr
    assert "warning" not in build.stderr, build.stderr
    told = (
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    kernels = re.findall(told, build.stderr, re.S)
    assert len(kernels) == build.stderr.count("Compiling entry function")
    assert {kernel[1] for kernel in kernels} == {f"sm_{a}" for a in architectures} or source.parent.name == "common"
    for name, architecture, stack, stores, loads, registers in kernels:
        allowed = anywhere + max((limit for kernel, limit in ALLOWED.items() if kernel in name), default=0)
        # A stack without spills is an array that ptxas could not keep in registers: as slow.
        assert max(int(stores), int(stack)) <= allowed and (allowed or loads == "0"), (architecture, name, stack, stores, loads, registers)


@pytest.mark.slow
def test_cards_without_bf16_tensor_cores_compile(tmp_path: Path) -> None:
    """They run sequential.cu alone, but the library has both."""
    nvcc = native.nvcc() or pytest.skip("needs nvcc")
    command = [
        nvcc,
        "-std=c++17",
        "-gencode=arch=compute_75,code=sm_75",
        "-cubin",
        str(CUDA / "wkv7" / "chunked_forward.cu"),
        "-o",
        str(tmp_path / "out"),
    ]
    build = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert build.returncode == 0, build.stderr


@pytest.mark.slow
@pytest.mark.parametrize("what", ["wkv7", "around_wkv7"])
def test_sanitizers_find_nothing(what: str, tmp_path: Path) -> None:
    path = compile_kernels(tmp_path, *SANITIZED, sources=SOURCES if what == "wkv7" else AROUND)
    done = run_sanitized(f"from oracles.emulated_all import run_{what}; run_{what}({str(path)!r}); print('clean')")
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-3000:]
