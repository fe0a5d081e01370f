"""`python -m rwkvlm doctor`: is this machine ready to train? One line each, ok or the cure."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ..config import UserError, env
from .flags import Parser
from .machine import check_torch_sees_gpus, listed_gpus

SPACE = 20 << 30  # bytes free that a run should find: states of a small model
PROBE = 64 << 20  # bytes written to time the disk
SLOW = 50e6  # bytes a second
RANKS_TIMEOUT = 120.0  # seconds
STALE = 600.0  # seconds without a change after which a lock of torch's builder holds nobody's work

RANK = """
import sys, datetime, torch, torch.distributed as dist
backend, port, rank, world = sys.argv[1], *map(int, sys.argv[2:])
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
x = torch.full((1 << 20,), float(rank + 1), device=device)
dist.all_reduce(x)
assert x.eq(world * (world + 1) / 2).all()
dist.destroy_process_group()
"""


class Sick(Exception):
    """What is wrong, and the cure."""


def python() -> str:
    import torch

    if sys.version_info < (3, 10):
        raise Sick(f"Python {sys.version.split()[0]} is too old; use 3.10 or newer")
    return f"{sys.version.split()[0]}, torch {torch.__version__}"


def compiler() -> str:
    path = shutil.which(env.cxx())
    if path is None:
        raise Sick(f"{env.cxx()} is not on the PATH: everything runs in plain PyTorch, slower; apt-get install g++, or set CXX")
    return subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout.partition("\n")[0]


def gpu() -> str:
    if not listed_gpus():
        return "none (nvidia-smi lists no GPU): training runs on the CPU"
    import torch

    try:
        count = check_torch_sees_gpus()
    except UserError as error:
        raise Sick(str(error)) from None
    return f"{count} x {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"


def nvcc() -> str:
    """nvcc compiles the CUDA kernels. It need not be of torch's CUDA release, the driver alone must know its: that is seen when they are built."""
    if not listed_gpus():
        return "not needed: there is no GPU"
    import torch

    from .. import native

    path = native.nvcc()
    if path is None:
        raise Sick(f"not found: wkv7 runs in plain PyTorch, much slower; install the CUDA toolkit {torch.version.cuda}, or set CUDA_HOME")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout.split("release ")[-1].partition(",")[0]
    other = version.partition(".")[0] != (torch.version.cuda or "").partition(".")[0]
    return f"CUDA {version}" + f"; torch's is {torch.version.cuda}, so DeepSpeed's FusedAdam does not build and torch's AdamW takes its place" * other


def kernel_wkv7() -> str:
    import torch

    from .. import native
    from ..ops.wkv7 import backend_for, wkv7, wkv7_reference

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def run(form: Callable, device: torch.device, dtype: torch.dtype) -> list:
        inputs = [torch.randn(1, 70, 2, 64, generator=torch.Generator().manual_seed(n)) * 0.3 for n in range(6)]
        given = [x.bfloat16().to(device, dtype).requires_grad_() for x in inputs]
        y = form(*given)
        y = y[0] if isinstance(y, tuple) else y
        return [t.float().cpu() for t in (y, *torch.autograd.grad(y.float().square().sum(), given))]

    wanted = run(lambda *x: wkv7_reference(*x, None), torch.device("cpu"), torch.float32)
    built = native.cuda_available if device.type == "cuda" else native.available
    said = _compared("wkv7", backend_for(device, torch.float32), run(wkv7, device, torch.float32), wanted, built)
    if device.type == "cuda":  # bf16 has kernels of its own, on the tensor cores
        _compared("wkv7", backend_for(device, torch.bfloat16), run(wkv7, device, torch.bfloat16), wanted, built, 3e-2)
    return said


def kernel_loss() -> str:
    import torch

    from ..ops.cross_entropy import _form, head_cross_entropy
    from ..ops.cross_entropy.reference import head_cross_entropy as reference

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, weight = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)) for shape in ((100, 64), (300, 64)))
    targets = torch.arange(100) * 3

    def run(form: Callable, device: torch.device) -> list:
        given = [t.to(device).requires_grad_() for t in (x, weight)]
        loss = form(*given, targets.to(device))
        return [t.cpu() for t in (loss, *torch.autograd.grad(loss, given))]

    made_by = "cpu" if _form(device, torch.float32, 64).__name__.endswith("native") else "torch"
    from .. import native

    return _compared("loss", made_by, run(head_cross_entropy, device), run(reference, torch.device("cpu")), native.available)


