"""Calling the functions of a CUDA library (native.cuda_library) with tensors: their addresses, their device's stream, their error codes."""

from __future__ import annotations

import ctypes
import functools
from typing import Callable

import torch
from torch import Tensor

from rwkvlm import native

from .arguments import check_fit

Register = Callable[[torch.library.Library, ctypes.CDLL, str], None]
"""Makes the kernels of a library the form of their operators for a dispatch key."""

Place = Callable[..., "int | None"]
"""What `given` returns."""


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


def register_in_cpp(name: str, registration: torch.library.Library, library: ctypes.CDLL, key: str) -> None:
    """As a `Register`, of operators that cuda/<name>/gpu.cpp launches: gone with the registration, as all others are."""
    native.load_launches(name)
    register, unregister = (getattr(torch.ops.rwkvlm, f"{name}_{what}") for what in ("register", "unregister"))
    forms = register(library._handle, key)
    registration._registration_handles.append(torch._library.utils.RegistrationHandle(lambda: unregister(forms)))


def given(op: str, first: str, like: Tensor) -> Place:
    """For the tensors that an operator was given: at(name, x, shape) is the address of x, once its shape, dtype and device have been looked at.

    like: one of the tensors, `first` by name, bfloat16 or float32; the others are on its device, and of its dtype where at is told no other. The shape is a
    tuple, or a number of elements; ValueError for anything else, None for None. The kernels read in order and in pieces of 16 bytes: of a tensor that is
    not contiguous and aligned a copy is made, which lives as long as at does: keep it until the kernels are on their stream.
    A closure, since it is called for each tensor of a step: 0.4 microseconds, a quarter less than a method.
    """
    own, index, copies = like.dtype, like.get_device(), []
    if own is not torch.bfloat16 and own is not torch.float32:
        raise ValueError(f"{op}: {first} must be torch.bfloat16 or torch.float32, got {own}")

    def at(name: str, x: Tensor | None, shape: tuple[int, ...] | int, dtype: torch.dtype = own) -> int | None:
        if x is None:
            return None
        if (x.numel() if shape.__class__ is int else x.shape) != shape or x.dtype is not dtype or x.get_device() != index:
            check_fit(op, name, x, shape, first, like.device)
            raise ValueError(f"{op}: {name} must be {dtype}, got {x.dtype}")
        place = x.data_ptr()
        if place % 16 or not x.is_contiguous():
            copies.append(x := x.clone(memory_format=torch.contiguous_format))
            place = x.data_ptr()
        return place

    return at


def address(x: Tensor | None) -> int | None:
    """Of memory that the caller has made itself."""
    return None if x is None else x.data_ptr()


def ask(library: ctypes.CDLL, function: str, device: torch.device, *arguments) -> int:
    """What `function(*arguments)` returns, called with the device as the current one: the library's own CUDA runtime uses that of the driver's current context."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return getattr(library, function)(*arguments)
    with torch.cuda.device(device):
        return getattr(library, function)(*arguments)


def launch(library: ctypes.CDLL, function: str, device: torch.device, *arguments) -> None:
    """`function(*arguments, stream)` on the device's current stream. On the CPU (emulated kernels): no stream.

    With the library's message: ValueError where it does not take what it was given, RuntimeError where the GPU fails.
    """
    # As Triton asks for the stream; current_stream() makes an object each time.
    stream = None if device.type == "cpu" else torch._C._cuda_getCurrentRawStream(device.index)
    if code := ask(library, function, device, *arguments, stream):
        raise (ValueError if code < 0 else RuntimeError)(f"{function}: {native.cuda_message(library, code)}")
