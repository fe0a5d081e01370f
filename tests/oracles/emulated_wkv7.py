"""The CUDA kernels of cuda/wkv7 on the host: g++ compiles the real sources under cuda/emulation, ctypes calls their entry points."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkvlm.ops.wkv7 import wkv7_reference
from rwkvlm.ops.wkv7.arguments import NAMES
from rwkvlm.ops.wkv7.cuda import Machine, machine_over

CUDA = Path(__file__).resolve().parents[2] / "cuda"
SOURCES = sorted(x for folder in ("common", "wkv7") for x in (CUDA / folder).glob("*.cu"))
AROUND = sorted(x for x in CUDA.glob("*/*.cu") if x.parent.name != "wkv7")  # common too, of which every library has a copy
RACES = "-fsanitize=thread"  # the flag with which the emulation finds races
GUARD = 64  # bytes behind each buffer that no kernel may touch


@dataclass
class Case:
    """Inputs [B, T, H, N] in the kernel's dtype, the gradients that come in, and what float64 makes of them."""

    inputs: list[Tensor]
    dy: Tensor
    initial_state: Tensor | None = None
    d_final_state: Tensor | None = None
    cu_seqlens: Tensor | None = None
    segment_chunks: int = 0  # of the chunked kernels' scans
    more: tuple[Tensor | None, ...] = (None, None, None)  # what other uses of r, k and v give

    def expected(self) -> dict[str, Tensor]:
        inputs = [x.double().requires_grad_() for x in self.inputs]
        sequences = self.inputs[0].shape[0] if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        B, T, H, N = self.inputs[0].shape
        state = torch.zeros(sequences, H, N, N, dtype=torch.float64) if self.initial_state is None else self.initial_state.double()
        state.requires_grad_()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # thousands of tiny operations: threads would only wait for one another
        y, final_state = wkv7_reference(*inputs, state, self.cu_seqlens)
        outputs, slopes = [y], [self.dy.double()]
        if self.d_final_state is not None:
            outputs, slopes = outputs + [final_state], slopes + [self.d_final_state.double()]
        gradients = [*torch.autograd.grad(outputs, [*inputs, state], slopes)]
        torch.set_num_threads(threads)
        for i, more in zip((0, 2, 3), self.more):
            gradients[i] = gradients[i] if more is None else gradients[i] + more.double()
        return {"y": y.detach(), "final_state": final_state.detach(), **dict(zip([f"d{n}" for n in (*NAMES, "_initial_state")], gradients))}


def make_case(
    T: int,
    N: int = 64,
    B: int = 1,
    H: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    states: bool = True,
    documents: list[int] | None = None,
    kind: str = "normal",
    seed: int = 0,
    segment_chunks: int = 0,
    more: str = "",
) -> Case:
    """Inputs, states and gradients of a call, drawn from a seed.

    kind: normal | slow (little decays, little is removed: the state lasts for thousands of tokens) | clamp (the fastest decay,
    w = +8) | repeated (keys with a cosine >= 0.99 and a rate >= 0.9, slow decay). more: of which tensors there are gradients
    from elsewhere, "rkv" at most.
    """
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    r, w, k, v, keys, rate = (normal(B, T, H, N) for _ in range(6))
    w, rate = 2 * w - 2, torch.sigmoid(rate)
    if kind == "slow":
        w, rate = w - 6, rate / 20
    if kind == "clamp":
        w = torch.full_like(w, 8.0)
    if kind == "repeated":
        keys = normal(1, 1, H, N) + 0.03 * keys
        w, rate = w - 3, 0.9 + 0.1 * rate
    keys = torch.nn.functional.normalize(keys, dim=-1)
    if kind == "repeated":
        assert torch.einsum("bthn,bshn->bhts", keys, keys).min() >= 0.99
    inputs = [x.to(dtype) for x in (r, w, k if kind != "repeated" else 8 * keys, v, -keys, keys * rate)]
    bounds = None if documents is None else torch.tensor([0, *documents]).cumsum(0).to(torch.int32)
    sequences = B if bounds is None else len(bounds) - 1
    state = (lambda: (normal(sequences, H, N, N)).float()) if states else (lambda: None)
    case = Case(inputs, normal(B, T, H, N).to(dtype), state(), state(), bounds, segment_chunks)
    case.more = tuple((8 * normal(B, T, H, N)).to(dtype) if name in more else None for name in "rkv")
    return case


