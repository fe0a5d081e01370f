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

from requirements_met import lacking  # beside the package: the shell runs it before anything is installed

from ..config import UserError, env
from ..config.errors import pip_install
from ..config.volume import volume
from .flags import Parser
from .machine import check_torch_sees_gpus, listed_gpus

ROOT = Path(__file__).resolve().parents[3]
REQUIREMENTS = ROOT / "requirements.txt"
SPACE = 20 << 30  # bytes free that a run should find: states of a small model
PROBE = 64 << 20  # bytes written to time the disk
SLOW = 50e6  # bytes a second
RANKS_TIMEOUT = 120.0  # seconds
AGAIN = "set RWKV_CACHE_DIR to an empty folder to build it again"  # it may lie where nothing can be deleted
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


def unmet() -> list[str]:
    """What of requirements.txt this interpreter lacks, or has in another version: each with the reason."""
    return lacking(REQUIREMENTS.read_text().splitlines())


def python() -> str:
    if sys.version_info < (3, 10):  # noqa: UP036  (started by hand, under whatever Python there is)
        raise UserError(f"Python {sys.version.split()[0]} is too old; use 3.10 or newer")
    if missing := unmet():
        raise UserError(f"{sys.executable} lacks {', '.join(missing)}; run: {pip_install(f'-r {REQUIREMENTS}')}")
    import torch

    return f"{sys.version.split()[0]}, torch {torch.__version__}"


def compiler() -> str:
    path = shutil.which(env.cxx())
    if path is None:
        raise UserError(f"{env.cxx()} is not on the PATH: everything runs in plain PyTorch, slower; apt-get install g++, or set CXX")
    return subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout.partition("\n")[0]


def gpu() -> str:
    if not listed_gpus():
        return "none (nvidia-smi -L, /dev/nvidia*): training runs on the CPU"
    import torch

    count = check_torch_sees_gpus()
    return f"{count} x {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"


def nvcc() -> str:
    """nvcc compiles the CUDA kernels. Its CUDA release need not be torch's, but the driver must run it, which shows when they are built."""
    if not listed_gpus():
        return "not needed: there is no GPU"
    import torch

    from .. import native

    path = native.nvcc()
    if path is None:
        raise UserError(f"not found: wkv7 runs in plain PyTorch, much slower; {native.nvcc_cure()}")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout.split("release ")[-1].partition(",")[0]
    other = version.partition(".")[0] != (torch.version.cuda or "").partition(".")[0]
    why = f"torch's is {torch.version.cuda}" if other else "of PyPI, not a whole toolkit" if native.toolkits_around(path) else ""
    return f"CUDA {version}" + f"; {why}, so DeepSpeed's FusedAdam does not build and torch's AdamW takes its place" * bool(why)


def kernel_wkv7() -> str:
    import torch

    from ..ops.wkv7 import backend_for, wkv7, wkv7_reference

    device = _device()
    inputs = [_random(1, 70, 2, 64, seed=n).bfloat16().float() * 0.3 for n in range(6)]
    wanted = _answers(lambda *x: wkv7_reference(*x, None)[0], inputs, torch.device("cpu"))
    said = _compared("wkv7", backend_for(device, torch.float32), device, _answers(wkv7, inputs, device), wanted)
    if device.type == "cuda":  # bf16 has kernels of its own, on the tensor cores
        _compared("wkv7", backend_for(device, torch.bfloat16), device, _answers(wkv7, inputs, device, torch.bfloat16), wanted, 3e-2)
    return said


def kernel_wkv4() -> str:
    import torch

    from ..ops.wkv4 import backend_for, wkv4, wkv4_reference

    device = _device()
    inputs = [_random(32, seed=1), _random(32, seed=2), _random(2, 70, 32, seed=3), _random(2, 70, 32, seed=4)]
    wanted = _answers(lambda w, *x: wkv4_reference(-torch.exp(w), *x)[0], inputs, torch.device("cpu"))
    return _compared("wkv4", backend_for(device, torch.float32, 32), device, _answers(wkv4, inputs, device), wanted)


def kernel_rosa() -> str:
    import torch

    from ..ops import backend
    from ..ops.rosa import backend_for, rosa

    def answers(device: torch.device) -> list:
        return _answers(
            lambda *x: rosa(*x, bits=2, tau=0.1),
            [_random(2, 40, 8, seed=n) for n in range(3)] + [_random(8, seed=3), _random(8, seed=4)],
            device,
        )

    device = _device()
    with backend.asked_for("torch"):
        wanted = answers(torch.device("cpu"))
    return _compared("rosa", backend_for(device, torch.float32), device, answers(device), wanted)


