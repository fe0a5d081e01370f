"""A GPU that computes on the CPU: `python tests/fake_gpu/run.py COMMAND...` runs COMMAND with it. For what else runs on a GPU only.

torch has to be a build for CUDA 13 (2.11 and 2.13 tried), as it is on a login node; that toolkit's headers are needed (CUDA_HOME,
/usr/local/cuda), a driver or a GPU is not. Allocator, streams, events, graphs, dispatch, autograd's threads, DDP, DeepSpeed
and NCCL's calls are torch's own: runtime.cpp, libraries.cpp and operators.cpp stand below them. The package's kernels are
those of cuda/ in emulation. It says nothing about speed; torch.compile, attention's own kernels and opcheck do not work with
it.

    python tests/fake_gpu/run.py python -m pytest tests/cuda -k gpu
    FAKE_GPUS=2 FAKE_GPU_LAZY=1 PYTHON=$(which python) DATA=data/my N_LAYER=2 N_EMBD=128 CTX_LEN=64 M_BSZ=2 GPU_PER_NODE=2 \
        python tests/fake_gpu/run.py ./demo-training-run.sh
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[1] / "cuda"
HEADERS = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-shared", "-w", "-Wl,--unresolved-symbols=ignore-all"]  # what is missing is in the process
DRIVER = """
int cuCtxGetCurrent(void** context) { *context = (void*)1; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) { *flags = 0; *active = 1; return 0; }
int cuGetErrorString(int error, const char** text) { *text = "an error of the fake GPU"; return 0; }
"""
NVIDIA_SMI = """#!/bin/sh
i=0
while [ $i -lt ${FAKE_GPUS:-1} ]; do echo "GPU $i: fake"; i=$((i + 1)); done
"""


def build(folder: Path) -> None:
    """Everything that `environment` names."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "nvidia-smi").write_text(NVIDIA_SMI)
    (folder / "bin" / "nvidia-smi").chmod(0o755)
    functions = set(re.findall(r"\bcu[A-Z]\w+", (HEADERS / "cuda.h").read_text()))  # what is none does no harm
    known = set(re.findall(r"^int (\w+)", DRIVER, re.MULTILINE))
    (folder / "driver.c").write_text(DRIVER + "".join(f"int {name}() {{ return 0; }}\n" for name in sorted(functions - known)))

    def compile_it(*arguments: str | Path) -> None:
        subprocess.run(["g++", *FLAGS, *map(str, arguments)], check=True)

    of_torch = [
        f"-I{TORCH / 'include'}",
        f"-I{TORCH / 'include/torch/csrc/api/include'}",
        f"-L{TORCH / 'lib'}",
        "-lc10",
        "-lc10_cuda",
        "-ltorch_cpu",
    ]
    jobs = [
        (HERE / "runtime.cpp", HERE / "libraries.cpp", f"-I{HEADERS}", "-o", folder / "runtime.so"),
        (HERE / "operators.cpp", f"-I{HEADERS}", *of_torch, "-o", folder / "operators.so"),
    ]
    for kernels in sorted({source.parent for source in CUDA.glob("*/*.cu")} - {CUDA / "common"}):
        jobs.append(("-x", "c++", *kernels.glob("*.cu"), CUDA / "common" / "library.cu", "-o", folder / f"{kernels.name}.so"))
    subprocess.run(
        ["gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", folder / "driver.c", "-o", folder / "libcuda.so.1"], check=True
    )
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda arguments: compile_it(*arguments), jobs))


def environment(folder: Path) -> dict[str, str]:
    first = lambda name, path: {name: os.pathsep.join(filter(None, (str(path), os.environ.get(name))))}
    return {
        **os.environ,
        **first("PATH", folder / "bin"),
        **first("PYTHONPATH", HERE),
        **first("LD_LIBRARY_PATH", folder),
        "LD_PRELOAD": str(folder / "runtime.so"),
        "FAKE_GPU_BUILT": str(folder),
    }


def main() -> None:
    if not (torch.version.cuda or "").startswith("13.") or len(sys.argv) < 2:  # runtimes before name their functions otherwise
        sys.exit(f"usage: {Path(sys.argv[0]).name} COMMAND..., with a torch that is built for CUDA 13; this one is {torch.__version__}")
    sources = sorted([*HERE.iterdir(), *CUDA.rglob("*")])
    digest = hashlib.sha256(
        "".join([torch.__version__, *(f"{x.name}{x.read_bytes()}" for x in sources if x.is_file())]).encode()
    ).hexdigest()[:16]
    folder = Path(os.environ.get("RWKV_CACHE_DIR") or Path.home() / ".cache" / "rwkvlm") / f"fake-gpu-{digest}"
    if not folder.exists():
        print("building the fake GPU (once, a minute)", file=sys.stderr)
        part = folder.with_suffix(f".{os.getpid()}")
        build(part)
        try:
            part.rename(folder)
        except OSError:  # another start was faster
            shutil.rmtree(part)
    os.execvpe(sys.argv[1], sys.argv[1:], environment(folder))


if __name__ == "__main__":
    main()