def _compared(name: str, made_by: str, got: list, wanted: list, available: Callable[[str], tuple[bool, str]], limit: float = 1e-3) -> str:
    """available: whether the device's own kernel can be had, and why not."""
    worst = max(((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in zip(got, wanted))
    if not worst < limit:
        raise Sick(f"{made_by} differs from the reference by {worst:.0e}; delete {env.cache_dir() / 'native'} to build it again, or use --kernel torch")
    if made_by == "torch":
        built, reason = available(name)
        if not built:
            raise Sick(f"runs in plain PyTorch, slower: {reason}")
    return f"{ {'cpu': 'C++', 'cuda': 'CUDA', 'torch': 'plain PyTorch'}[made_by]}, largest deviation from the reference {worst:.0e}"


def ranks() -> str:
    import torch

    gpus = torch.cuda.device_count()
    backend, world = ("nccl", gpus) if gpus > 1 else ("gloo", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", RANK, backend, str(port)]
    begin = time.monotonic()
    started = [subprocess.Popen([*command, str(rank), str(world)], stderr=subprocess.PIPE, text=True) for rank in range(world)]
    cure = "NCCL_DEBUG=INFO says more; try NCCL_P2P_DISABLE=1" if backend == "nccl" else "a firewall on the loopback device, or a broken host name (GLOO_SOCKET_IFNAME=lo)?"
    try:
        said = [process.communicate(timeout=RANKS_TIMEOUT)[1] for process in started]
    except subprocess.TimeoutExpired:
        raise Sick(f"{world} processes over {backend} do not come together within {RANKS_TIMEOUT:.0f} s; {cure}") from None
    finally:
        for process in started:
            process.kill()
    for process, error in zip(started, said):
        if process.returncode:
            raise Sick(f"{world} processes over {backend} fail: {(error.strip().splitlines() or ['no message'])[-1][:200]}; {cure}")
    return f"{world} processes over {backend} add up, in {time.monotonic() - begin:.1f} s with their start"


def disk(folder: Path) -> str:
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            begin = time.monotonic()
            file.write(os.urandom(1 << 20) * (PROBE >> 20))
            file.flush()
            os.fsync(file.fileno())
            speed = PROBE / (time.monotonic() - begin)
    except OSError as error:
        raise Sick(f"{place} cannot be written: {error.strerror}; choose another --proj_dir, or change its permissions") from None
    told = f"{free / 2**30:.0f} GiB free in {place}, {speed / 1e6:.0f} MB/s"
    if free < SPACE:
        raise Sick(f"{told}; a training state takes 12 bytes for each parameter, and --keep_last of them are kept: free some space")
    if speed < SLOW:
        raise Sick(f"{told}: slow; saves are written beside the training, but make --save_steps large")
    return told


def locks() -> str:
    """Our own locks end with their process. Those of torch.utils.cpp_extension, with which DeepSpeed builds, are files, and stay."""
    from torch.utils.cpp_extension import get_default_build_root

    root = env.torch_extensions_dir() or Path(get_default_build_root())
    stale = [lock for lock in root.glob("**/lock") if time.time() - lock.parent.stat().st_mtime > STALE]
    if stale:
        raise Sick(f"{stale[0]} is left over from a build that was stopped, and the next one waits for it for ever; rm {' '.join(map(str, stale))}")
    return f"none stale in {root} and {env.cache_dir()}"


def main(argv: list[str]) -> int:
    """Exit code 0 when everything is well, 1 otherwise."""
    parser = Parser(prog="python -m rwkvlm doctor", description="Is this machine ready to train? One line each, ok or the cure.")
    parser.add_argument("--proj_dir", type=Path, default=Path("out"), help="where runs will be kept")
    folder = parser.parse_args(argv).proj_dir
    checks = {
        "python": python, "compiler": compiler, "gpu": gpu, "nvcc": nvcc, "wkv7": kernel_wkv7, "loss": kernel_loss,
        "ranks": ranks, "disk": lambda: disk(folder), "locks": locks,
    }  # fmt: skip
    well = True
    for name, check in checks.items():
        try:
            print(f"ok    {name:9} {check()}", flush=True)
        except Exception as error:  # a machine may be ill in any way; each deserves its line
            well = False
            print(f"CURE  {name:9} {(str(error).splitlines() or [type(error).__name__])[0]}", flush=True)
    return 0 if well else 1