def kernel_loss() -> str:
    import torch

    from ..ops.cross_entropy import backend_for, head_cross_entropy
    from ..ops.cross_entropy.reference import head_cross_entropy as reference

    device = _device()
    inputs = [_random(100, 64), _random(300, 64)]

    def answers(form: Callable, device: torch.device) -> list:
        return _answers(lambda *x: form(*x, torch.arange(100, device=device) * 3), inputs, device)

    return _compared(
        "loss", backend_for(device, torch.float32, 64), device, answers(head_cross_entropy, device), answers(reference, torch.device("cpu"))
    )


def kernel_fused() -> str:
    import torch

    from ..ops import fused
    from ..ops.fused import reference

    device = _device()
    inputs = [_random(2, 33, 96), _random(2, 33, 96, seed=2), _random(1, 1, 96), _random(3, 32)]

    def answers(form, device: torch.device) -> list:
        """All four operators, one after the other."""

        def block(x, v_first, vector, r_k):
            mixes = [vector, 1 - vector, 2 * vector, 2 - vector, vector, vector]  # six, as in a model: what the kernel of a GPU takes
            w, k, a, v, *_ = form.token_mix(x, None, mixes)
            w, k, a, b, v, _ = form.time_mix_inputs(w, k, a, v, v_first, x, *[vector] * 5, 32)
            return form.relu_square(form.time_mix_output(w, a, k, v, b, vector.flatten(), vector.flatten(), r_k, 64e-5))

        return _answers(block, inputs, device)

    return _compared(
        "fused", fused.backend_for(device, (torch.float32,), 96), device, answers(fused, device), answers(reference, torch.device("cpu"))
    )


def kernel_adamw() -> str:
    import torch

    from ..ops import adamw
    from ..ops.adamw import reference

    def answers(form, dtype: torch.dtype, device: torch.device) -> list:
        master, grad, average, square = (_random(33, 65, seed=n).to(device, dtype) for n in range(4))
        form.adamw_(
            [master], [], [grad], [average], [square.square_()], [torch.tensor(7.0, device=device)], None, None, 0.5, 0.9, 0.99, 1e-18, 0.1
        )
        return [t.cpu() for t in (master, average, square, form.gradient_norms([grad]))]

    device = _device()
    made_by, wanted = adamw.backend_for(device), answers(reference, torch.float64, torch.device("cpu"))
    return _compared("adamw", made_by, device, answers(adamw, torch.float32, device), wanted)


def kernel_rwkv7_step() -> str:
    import torch

    from ..config import ModelConfig
    from ..models import build
    from ..ops import backend, rwkv7_step

    if reason := rwkv7_step.why_not():
        raise UserError(f"text is generated by plain PyTorch, slower: {reason}")
    model = build(ModelConfig(n_layer=2, n_embd=64, head_size=32, vocab_size=100))
    with torch.no_grad(), backend.asked_for("torch"):
        for n, parameter in enumerate(model.parameters()):
            parameter.copy_(_random(*parameter.shape, seed=n) / parameter.shape[-1] ** 0.5)
        _, state = model(torch.tensor([[1, 2, 3]]), return_state=True)
        logits, after = model(torch.tensor([[4]]), state, return_state=True)
        got = rwkv7_step.Rwkv7Step(model.state_dict(keep_vars=True), 2, 32)(model.emb.weight[4], *map(list, zip(*state)))
    return _compared("rwkv7_step", "cpu", torch.device("cpu"), list(got), [logits[0, 0], *map(torch.stack, zip(*after))])


def kernel_tokenizer() -> str:
    from ..data.tokenizer import NativeWorldTokenizer, WorldTokenizer, vocabulary_path

    path = vocabulary_path()
    native, plain = NativeWorldTokenizer(path), WorldTokenizer(path)
    text = "".join(map(chr, range(32, 0xD800, 7))) + " the same ids" * 9
    if native.encode(text) != plain.encode(text):
        raise UserError(f"C++ differs from the reference; {AGAIN}")
    return f"C++, the ids of the reference for {len(text)} characters"


# every folder of cuda/ with sources of its own, by its name
KERNELS = {
    "wkv7": kernel_wkv7, "wkv4": kernel_wkv4, "rosa": kernel_rosa, "loss": kernel_loss, "fused": kernel_fused, "adamw": kernel_adamw,
    "rwkv7_step": kernel_rwkv7_step, "tokenizer": kernel_tokenizer,
}  # fmt: skip


