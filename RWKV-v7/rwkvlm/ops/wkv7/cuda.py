"""The CUDA kernels as torch operators: which of them runs, its memory, autograd, and what fake tensors need to know."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkvlm import native

from ..launch import address, given, launch
from .arguments import NAMES, sequence_bounds
from .passing_on import passing_on

TENSOR_CORES = (8, 0)  # the compute capability from which on bf16 products run on them
FEW_PAIRS, MANY_CHUNKS = 64, 64  # of (sequence, head), and in a sequence: where the chunked scans run in segments


class Shape(ctypes.Structure):
    """Wkv7Shape of cuda/wkv7/api.cuh."""

    _fields_ = [(n, ctypes.c_int32) for n in ("B", "T", "H", "N", "documents")] + [("cu_seqlens", ctypes.c_void_p), ("segment_chunks", ctypes.c_int32)]


class Pointers(ctypes.Structure):
    """Wkv7Inputs: six tensors and a state."""

    _fields_ = [(n, ctypes.c_void_p) for n in (*NAMES, "state")]


class Gradients(Pointers):
    """Wkv7Gradients: six tensors and a state to write, and those that r, k and v have from elsewhere."""

    _fields_ = [(f"more_{n}", ctypes.c_void_p) for n in ("dr", "dk", "dv")]


class StepsOfTtt(ctypes.Structure):
    """Wkv7Steps."""

    _fields_ = [(n, ctypes.c_int32) for n in ("rows", "hidden", "segment", "stored")] + [("rate", ctypes.c_void_p), ("head", ctypes.c_void_p)]


class Machine(NamedTuple):
    """Where kernels run."""

    library: ctypes.CDLL
    capability: tuple[int, int]
    multiprocessors: int


@functools.cache
def machine(device: torch.device) -> Machine:
    """The GPU that holds the tensors. Everything here that needs a GPU is in this function: tests put the emulation on the host in its place."""
    if device.type != "cuda":
        raise ValueError(f"wkv7: the CUDA kernels need tensors on a GPU, got {device}")
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return Machine(prototypes(native.cuda_library("wkv7")), torch.cuda.get_device_capability(device), multiprocessors)


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


def why_not(dtype: torch.dtype) -> str:
    """"" when kernels run here on inputs of this dtype (they are then built), else the reason."""
    if dtype not in (torch.bfloat16, torch.float32):
        return f"it takes bfloat16 or float32, not {dtype}"
    return native.cuda_available("wkv7")[1]


def wkv7_cuda(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None,
    pass_on: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """r, w, k, v, a, b [B, T, H, N] bfloat16 or float32, states [.., H, N, N] float32 -> y, final state; with pass_on also r, k, v.

    Only where `why_not` has returned "". The values of cu_seqlens are checked where that takes no waiting for the device: on the CPU.
    On the GPU wrong ones give wrong results, but touch no memory of others.
    """
    if cu_seqlens is not None:
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            sequence_bounds(cu_seqlens, r.shape[1])
        cu_seqlens = cu_seqlens.to(r.device, torch.int32, non_blocking=True)
    inputs = (r, w, k, v, a, b, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    operator = _passing_on if pass_on else torch.ops.rwkvlm.wkv7_cuda_forward
    y, state, _, *passed = operator(*inputs, cu_seqlens, save)
    return y, state, *passed


def form_for(dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """"chunked", on the tensor cores, wherever it can; else "sequential", fp32 arithmetic throughout."""
    return "chunked" if dtype == torch.bfloat16 and capability >= TENSOR_CORES else "sequential"


def chunk_tokens(form: str, N: int) -> int:
    """Tokens from one saved record to the next."""
    if form == "sequential":
        return 16
    return 32 if N == 128 else 64


def segment_chunks(sequences: int, T: int, H: int, N: int, multiprocessors: int) -> int:
    """Chunks of a segment of the chunked scans, 0 where the scans walk whole sequences.

    The rule is argued in docs/wkv7_chunked.md, "Time", and measured at two shapes. Sequences of packed documents count as if each could have all T tokens,
    for their lengths lie on the device.
    """
    pairs, chunks = sequences * H, -(-T // chunk_tokens("chunked", N))
    if pairs > FEW_PAIRS or chunks < MANY_CHUNKS:
        return 0
    at_once = (1 if N == 128 else 4) * multiprocessors  # blocks of a scan
    segments = min(at_once // pairs, chunks // 8)  # no shorter than 8 chunks
    return -(-chunks // segments) if segments >= 4 else 0


def saved_bytes(form: str, B: int, T: int, H: int, N: int, documents: int) -> int:
    """Of what the forward leaves for the backward; documents: 0 without cu_seqlens. The library's own answer, for sizes that are symbols too."""
    C = chunk_tokens(form, N)
    slots = T // C + documents if documents else B * ((T + C - 1) // C)
    if form == "sequential":
        return 4 * N * H * (slots * N + B * T)
    return 2 * H * slots * (2 * N * N + C * N + C * C + 2 * N)


