"""The CUDA kernels (cuda/wkv4) as the operators of native.py on a GPU: the same schemas, fakes and autograd, another device."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..launch import given, launch, why_not_built
from . import native

FP32 = torch.float32
POINTERS = ("w", "u", "k", "v", "initial", "y", "final", "starts", "dy", "d_final", "dk", "dv", "d_starts", "d_initial", "sums")


class Task(ctypes.Structure):
    """Wkv4Task of cuda/wkv4/api.cuh."""

    _fields_ = [(n, ctypes.c_int32) for n in ("B", "T", "C")] + [(n, ctypes.c_void_p) for n in POINTERS]


def why_not(dtype: torch.dtype, channels: int) -> str:
    """"" when the kernels run here on inputs of this dtype and this many channels (they are then built and registered), else the reason."""
    # The first also defines the operators: a machine with nvcc has a C++ compiler.
    return native.why_not(dtype, channels) or why_not_built("wkv4", register)


def prototypes(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, told the types of its functions."""
    for direction in ("forward", "backward"):
        getattr(library, f"wkv4_{direction}").argtypes = [ctypes.POINTER(Task), ctypes.c_int, ctypes.c_void_p]
    return library


def register(registration: torch.library.Library, library: ctypes.CDLL, key: str) -> None:
    """Makes the library's kernels the operators' form for the dispatch key: "CUDA"; in tests "CPU", with emulated kernels."""
    kernels = Kernels(prototypes(library))
    registration.impl("wkv4_forward", kernels.forward, key)
    registration.impl("wkv4_backward", kernels.backward, key)


class Kernels:
    """The operators over a library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def run(self, direction: str, k: Tensor, places: dict[str, int | None], made: dict[str, Tensor]) -> None:
        """places: where the tensors lie that the operator was given; made: those that it has made."""
        task = Task(*k.shape)
        for name, place in places.items():
            setattr(task, name, place)
        for name, tensor in made.items():
            setattr(task, name, tensor.data_ptr())
        launch(self.library, f"wkv4_{direction}", k.device, task, int(k.dtype == torch.float32))

    def forward(self, w, u, k, v, initial_state, save) -> tuple[Tensor, Tensor, Tensor]:
        at, (B, T, C), shape = given("wkv4", "k", k), _sizes(k), k.shape
        places = dict(w=at("w", w, (C,), FP32), u=at("u", u, (C,), FP32), k=at("k", k, shape), v=at("v", v, shape))
        places["initial"] = at("initial_state", initial_state, (B, 3, C), FP32)
        y, final, starts = _like(k), w.new_empty(B, 3, C), w.new_empty(B, -(-T // native.CHECKPOINT), 3, C)
        self.run("forward", k, places, dict(y=y, final=final, starts=starts))
        return y, final, starts if save else starts.new_empty(0, *starts.shape[1:])

    def backward(self, dy, d_final, w, u, k, v, checkpoints) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        at, (B, T, C), shape = given("wkv4_backward", "k", k), _sizes(k), k.shape
        segments = -(-T // native.CHECKPOINT)
        places = dict(w=at("w", w, (C,), FP32), u=at("u", u, (C,), FP32), k=at("k", k, shape), v=at("v", v, shape), dy=at("dy", dy, shape))
        places |= dict(d_final=at("d_final", d_final, (B, 3, C), FP32), starts=at("checkpoints", checkpoints, (B, segments, 3, C), FP32))
        dk, dv, d_initial = _like(k), _like(k), w.new_empty(B, 3, C)
        d_starts, sums = w.new_empty(B, segments, 4, C), w.new_empty(2, B * segments, C)
        self.run("backward", k, places, dict(dk=dk, dv=dv, d_starts=d_starts, d_initial=d_initial, sums=sums))
        return sums.sum(1), dk, dv, d_initial


def _sizes(k: Tensor) -> tuple[int, int, int]:
    if k.dim() != 3:
        raise ValueError(f"wkv4: k must be [B, T, C], got {list(k.shape)}")
    return k.shape


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
