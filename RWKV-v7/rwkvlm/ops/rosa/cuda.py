"""The CUDA kernels (cuda/rosa) as the operators of operator.py on a GPU: the same schemas, fakes and autograd, another device."""

from __future__ import annotations

import ctypes
from typing import Iterable

import torch
from torch import Tensor

from ..launch import Place, address, ask, given, launch, why_not_built
from . import native
from .arguments import MOST_BITS, RosaState, check_tokens

SIZE, INT, POINTER = ctypes.c_int64, ctypes.c_int32, ctypes.c_void_p
ROWS_AT_ONCE = 2048  # of a backward: each has memory of its own, 36 bytes for a symbol of one bit


class Size(ctypes.Structure):
    """RosaSize of cuda/rosa/api.cuh."""

    _fields_ = [(n, SIZE) for n in ("B", "T", "C", "M", "L")]


class Forward(ctypes.Structure):
    """RosaForward."""

    _fields_ = [("size", Size), *((n, POINTER) for n in ("q", "k", "v", "runs", "low", "high", "out")), ("miss_low", INT)]


class Backward(ctypes.Structure):
    """RosaBackward."""

    _fields_ = [("size", Size), *((n, POINTER) for n in ("q", "k", "v")), ("inputs", POINTER * 3), *((n, POINTER) for n in ("dout", "low", "high"))]
    _fields_ += [("gradients", POINTER * 3), ("sums", POINTER), ("scratch", POINTER), ("blocks", SIZE), ("tau", ctypes.c_float), ("miss_low", INT)]


def why_not(dtype: torch.dtype) -> str:
    """"" when the kernels run here on inputs of this dtype (they are then built and registered), else the reason."""
    # The first also defines the operators: a machine with nvcc has a C++ compiler.
    return native.why_not(dtype) or why_not_built("rosa", register)