# Defined for every device, so that `machine` alone decides where it runs.
torch.library.define(
    "rwkvlm::wkv7_cuda_forward",
    "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? initial_state, Tensor? cu_seqlens, bool save) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "rwkvlm::wkv7_cuda_backward",
    "(Tensor dy, Tensor? d_final_state, Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? initial_state, Tensor? cu_seqlens,"
    " Tensor saved, bool state_gradient, Tensor? more_dr=None, Tensor? more_dk=None, Tensor? more_dv=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


class Call:
    """One call of the library: where its inputs lie, its shape, its memory."""

    def __init__(self, op: str, tensors: tuple[Tensor, ...], initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
        self.r = r = tensors[0]
        self.at = at = given(op, "r", r)
        if r.dim() != 4 or not r.numel():
            raise ValueError(f"{op}: r must be [B, T, H, N], none of them 0, got {list(r.shape)}")
        B, T, H, N = shape = r.shape
        documents = 0 if cu_seqlens is None else cu_seqlens.numel() - 1
        self.machine = machine(r.device)
        self.form = form_for(r.dtype, self.machine.capability)
        self.states = (documents or B, H, N, N)
        self.saved = saved_bytes(self.form, B, T, H, N, documents)
        segment = segment_chunks(documents or B, T, H, N, self.machine.multiprocessors) if self.form == "chunked" else 0
        self.shape = Shape(B, T, H, N, documents, at("cu_seqlens", cu_seqlens, (documents + 1,), torch.int32), segment)
        self.inputs = Pointers(*[at(name, x, shape) for name, x in zip(NAMES, tensors)], at("initial_state", initial_state, self.states, torch.float32))
        self.dtype = [] if self.form == "chunked" else [int(r.dtype == torch.float32)]

    def arriving(self, saved: Tensor, dy: Tensor, d_final_state: Tensor | None, more: tuple[Tensor | None, ...]) -> tuple[list[int | None], list[int | None]]:
        """What a backward has from elsewhere: the first three, and the gradients to be added to those of r, k and v."""
        if saved.numel() != self.saved:
            raise RuntimeError(f"wkv7: the backward needs what a forward with save has left, {self.saved} bytes, got {saved.numel()}")
        at, shape = self.at, self.r.shape
        first = [at("saved", saved, self.saved, torch.uint8), at("dy", dy, shape), at("d_final_state", d_final_state, self.states, torch.float32)]
        return first, [at("a gradient", x, shape) for x in more]

    def bytes(self, count: int) -> Tensor:
        return self.r.new_empty(count, dtype=torch.uint8)

    def scratch(self, direction: str) -> list[Tensor]:
        if self.form == "sequential":
            return []
        return [self.bytes(getattr(self.machine.library, f"wkv7_chunked_{direction}_scratch_bytes")(self.shape))]

    def run(self, direction: str, *arguments: Tensor | Gradients | int | None) -> None:
        places = [address(x) if isinstance(x, Tensor) else x for x in arguments]
        launch(self.machine.library, f"wkv7_{self.form}_{direction}", self.r.device, self.shape, *self.dtype, self.inputs, *places)


@torch.library.impl("rwkvlm::wkv7_cuda_forward", "CompositeExplicitAutograd")
def _forward(r, w, k, v, a, b, initial_state, cu_seqlens, save):
    call = Call("wkv7", (r, w, k, v, a, b), initial_state, cu_seqlens)
    y, final_state = r.new_empty(r.shape), r.new_empty(call.states, dtype=torch.float32)
    saved = call.bytes(call.saved if save or call.form == "chunked" else 0)
    call.run("forward", y, final_state, saved if len(saved) else None, *call.scratch("forward"))
    return y, final_state, saved if save else call.bytes(0)


@torch.library.impl("rwkvlm::wkv7_cuda_backward", "CompositeExplicitAutograd")
def _backward(dy, d_final_state, r, w, k, v, a, b, initial_state, cu_seqlens, saved, state_gradient, *more):
    call = Call("wkv7_backward", (r, w, k, v, a, b), initial_state, cu_seqlens)
    arrived, more = call.arriving(saved, dy, d_final_state, more)
    gradients = [r.new_empty(r.shape) for _ in range(6)]
    d_initial = r.new_empty(call.states if state_gradient else (0,), dtype=torch.float32)
    out = Gradients(*map(address, gradients), address(d_initial) if state_gradient else None, *more)
    call.run("backward", *arrived, out, *call.scratch("backward"))
    return *gradients, d_initial


@torch.library.register_fake("rwkvlm::wkv7_cuda_forward")
def _fake_forward(r, w, k, v, a, b, initial_state, cu_seqlens, save):
    B, T, H, N = r.shape
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    saved = saved_bytes(form_for(r.dtype, machine(r.device).capability), B, T, H, N, documents) if save else 0
    return r.new_empty(r.shape), r.new_empty(documents or B, H, N, N, dtype=torch.float32), r.new_empty(saved, dtype=torch.uint8)


@torch.library.register_fake("rwkvlm::wkv7_cuda_backward")
def _fake_backward(dy, d_final_state, r, w, k, v, a, b, initial_state, cu_seqlens, saved, state_gradient, *more):
    B, _, H, N = r.shape
    states = (B if cu_seqlens is None else cu_seqlens.shape[0] - 1, H, N, N) if state_gradient else (0,)
    return *(r.new_empty(r.shape) for _ in range(6)), r.new_empty(states, dtype=torch.float32)


def _save(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


@once_differentiable
def _gradients(ctx, dy, d_final_state, _saved, *more):
    *tensors, saved = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    wanted = ctx.needs_input_grad[6]
    *gradients, d_initial = torch.ops.rwkvlm.wkv7_cuda_backward(dy, d_final_state, *tensors, saved, wanted, *more)
    return *gradients, d_initial if wanted else None, None, None


torch.library.register_autograd("rwkvlm::wkv7_cuda_forward", _gradients, setup_context=_save)


_passing_on = passing_on("wkv7_cuda_forward", _save, _gradients)