def _device():
    """That of the kernels which are written for both."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _random(*shape: int, seed: int = 1):
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _answers(form: Callable, inputs: list, device, dtype=None) -> list:
    """What an operator makes of the inputs, and the gradients that reach them."""
    import torch

    given = [x.to(device, dtype, copy=True).requires_grad_() for x in inputs]
    y = form(*given)
    return [t.detach().float().cpu() for t in (y, *torch.autograd.grad(y.float().square().sum(), given))]


def _compared(name: str, made_by: str, device, got: list, wanted: list, limit: float = 1e-3) -> str:
    from .. import native
    from ..ops.backend import BACKENDS

    worst = max(((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in zip(got, wanted, strict=True))
    if not worst < limit:
        raise UserError(f"{made_by} differs from the reference by {worst:.0e}; {AGAIN}, or use --kernel torch")
    if made_by == "torch":
        built, reason = (native.cuda_available if device.type == "cuda" else native.available)(name)
        if not built:
            raise UserError(f"runs in plain PyTorch, slower: {reason}")
    return f"{BACKENDS[made_by]}, largest deviation from the reference {worst:.0e}"


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
    cure = (
        "NCCL_DEBUG=INFO says more; try NCCL_P2P_DISABLE=1"
        if backend == "nccl"
        else "a firewall on the loopback device, or a broken host name (GLOO_SOCKET_IFNAME=lo)?"
    )
    try:
        said = [process.communicate(timeout=RANKS_TIMEOUT)[1] for process in started]
    except subprocess.TimeoutExpired:
        raise UserError(f"{world} processes over {backend} do not come together within {RANKS_TIMEOUT:.0f} s; {cure}") from None
    finally:
        for process in started:
            process.kill()
    for process, error in zip(started, said):
        if process.returncode:
            raise UserError(f"{world} processes over {backend} fail: {(error.strip().splitlines() or ['no message'])[-1][:200]}; {cure}")
    return f"{world} processes over {backend} add up, in {time.monotonic() - begin:.1f} s with their start"


def disk(folder: Path) -> str:
    from ..checkpoint.place import nearest

    place = folder.absolute()
    try:
        place = nearest(place)
        free = shutil.disk_usage(place).free
        with tempfile.TemporaryFile(dir=place) as file:
            begin = time.monotonic()
            file.write(os.urandom(1 << 20) * (PROBE >> 20))
            file.flush()
            os.fsync(file.fileno())
            speed = PROBE / (time.monotonic() - begin)
    except OSError as error:
        raise UserError(f"{place} cannot be written: {error.strerror}; choose another --proj_dir, or change its permissions") from None
    told = f"{volume(free)} free in {place}, {volume(speed)}/s"
    if free < SPACE:
        raise UserError(f"{told}; a training state takes 12 bytes for each parameter, and --keep_last of them are kept: free some space")
    if speed < SLOW:
        raise UserError(f"{told}: slow; saves are written beside the training, but make --save_steps large")
    return told


def locks() -> str:
    """Our own locks end with their process. Those of torch.utils.cpp_extension, with which DeepSpeed builds, are files, and stay."""
    from torch.utils.cpp_extension import get_default_build_root

    root = env.torch_extensions_dir() or Path(get_default_build_root())
    stale = [lock for lock in root.glob("**/lock") if time.time() - lock.parent.stat().st_mtime > STALE]
    if stale:
        raise UserError(
            f"{stale[0]} is left over from a build that was stopped, and the next one waits for it for ever; rm {' '.join(map(str, stale))}"
        )
    return f"none stale in {root} and {env.cache_dir()}"


def main(argv: list[str]) -> int:
    """Exit code 0 when everything is well, 1 otherwise."""
    parser = Parser(prog="python -m rwkvlm doctor", description="Is this machine ready to train? One line each, ok or the cure.")
    parser.add_argument("--proj_dir", type=Path, default=Path("out"), help="where runs will be kept [out]")
    folder = parser.parse_args(argv).proj_dir
    checks = {
        "python": python,
        "compiler": compiler,
        "gpu": gpu,
        "nvcc": nvcc,
        **KERNELS,
        "ranks": ranks,
        "disk": lambda: disk(folder),
        "locks": locks,
    }
    well = True
    for name, check in checks.items():
        try:
            print(f"ok    {name:10} {check()}", flush=True)
        except Exception as error:  # a machine may be ill in any way; each deserves its line
            well = False
            if isinstance(error, ModuleNotFoundError):  # the first line has the cure
                print(f"-     {name:10} not looked at: {sys.executable} has no {error.name}", flush=True)
                continue
            print(f"CURE  {name:10} {(str(error).splitlines() or [type(error).__name__])[0]}", flush=True)
    return 0 if well else 1
