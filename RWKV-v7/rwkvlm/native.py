"""Native kernels: builds cuda/<name>/ when it is first asked for, keeps the result, and loads it into torch.ops.rwkvlm.

Every *.cpp of the folder is compiled once, except cpu.cpp, which is compiled once per instruction set of the machine's family
(see cuda/common/isa.h). The compiler is called directly, since torch.utils.cpp_extension.load takes half a minute for what the
stable ABI of torch makes a matter of seconds. Nothing is built at import. Threads are torch's own (torch::stable::parallel_for):
no second OpenMP runtime enters the process, none is needed to build, and torch.set_num_threads is obeyed.

A folder without op.cpp has nothing to do with torch: a plain C interface, for commands that should not wait for torch to load.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Iterator

from .config import env
from .config.locks import try_lock

SOURCE_DIR = Path(__file__).resolve().parents[2] / "cuda"
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno -Wno-psabi".split()
INSTRUCTION_SETS = {"plain": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"],
    }
TIME_OUT = 600.0  # seconds, for the compiler and for another process's build


class NativeBuildError(RuntimeError):
    """A native kernel cannot be built or loaded here; one line that says why."""


@functools.cache
def load(name: str) -> None:
    """Make the operators of cuda/<name>/ available as torch.ops.rwkvlm.*; builds them on the first use ever. NativeBuildError."""
    import torch

    library = build(name)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise NativeBuildError(f"native kernel {name}: {library} does not load: {_one_line(str(error))}") from None


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """The C functions of cuda/<name>/, a folder without op.cpp; built on the first use ever, torch is not imported. NativeBuildError."""
    path = build(name)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeBuildError(f"native kernel {name}: {path} does not load: {_one_line(str(error))}") from None


@functools.cache
def available(name: str) -> tuple[bool, str]:
    """Whether `load(name)` works here, and the reason why not; asked once in a process."""
    try:
        load(name)
    except NativeBuildError as error:
        return False, str(error)
    return True, ""


def build(name: str) -> Path:
    """The shared library of cuda/<name>/, compiled if these sources, flags, compiler and torch have not met in this cache yet."""
    compiler = shutil.which(env.cxx())
    if compiler is None:
        raise NativeBuildError(f"native kernel {name}: no C++ compiler ({env.cxx()} is not on the PATH; install g++ or set CXX)")
    cache = env.cache_dir() / "native"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        library = cache / f"{name}-{_key(name, compiler)}.so"
        if not library.exists():
            with _lock(cache / f"{name}.lock", name):
                if not library.exists():  # another process may have built it while this one waited
                    _compile(name, compiler, library)
    except OSError as error:
        raise NativeBuildError(f"native kernel {name}: {error}; RWKV_CACHE_DIR chooses another place to build in") from None
    return library


def _registers(name: str) -> bool:
    """Whether the folder registers operators with torch."""
    return (SOURCE_DIR / name / "op.cpp").exists()


def _key(name: str, compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIME_OUT).stdout
    torch_version = importlib.metadata.version("torch") if _registers(name) else "none"
    facts = [version, platform.machine(), torch_version, *FLAGS, *env.cxx_flags(), repr(INSTRUCTION_SETS)]
    digest = hashlib.sha256("\n".join(facts).encode())
    for folder in ("common", name):
        for source in sorted(p for p in (SOURCE_DIR / folder).glob("*") if p.suffix in (".cpp", ".h")):
            digest.update(f"\n{source.name}\n".encode() + source.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _lock(path: Path, name: str) -> Iterator[None]:
    """One builder at a time; on a file system without locks two may build the same thing, and the last rename wins."""
    with open(path, "a+") as file:
        deadline, told = time.monotonic() + TIME_OUT, False
        while not try_lock(file):
            file.seek(0)
            holder = file.read().strip() or "unknown"
            if time.monotonic() > deadline:
                raise NativeBuildError(f"native kernel {name}: process {holder} has been building it for over {TIME_OUT:.0f} s; stop it, then start again")
            if not told:
                print(f"waiting for process {holder}, which builds native kernel {name}", file=sys.stderr, flush=True)
                told = True
            time.sleep(0.1)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
        file.truncate(0)


def _compile(name: str, compiler: str, library: Path) -> None:
    sources = sorted((SOURCE_DIR / name).glob("*.cpp"))
    if not sources:
        raise NativeBuildError(f"native kernel {name}: no sources in {SOURCE_DIR / name}; install the repository with pip install -e .")
    for leftover in library.parent.glob(f"{name}-*.building"):
        shutil.rmtree(leftover, ignore_errors=True)
    print(f"building native kernel {name} (once, about 10 s)", file=sys.stderr, flush=True)
    work = Path(tempfile.mkdtemp(prefix=f"{name}-", suffix=".building", dir=library.parent))
    try:
        common, linked = [compiler, *FLAGS], []
        if _registers(name):
            root = Path(importlib.util.find_spec("torch").origin).parent
            common.append(f"-I{root / 'include'}")
            linked = [f"-L{root / 'lib'}", "-ltorch_cpu"]
        jobs = []
        for source in sources:
            variants = INSTRUCTION_SETS if source.name == "cpu.cpp" else {"": []}
            for isa, flags in variants.items():
                define = [f"-DISA={isa}", *flags] if isa else []
                target = work / f"{source.stem}{isa}.o"
                jobs.append((target, [*common, *define, *env.cxx_flags(), "-c", str(source), "-o", str(target)]))
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(lambda job: _run(name, job[1]), jobs))
        objects = [str(target) for target, _ in jobs]
        built = work / "built.so"
        _run(name, [compiler, "-shared", *env.cxx_flags(), *objects, "-o", str(built), *linked])
        os.replace(built, library)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(name: str, command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_OUT)
    except subprocess.TimeoutExpired:
        raise NativeBuildError(f"native kernel {name}: the compiler took longer than {TIME_OUT:.0f} s") from None
    if done.returncode:
        raise NativeBuildError(f"native kernel {name} does not compile: {_one_line(done.stderr)}")


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return next((line for line in lines if "error" in line), lines[0])[:300]
