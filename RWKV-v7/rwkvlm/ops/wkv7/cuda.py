"""The CUDA kernels as torch operators: where they run, and what fake tensors need to know.

Launch and derivatives are in C++: cuda/wkv7/gpu.cpp and autograd_gpu.cpp.
"""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from rwkvlm import native

from .. import backend
from .arguments import sequence_bounds

TENSOR_CORES = (8, 0)  # the compute capability from which on bf16 products run on them


class Machine(NamedTuple):
    """Where kernels run."""

    library: ctypes.CDLL
    capability: tuple[int, int]
    number: int  # by which the operators know it


@functools.cache
def machine(device: torch.device) -> Machine:
    """The GPU that holds the tensors.

    Everything here that needs a GPU is in this function: tests put the emulation on the host in its place.
    """
    if device.type != "cuda":
        raise ValueError(f"wkv7: the CUDA kernels need tensors on a GPU, got {device}")
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return machine_over(native.cuda_library("wkv7"), device, torch.cuda.get_device_capability(device), multiprocessors)


def machine_over(library: ctypes.CDLL, device: torch.device, capability: tuple[int, int], multiprocessors: int) -> Machine:
    """One whose kernels are in this library."""
    return Machine(library, capability, _operators().wkv7_machine(library._handle, device, capability >= TENSOR_CORES, multiprocessors))


def segment_chunks(sequences: int, T: int, H: int, N: int, multiprocessors: int) -> int:
    """Chunks of a segment of the chunked scans, 0 where they walk whole sequences: the rule of gpu.cpp."""
    return _operators().wkv7_segment_chunks(sequences, T, H, N, multiprocessors)


def ask_for_segments(chunks: int) -> None:
    """For measurements and tests: so many chunks a segment whatever the rule says, 0 for whole sequences; -1: by the rule."""
    _operators().wkv7_ask_for_segments(chunks)


def why_not(dtype: torch.dtype) -> str:
    """Empty when kernels run here on inputs of this dtype (they are then built), else the reason."""
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
    number = number_of(r.device)
    if cu_seqlens is not None:
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            sequence_bounds(cu_seqlens, r.shape[1])
        cu_seqlens = cu_seqlens.to(r.device, torch.int32, non_blocking=True)
    return torch.ops.rwkvlm.wkv7_cuda(r, w, k, v, a, b, initial_state, cu_seqlens, pass_on, number)


@backend.decided_while_tracing
def number_of(device: torch.device) -> int:
    return machine(device).number


def form_for(dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """The form "chunked", on the tensor cores, wherever it can; else "sequential", fp32 arithmetic throughout."""
    return "chunked" if dtype == torch.bfloat16 and capability >= TENSOR_CORES else "sequential"


def chunk_tokens(form: str, N: int) -> int:
    """Tokens from one saved record to the next."""
    if form == "sequential":
        return 16
    return 32 if N == 128 else 64


def saved_bytes(form: str, B: int, T: int, H: int, N: int, documents: int) -> int:
    """Bytes that the forward leaves for the backward; documents: 0 without cu_seqlens.

    The same number as the library's own, for sizes that are symbols too.
    """
    C = chunk_tokens(form, N)
    slots = T // C + documents if documents else B * ((T + C - 1) // C)
    if form == "sequential":
        return 4 * N * H * (slots * N + B * T)
    return 2 * H * slots * (2 * N * N + C * N + C * C + 2 * N)


def ttt_saved_bytes(B: int, T: int, H: int, N: int, rows: int, hidden: int, segment: int) -> int:
    """The same with steps of test-time training: also the rows before each step, and which hidden units are above zero."""
    return saved_bytes("chunked", B, T, H, N, 0) + 4 * B * H * ((T - 1) // segment * rows * N + (T if hidden else 0))


@functools.cache
def _operators():
    """Those of gpu.cpp, known to fake tensors too."""
    native.load_launches("wkv7")
    for fake in (_wkv7_cuda_forward, _wkv7_cuda_backward, _wkv7_ttt_cuda_forward, _wkv7_ttt_cuda_backward):
        torch.library.register_fake(f"rwkvlm::{fake.__name__[1:]}", fake)
    return torch.ops.rwkvlm


def _wkv7_cuda_forward(r, w, k, v, a, b, initial_state, cu_seqlens, save, number):
    B, T, H, N = r.shape
    documents = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    saved = saved_bytes(form_for(r.dtype, machine(r.device).capability), B, T, H, N, documents) if save else 0
    return r.new_empty(r.shape), r.new_empty(documents or B, H, N, N, dtype=torch.float32), r.new_empty(saved, dtype=torch.uint8)


def _wkv7_cuda_backward(dy, d_final_state, r, w, k, v, a, b, initial_state, cu_seqlens, saved, state_gradient, number, *more):
    B, _, H, N = r.shape
    states = (B if cu_seqlens is None else cu_seqlens.shape[0] - 1, H, N, N) if state_gradient else (0,)
    return [*(r.new_empty(r.shape) for _ in range(6)), r.new_empty(states, dtype=torch.float32)]


def _wkv7_ttt_cuda_forward(r, w, k, v, a, b, initial_state, rate, head, rows, segment, stored, save, number):
    B, T, H, N = r.shape
    saved = ttt_saved_bytes(B, T, H, N, rows, 0 if head is None else head.shape[1], segment) if save else 0
    return r.new_empty(r.shape), r.new_empty(B, H, N, N, dtype=torch.float32), r.new_empty(saved, dtype=torch.uint8)


def _wkv7_ttt_cuda_backward(dy, d_final_state, r, w, k, v, a, b, rate, head, saved, rows, segment, stored, state_gradient, number, *more):
    B, _, H, N = r.shape
    states = (B, H, N, N) if state_gradient else (0,)
    return [
        *(r.new_empty(r.shape) for _ in range(6)),
        rate.new_empty(states),
        rate.new_empty(rate.shape),
        rate.new_empty((0,) if head is None else head.shape),
    ]
