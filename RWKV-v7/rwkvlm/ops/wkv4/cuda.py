"""The CUDA kernels (cuda/wkv4) as the operators of native.py on a GPU: the same schemas, fakes and autograd, another device."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..launch import address, launch, ready, why_not_built
from . import native

POINTERS = ("w", "u", "k", "v", "initial", "y", "final", "starts", "dy", "d_final", "dk", "dv", "d_starts", "d_initial", "sums")


class Task(ctypes.Structure):
    """Wkv4Task of cuda/wkv4/api.cuh."""

    _fields_ = [(n, ctypes.c_int32) for n in ("B", "T", "C", "unused")] + [(n, ctypes.c_void_p) for n in POINTERS]


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

    def run(self, direction: str, k: Tensor, **tensors: Tensor | None) -> None:
        task = Task(*k.shape)
        for name, tensor in ({"k": k} | tensors).items():
            setattr(task, name, address(tensor))
        launch(self.library, f"wkv4_{direction}", k.device, task, int(k.dtype == torch.float32))

    def forward(self, w, u, k, v, initial_state, save) -> tuple[Tensor, Tensor, Tensor]:
        w, u, k, v, initial = map(ready, (w, u, k, v, initial_state))
        B, T, C = k.shape
        y, final, starts = torch.empty_like(k), w.new_empty(B, 3, C), w.new_empty(B, -(-T // native.CHECKPOINT), 3, C)
        self.run("forward", k, w=w, u=u, v=v, initial=initial, y=y, final=final, starts=starts)
        return y, final, starts if save else starts.new_empty(0, *starts.shape[1:])

    def backward(self, dy, d_final, w, u, k, v, checkpoints) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dy, d_final, w, u, k, v, starts = map(ready, (dy, d_final, w, u, k, v, checkpoints))
        B, _, C = k.shape
        dk, dv, d_initial = torch.empty_like(k), torch.empty_like(k), w.new_empty(B, 3, C)
        d_starts, sums = w.new_empty(*starts.shape[:2], 4, C), w.new_empty(2, B * starts.shape[1], C)
        self.run("backward", k, w=w, u=u, v=v, starts=starts, dy=dy, d_final=d_final, dk=dk, dv=dv, d_starts=d_starts, d_initial=d_initial, sums=sums)
        return sums.sum(1), dk, dv, d_initial