def prototypes(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, told the types of its functions."""
    library.rosa_symbols.argtypes = [ctypes.POINTER(Size), POINTER, POINTER, ctypes.c_int, POINTER]
    library.rosa_forward.argtypes = [ctypes.POINTER(Forward), ctypes.c_int, POINTER]
    library.rosa_backward.argtypes = [ctypes.POINTER(Backward), ctypes.c_int, POINTER]
    library.rosa_token_rows.argtypes = [SIZE] * 3 + [POINTER] * 4
    library.rosa_scratch_bytes.argtypes, library.rosa_scratch_bytes.restype = [SIZE, SIZE, ctypes.c_int], SIZE
    return library


def register(registration: torch.library.Library, library: ctypes.CDLL, key: str) -> None:
    """Makes the library's kernels the operators' form for the dispatch key: "CUDA"; in tests "CPU", with emulated kernels."""
    kernels = Kernels(prototypes(library))
    for name in ("rosa", "rosa_backward", "rosa_tokens"):
        registration.impl(name, getattr(kernels, name), key)


class Kernels:
    """The operators over a library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def symbols(self, at: Place, name: str, x: Tensor, bits: int, old: Tensor | None = None, length: int = 0) -> Tensor:
        """[B, C / bits, length + T], behind the old ones, which lie before it."""
        B, T, C = x.shape
        to = x.new_empty(B, C // bits, length + T, dtype=torch.uint8)
        if old is not None:
            to[:, :, :length] = old
        if to.numel():
            launch(self.library, "rosa_symbols", x.device, Size(B, T, C, bits, length), at(name, x, x.shape), address(to), int(x.dtype == torch.float32))
        return to

    def rosa(self, q, k, v, low, high, bits, miss_low, tau, soft, old_k, old_v, old_runs, with_state) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        at, (B, T, C) = _given("rosa", q, k, v, bits)
        L = 0 if old_k is None else old_k.shape[2]
        for name, x, dtype in (("old_k", old_k, torch.uint8), ("old_v", old_v if k is not None else None, torch.uint8), ("old_runs", old_runs, torch.int32)):
            at(name, x, (B, C // bits, L), dtype)
        all_k = self.symbols(at, "q" if k is None else "k", q if k is None else k, bits, old_k, L)
        new_q, all_v = (all_k, all_k) if k is None else (self.symbols(at, "q", q, bits, None, L), self.symbols(at, "v", v, bits, old_v, L))
        runs = q.new_zeros(all_k.shape, dtype=torch.int32)
        if L:
            runs[:, :, :L] = old_runs
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        pointers = (*map(address, (new_q, all_k, all_v, runs)), at("low", low, (C,)), at("high", high, (C,)), address(out))
        if out.numel():
            launch(self.library, "rosa_forward", q.device, Forward(Size(B, T, C, bits, L), *pointers, int(miss_low)), int(q.dtype == torch.float32))
        if with_state:
            return out, all_k, all_k.new_empty(B, C // bits, 0) if k is None else all_v, runs
        return out, all_k.new_empty(B, C // bits, 0), all_k.new_empty(B, C // bits, 0), runs.new_empty(B, C // bits, 0)

    def rosa_backward(self, dout, q, k, v, low, high, bits, miss_low, tau, flips) -> list[Tensor]:
        at, (B, T, C) = _given("rosa_backward", q, k, v, bits)
        inputs = {"q": q} if k is None else {"q": q, "k": k, "v": v}
        symbols = [self.symbols(at, name, x, bits) for name, x in inputs.items()]
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs.values()] if flips else []
        sums = q.new_zeros(2, B, C, dtype=torch.float64)
        blocks = min(B * (C // bits), ROWS_AT_ONCE)
        scratch = q.new_empty(blocks * ask(self.library, "rosa_scratch_bytes", q.device, T, bits, k is None), dtype=torch.uint8)
        places = at("dout", dout, q.shape), at("low", low, (C,)), at("high", high, (C,))
        task = Backward(Size(B, T, C, bits, 0), *_three(map(address, symbols)), (POINTER * 3)(*_three(at(name, x, q.shape) for name, x in inputs.items())), *places)
        task.gradients[:] = _three(map(address, gradients))
        task.sums, task.scratch, task.blocks, task.tau, task.miss_low = address(sums), address(scratch), blocks, tau, int(miss_low)
        if dout.numel():
            launch(self.library, "rosa_backward", q.device, task, int(q.dtype == torch.float32))
        return [*gradients, *sums.sum(1).to(low.dtype)]

    def rosa_tokens(self, x: Tensor, old: Tensor | None, old_runs: Tensor | None, with_state: bool) -> tuple[Tensor, Tensor, Tensor]:
        check_tokens(x, None if old is None else RosaState(old, old, old_runs))
        (B, T), L = x.shape, 0 if old is None else old.shape[1]
        k = x.clone(memory_format=torch.contiguous_format) if old is None else torch.cat([old, x], 1)
        runs, y = x.new_zeros(B, L + T, dtype=torch.int32), x.new_empty(B, T)
        if L:
            runs[:, :L] = old_runs
        if y.numel():
            launch(self.library, "rosa_token_rows", x.device, B, T, L, address(k), address(runs), address(y))
        return (y, k, runs) if with_state else (y, k.new_empty(B, 0), runs.new_empty(B, 0))


def _given(op: str, q: Tensor, k: Tensor | None, v: Tensor | None, bits: int) -> tuple[Place, torch.Size]:
    """For the tensors beside them, and the shape of all three."""
    at = given(op, "q", q)
    if q.dim() != 3 or not 1 <= bits <= MOST_BITS or q.shape[2] % bits or (k is None) != (v is None):
        raise ValueError(f"{op}: expected q [B, T, C], bits from 1 to {MOST_BITS} that divide C, k and v or neither, got {list(q.shape)}, {bits} bits")
    at("k", k, q.shape), at("v", v, q.shape)
    return at, q.shape


def _three(places: Iterable[int | None]) -> list[int | None]:
    places = list(places)
    return places + [None] * (3 - len(places))
