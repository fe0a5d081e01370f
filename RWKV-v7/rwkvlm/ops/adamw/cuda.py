"""The CUDA kernels (cuda/adamw) as the operators of native.py on a GPU: the same schemas, another device."""

from __future__ import annotations

import ctypes
from array import array

import torch
from torch import Tensor

from ..launch import address, launch, why_not_built
from . import native
from .arguments import check_gradients, check_step

POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64


class Step(ctypes.Structure):
    """AdamwStep of cuda/adamw/api.cuh."""

    _fields_ = [("n", SIZE)] + [(n, POINTER) for n in "sizes masters rounded grads narrow exp_avgs exp_avg_sqs steps scale found_inf rates".split()]
    _fields_ += [(n, ctypes.c_double) for n in ("lr", "beta1", "beta2", "eps", "weight_decay")]


def why_not() -> str:
    """"" when the kernels run here (they are then built and registered), else the reason."""
    # The first also defines the operators: a machine with nvcc has a C++ compiler.
    return native.why_not() or why_not_built("adamw", register)


def prototypes(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, told the types of its functions."""
    library.adamw_step.argtypes = [ctypes.POINTER(Step), POINTER]
    library.adamw_norm_parts.argtypes, library.adamw_norm_parts.restype = [SIZE, POINTER], SIZE
    library.adamw_norms.argtypes = [SIZE, *[POINTER] * 6]
    return library


def register(registration: torch.library.Library, library: ctypes.CDLL, key: str) -> None:
    """Makes the library's kernels the operators' form for the dispatch key: "CUDA"; in tests "CPU", with emulated kernels."""
    kernels = Kernels(prototypes(library))
    registration.impl("adamw_", kernels.adamw_, key)
    registration.impl("gradient_norms", kernels.gradient_norms, key)


class Kernels:
    """The operators over a library. Some hundred parameters a step: each is asked for its address, size, dtype, device once, and nothing more."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def adamw_(
        self, masters: list[Tensor], rounded: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], steps: list[Tensor],
        scale: Tensor | None, found_inf: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
    ) -> None:  # fmt: skip
        sizes = check_step(masters, rounded, grads, exp_avgs, exp_avg_sqs, steps, scale, found_inf)
        rates = masters[0].new_empty(len(masters), 4)
        lists = [_addresses(tensors) for tensors in (masters, grads, exp_avgs, exp_avg_sqs, steps, rounded)]  # read before the call returns
        counts, narrow = array("q", sizes), _narrow(grads)
        task = Step(n=len(sizes), sizes=_place(counts), narrow=_place(narrow), scale=address(scale), found_inf=address(found_inf), rates=address(rates))
        task.masters, task.grads, task.exp_avgs, task.exp_avg_sqs, task.steps, task.rounded = map(_place, lists)
        task.lr, task.beta1, task.beta2, task.eps, task.weight_decay = lr, beta1, beta2, eps, weight_decay
        launch(self.library, "adamw_step", masters[0].device, task)

    def gradient_norms(self, grads: list[Tensor]) -> Tensor:
        sizes = array("q", check_gradients(grads))
        n, parts = len(sizes), self.library.adamw_norm_parts(len(sizes), _place(sizes))
        norms, parts = grads[0].new_empty(n, dtype=torch.float32), grads[0].new_empty(parts, dtype=torch.float32)
        places, narrow = _addresses(grads), _narrow(grads)
        arrays = (_place(sizes), _place(places), _place(narrow))
        launch(self.library, "adamw_norms", norms.device, n, *arrays, parts.data_ptr(), norms.data_ptr())
        return norms


def _addresses(tensors: list[Tensor]) -> array:
    return array("Q", [t.data_ptr() for t in tensors])


def _narrow(grads: list[Tensor]) -> array:
    return array("B", [g.dtype == torch.bfloat16 for g in grads])


def _place(values: array) -> int | None:
    """Where they lie; None for an empty one."""
    return values.buffer_info()[0] if values else None