# Of 100 tokens in two documents: beyond the end, before the beginning, falling.
WRONG_BOUNDS = [0, 70, 300], [-90, 30, 100], [0, 90, 30], [100, 0, 100], [200, -100, 5]


def with_bounds(case: Case, bounds: list[int]) -> Case:
    """The case with other ends of its documents, right or not."""
    return replace(case, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


class Buffers:
    """Memory for kernels, filled with NaN, with a guard behind each piece."""

    def __init__(self) -> None:
        self.storages: list[Tensor] = []

    def new(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(size).numel() * dtype.itemsize
        self.storages.append(torch.full((count + GUARD,), 0xFF, dtype=torch.uint8))
        return self.storages[-1][:count].view(dtype).view(size)

    def check(self) -> None:
        assert all((b[-GUARD:] == 0xFF).all() for b in self.storages), "a kernel wrote behind its buffer"


def pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


class Shape(ctypes.Structure):
    """Wkv7Shape of cuda/wkv7/api.cuh."""

    _fields_ = [(n, ctypes.c_int32) for n in ("B", "T", "H", "N", "documents")] + [
        ("cu_seqlens", ctypes.c_void_p),
        ("segment_chunks", ctypes.c_int32),
    ]


class Pointers(ctypes.Structure):
    """Wkv7Inputs: six tensors and a state."""

    _fields_ = [(n, ctypes.c_void_p) for n in (*NAMES, "state")]


class Gradients(Pointers):
    """Wkv7Gradients: six tensors and a state to write, and those that r, k and v have from elsewhere."""

    _fields_ = [(f"more_{n}", ctypes.c_void_p) for n in ("dr", "dk", "dv")]


class StepsOfTtt(ctypes.Structure):
    """Wkv7Steps."""

    _fields_ = [(n, ctypes.c_int32) for n in ("rows", "hidden", "segment", "stored")] + [
        ("rate", ctypes.c_void_p),
        ("head", ctypes.c_void_p),
    ]


def prototypes(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, told the types of its functions: addresses would be cut to 32 bits otherwise."""
    shape, inputs, out, steps = (ctypes.POINTER(kind) for kind in (Shape, Pointers, Gradients, StepsOfTtt))
    place = ctypes.c_void_p
    types = {
        "sequential_forward": [shape, ctypes.c_int, inputs, place, place, place, place],
        "sequential_backward": [shape, ctypes.c_int, inputs, place, place, place, out, place],
        "chunked_forward": [shape, inputs, place, place, place, place, place],
        "chunked_backward": [shape, inputs, place, place, place, out, place, place],
        "ttt_forward": [shape, inputs, steps, place, place, place, place, place],
        "ttt_backward": [shape, inputs, steps, place, place, place, out, place, place, place],
    }
    for name, arguments in types.items():
        getattr(library, f"wkv7_{name}").argtypes = arguments
    for name in ("sequential_saved", "chunked_saved", "chunked_forward_scratch", "chunked_backward_scratch"):
        function = getattr(library, f"wkv7_{name}_bytes")
        function.argtypes, function.restype = [shape], ctypes.c_int64
    for function in (library.wkv7_ttt_saved_bytes, library.wkv7_ttt_backward_scratch_bytes):
        function.argtypes, function.restype = [shape, steps], ctypes.c_int64
    return library


def emulated_machine(library: ctypes.CDLL) -> Machine:
    """As an H100 or H200."""
    return machine_over(library, torch.device("cpu"), (9, 0), 132)


class Kernels:
    """One library of emulated kernels. `run` calls forward and backward with every buffer poisoned, and checks guards and error codes."""

    def __init__(self, path: Path) -> None:
        self.library = prototypes(ctypes.CDLL(str(path)))
        self.library.emulation_error.restype = ctypes.c_char_p

    def call(self, name: str, *arguments) -> None:
        code = getattr(self.library, name)(*arguments)
        assert code == 0, f"{name} returned {code}: {self.library.emulation_error().decode()}"

    def run(self, kernel: str, case: Case, backward: bool = True, reverse: bool = False) -> dict[str, Tensor]:
        """kernel: "sequential" or "chunked". Returns y, final_state and, with backward, the gradients."""
        r = case.inputs[0]
        B, T, H, N = r.shape
        documents = 0 if case.cu_seqlens is None else len(case.cu_seqlens) - 1
        shape = Shape(B, T, H, N, documents, case.cu_seqlens.data_ptr() if documents else None, case.segment_chunks)
        buffers = Buffers()

        def workspace(name: str) -> Tensor:
            return buffers.new((getattr(self.library, f"wkv7_{kernel}_{name}_bytes")(shape),), torch.uint8)

        self.library.emulation_reverse(int(reverse))
        states = (documents or B, H, N, N)
        y, final_state = buffers.new(r.shape, r.dtype), buffers.new(states, torch.float32)
        saved = workspace("saved") if backward or kernel == "chunked" else None
        inputs = Pointers(*(x.data_ptr() for x in case.inputs), pointer(case.initial_state))
        head = [shape] + ([int(r.dtype == torch.float32)] if kernel == "sequential" else []) + [inputs]
        scratch = [pointer(workspace("forward_scratch"))] if kernel == "chunked" else []
        self.call(f"wkv7_{kernel}_forward", *head, pointer(y), pointer(final_state), pointer(saved), *scratch, None)
        results = {"y": y, "final_state": final_state}
        if backward:
            gradients = {f"d{n}": buffers.new(r.shape, r.dtype) for n in NAMES}
            gradients["d_initial_state"] = buffers.new(states, torch.float32)
            out = Gradients(*(x.data_ptr() for x in gradients.values()), *map(pointer, case.more))
            scratch = [pointer(workspace("backward_scratch"))] if kernel == "chunked" else []
            self.call(f"wkv7_{kernel}_backward", *head, pointer(saved), pointer(case.dy), pointer(case.d_final_state), out, *scratch, None)
            results.update(gradients)
        buffers.check()
        return results


def compile_kernels(folder: Path, *flags: str, sources: list[Path] = SOURCES) -> Path:
    """g++ over every kernel source, into one library."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    # The pattern fills uninitialised locals: reading one gives the same garbage on each run.
    command = ["g++", "-std=c++17", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ftrivial-auto-var-init=pattern", *flags]

    def compiled(source: Path) -> Path:
        run([*command, "-x", "c++", "-c", str(source), "-o", str(folder / f"{source.stem}.o")])
        return folder / f"{source.stem}.o"

    def run(arguments: list[str]) -> None:
        build = subprocess.run(arguments, capture_output=True, text=True, timeout=600)
        assert build.returncode == 0 and "warning" not in build.stderr, build.stderr

    with ThreadPoolExecutor(2) as pool:
        objects = [str(x) for x in pool.map(compiled, sources)]
    linked = [flag for flag in flags if flag != RACES]  # races.h is its runtime
    run(["g++", "-shared", *linked, *objects, "-o", str(folder / "kernels.so")])
    return folder / "kernels.so"


def separate(case: Case) -> Iterator[tuple[Case, slice]]:
    """Each document of a packed case as a case of its own, with its tokens."""
    bounds = case.cu_seqlens.tolist()
    for i, (start, end) in enumerate(zip(bounds, bounds[1:])):
        tokens = slice(start, end)
        pieces = [x[:, tokens].contiguous() for x in (*case.inputs, case.dy)]
        yield Case(pieces[:-1], pieces[-1], case.initial_state[i : i + 1], case.d_final_state[i : i + 1], None, case.segment_chunks), tokens


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative rms error of each result; NaN where a NaN is left."""
    rms = lambda x: x.double().square().mean().sqrt()
    return {name: (rms(x.double() - expected[name]) / rms(expected[name]).clamp_min(1e-30)).item() for name, x in got.items()}


def run_sanitized(program: str) -> subprocess.CompletedProcess:
    """A Python program in a process of its own, into which libraries built with -fsanitize=address can be loaded."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    environment = {**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=600)
