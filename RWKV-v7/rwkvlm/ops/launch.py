"""Calling the functions of a CUDA library (native.cuda_library) with tensors: their addresses, their device's stream, their error codes."""

from __future__ import annotations

import ctypes
import functools
from typing import Callable

import torch
from torch import Tensor

from rwkvlm import native

Register = Callable[[torch.library.Library, ctypes.CDLL, str], None]
"""Makes the kernels of a library the form of their operators for a dispatch key."""


def why_not_built(name: str, register: Register) -> str:
    """"" when the CUDA kernels of cuda/<name>/ run here (they are then built, and registered once), else the reason."""
    built, reason = native.cuda_available(name)
    if built:
        _registered(name, register)
    return reason


@functools.cache
def _registered(name: str, register: Register) -> torch.library.Library:
    registration = torch.library.Library("rwkvlm", "IMPL")
    register(registration, native.cuda_library(name), "CUDA")
    return registration  # kept: it lives as long as the operators


def ready(x: Tensor | None) -> Tensor | None:
    """Contiguous and 16 byte aligned, as the kernels read it; nearly always x itself."""
    if x is None:
        return None
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def launch(library: ctypes.CDLL, function: str, device: torch.device, *arguments) -> None:
    """`function(*arguments, stream)` on the device's current stream; RuntimeError with the library's message. On the CPU (emulated kernels): no stream."""
    if device.type == "cpu":
        code = getattr(library, function)(*arguments, None)
    else:
        stream = torch._C._cuda_getCurrentRawStream(device.index)  # as Triton asks for it; current_stream() makes an object each time
        if device.index == torch.cuda.current_device():
            code = getattr(library, function)(*arguments, stream)
        else:  # the kernels' own CUDA runtime launches where the driver's current context is
            with torch.cuda.device(device):
                code = getattr(library, function)(*arguments, stream)
    if code:
        raise RuntimeError(f"{function}: {native.cuda_message(library, code)}")
