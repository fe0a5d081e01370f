"""The CUDA kernels (cuda/fused) as the operators of native.py on a GPU: the same schemas, fakes and autograd, another device."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..launch import address, launch, ready, why_not_built
from . import native

INT, FLOAT, POINTER = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class TokenMix(ctypes.Structure):
    """FusedTokenMix of cuda/fused/api.cuh."""

    _fields_ = [(n, INT) for n in ("B", "T", "C", "n")] + [("x", POINTER), ("last", POINTER)]
    _fields_ += [(n, POINTER * 6) for n in ("mix", "out", "dout")] + [(n, POINTER) for n in ("dx", "dlast", "dmix", "parts")]


class NormMix(ctypes.Structure):
    """FusedNormMix of cuda/fused/api.cuh."""

    _fields_ = [(n, INT) for n in ("B", "T", "C", "n", "documents", "blocks")] + [("eps", FLOAT)]
    _fields_ += [(n, POINTER) for n in ("x", "branch", "weight", "bias", "last", "bounds")] + [("mix", POINTER * 6)]
    _fields_ += [(n, POINTER) for n in ("stream", "moments", "newest")] + [("out", POINTER * 6), ("dstream", POINTER), ("dnewest", POINTER), ("dout", POINTER * 6)]
    _fields_ += [(n, POINTER) for n in ("dx", "dlast", "sums", "parts")]


class Inputs(ctypes.Structure):
    """FusedInputs of cuda/fused/api.cuh."""

    _fields_ = [(n, INT) for n in ("rows", "C", "N", "unused")] + [
        (n, POINTER)
        for n in "w_low k a_low v v_first v_low w0 k_k k_a a0 v0 w k_out a b v_out dw dk_out da db dv_out more_dv_first dk da_low dv dv_first dv_low sums parts".split()
    ]


class Output(ctypes.Structure):
    """FusedOutput of cuda/fused/api.cuh."""

    _fields_ = [(n, INT) for n in ("rows", "C", "N")] + [("eps", FLOAT)]
    _fields_ += [(n, POINTER) for n in "y r k v g weight bias r_k out dout dy dr dk dv dg sums parts".split()]


def why_not(dtypes: tuple[torch.dtype, ...], width: int) -> str:
    """"" when the kernels run here on inputs of these dtypes and this last dimension (they are then built and registered), else the reason."""
    # The first also defines the operators: a machine with nvcc has a C++ compiler.
    return native.why_not(dtypes, width) or why_not_built("fused", register)


def prototypes(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, told the types of its functions."""
    library.fused_parts.argtypes, library.fused_parts.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    library.fused_norm_parts.argtypes, library.fused_norm_parts.restype = [ctypes.POINTER(NormMix), ctypes.c_int], ctypes.c_int64
    for name, task in (("norm_mix", NormMix), ("token_mix", TokenMix), ("time_mix_inputs", Inputs), ("time_mix_output", Output)):
        for direction in ("", "_backward"):
            getattr(library, f"fused_{name}{direction}").argtypes = [ctypes.POINTER(task), ctypes.c_int, POINTER]
    library.fused_relu_square.argtypes = [POINTER] * 2 + [ctypes.c_int64, ctypes.c_int, POINTER]
    library.fused_relu_square_backward.argtypes = [POINTER] * 3 + [ctypes.c_int64, ctypes.c_int, POINTER]
    return library


def register(registration: torch.library.Library, library: ctypes.CDLL, key: str) -> None:
    """Makes the library's kernels the operators' form for the dispatch key: "CUDA"; in tests "CPU", with emulated kernels."""
    kernels = Kernels(prototypes(library))
    for name in ("norm_mix", "token_mix", "time_mix_inputs", "time_mix_output", "relu_square"):
        for operator in (name, f"{name}_backward"):
            registration.impl(operator, getattr(kernels, operator), key)


class Kernels:
    """The operators over a library. Outputs are [.., C] like their inputs; gradients of parameters [parameters, C] in the inputs' dtype."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def run(self, function: str, x: Tensor, task: ctypes.Structure) -> None:
        launch(self.library, f"fused_{function}", x.device, task, int(x.dtype == torch.float32))

    def sums(self, x: Tensor, B: int, T: int, count: int) -> tuple[Tensor, Tensor]:
        """Memory for the sums of the blocks, and for the results."""
        C = x.shape[-1]
        return x.new_empty(self.library.fused_parts(B, T), count, C, dtype=torch.float32), x.new_empty(count, C)

    def norm_mix(self, x, branch, weight, bias, eps, last, mixes, bounds) -> list[Tensor]:
        """stream (nothing without a branch: it is x), newest, moments, and the blends."""
        x, branch, weight, bias, last, bounds, *mixes = kept = [ready(t) for t in (x, branch, weight, bias, last, bounds, *mixes)]
        task = NormMix(*x.shape, len(mixes), 0 if bounds is None else len(bounds) - 1, eps=eps)
        _point(task, ("x", "branch", "weight", "bias", "last", "bounds"), kept)
        B, T, C = x.shape
        stream, newest, moments = x.new_empty(0 if branch is None else x.shape), x.new_empty(B, C), x.new_empty(B, T, 2, dtype=torch.float32)
        out = [torch.empty_like(x) for _ in mixes]
        _point(task, ("stream", "newest", "moments"), (stream, newest, moments))
        task.mix[:], task.out[:] = _six(mixes), _six(out)
        self.run("norm_mix", x, task)
        return [stream, newest, moments, *out]

    def norm_mix_backward(self, dstream, dnewest, douts, stream, moments, weight, bias, last, mixes) -> tuple[Tensor, Tensor, Tensor]:
        names = ("x", "moments", "weight", "bias", "last", "dstream", "dnewest")
        kept = [ready(t) for t in (stream, moments, weight, bias, last, dstream, dnewest)]
        mixes, douts = [ready(t) for t in mixes], [ready(t) for t in douts]
        (B, T, C), n = stream.shape, len(mixes)
        task = NormMix(B, T, C, n)
        dx, dlast, sums = torch.empty_like(kept[0]), stream.new_empty(0 if last is None else B, C), stream.new_empty(n + 2, C)
        task.blocks = self.library.fused_norm_parts(task, int(stream.dtype == torch.float32))
        parts = stream.new_empty(task.blocks, n + 2, C, dtype=torch.float32)
        _point(task, names, kept)
        _point(task, ("dx", "dlast", "sums", "parts"), (dx, None if last is None else dlast, sums, parts))
        task.mix[:], task.dout[:] = _six(mixes), _six(douts)
        self.run("norm_mix_backward", stream, task)
        return dx, dlast, sums

    def token_mix(self, x: Tensor, last: Tensor | None, mixes: list[Tensor]) -> list[Tensor]:
        task, kept = _token_mix(x, last, mixes)
        out = [torch.empty_like(kept[0]) for _ in mixes]
        task.out[:] = _six(out)
        self.run("token_mix", x, task)
        return out

    def token_mix_backward(self, douts: list[Tensor], x: Tensor, last: Tensor | None, mixes: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        task, kept = _token_mix(x, last, mixes)
        douts = [ready(d) for d in douts]
        dx, dlast = torch.empty_like(kept[0]), x.new_empty(0 if last is None else x.shape[0], x.shape[2])
        parts, dmix = self.sums(x, x.shape[0], x.shape[1], len(mixes))
        task.dout[:] = _six(douts)
        task.dx, task.dlast, task.dmix, task.parts = address(dx), None if last is None else address(dlast), address(dmix), address(parts)
        self.run("token_mix_backward", x, task)
        return dx, dlast, dmix

    def time_mix_inputs(self, *inputs: Tensor | int | None) -> list[Tensor]:
        task, kept = _task(Inputs, ("w_low", "k", "a_low", "v", "v_first", "v_low", "w0", "k_k", "k_a", "a0", "v0"), inputs, like=1)
        k = kept[1]
        out = [torch.empty_like(k) for _ in range(4 if kept[4] is None else 5)]
        _point(task, ("w", "k_out", "a", "b", "v_out"), out)
        self.run("time_mix_inputs", k, task)
        return out

    def time_mix_inputs_backward(
        self, dw, dk_out, da, db, dv_out, w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0, head_size, more_dv_first=None
    ) -> list[Tensor]:
        inputs = (w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0, head_size)
        task, kept = _task(Inputs, ("w_low", "k", "a_low", "v", "v_first", "v_low", "w0", "k_k", "k_a", "a0", "v0"), inputs, like=1)
        k = kept[1]
        douts = [ready(d) for d in (dw, dk_out, da, db, dv_out, more_dv_first)]
        out = [torch.empty_like(k) for _ in range(2 if kept[4] is None else 5)]
        parts, sums = self.sums(k, 1, task.rows, 5)
        _point(task, ("dw", "dk_out", "da", "db", "dv_out", "more_dv_first"), douts)
        _point(task, ("dk", "da_low", "dv", "dv_first", "dv_low"), out)
        _point(task, ("sums", "parts"), (sums, parts))
        self.run("time_mix_inputs_backward", k, task)
        return [*out, sums]

    def time_mix_output(self, *inputs: Tensor | int | float) -> Tensor:
        *inputs, eps = inputs
        task, kept = _task(Output, ("y", "r", "k", "v", "g", "weight", "bias", "r_k"), inputs, like=0)
        out = torch.empty_like(kept[0])
        task.eps, task.out = eps, address(out)
        self.run("time_mix_output", kept[0], task)
        return out

    def time_mix_output_backward(self, dout: Tensor, *inputs: Tensor | int | float) -> list[Tensor]:
        *inputs, eps = inputs
        task, kept = _task(Output, ("y", "r", "k", "v", "g", "weight", "bias", "r_k"), inputs, like=0)
        dout, out = ready(dout), [torch.empty_like(kept[0]) for _ in range(5)]
        parts, sums = self.sums(kept[0], 1, task.rows, 3)
        task.eps = eps
        _point(task, ("dout", "dy", "dr", "dk", "dv", "dg", "sums", "parts"), (dout, *out, sums, parts))
        self.run("time_mix_output_backward", kept[0], task)
        return [*out, sums]

    def relu_square(self, x: Tensor) -> Tensor:
        x = ready(x)
        y = torch.empty_like(x)
        launch(self.library, "fused_relu_square", x.device, address(x), address(y), x.numel(), int(x.dtype == torch.float32))
        return y

    def relu_square_backward(self, dy: Tensor, y: Tensor) -> Tensor:
        dy, y = ready(dy), ready(y)
        dx = torch.empty_like(y)
        launch(self.library, "fused_relu_square_backward", y.device, address(dy), address(y), address(dx), y.numel(), int(y.dtype == torch.float32))
        return dx


def _six(tensors: list[Tensor]) -> list[int | None]:
    return [*map(address, tensors), *[None] * (6 - len(tensors))]


def _token_mix(x: Tensor, last: Tensor | None, mixes: list[Tensor]) -> tuple[TokenMix, list[Tensor]]:
    """The task, and what must stay alive until it has been started."""
    kept = [ready(x), *map(ready, mixes)] + ([] if last is None else [ready(last)])
    task = TokenMix(*x.shape, len(mixes), address(kept[0]), None if last is None else address(kept[-1]))
    task.mix[:] = _six(kept[1 : 1 + len(mixes)])
    return task, kept


def _task(kind: type[ctypes.Structure], names: tuple[str, ...], inputs: tuple, like: int) -> tuple[ctypes.Structure, list[Tensor | None]]:
    """A task over rows of heads, and what must stay alive until it has been started; the last input is the size of a head."""
    *tensors, head_size = inputs
    kept = [ready(t) for t in tensors]
    C = kept[like].shape[-1]
    task = kind(rows=kept[like].numel() // C, C=C, N=head_size)
    _point(task, names, kept)
    return task, kept


def _point(task: ctypes.Structure, names: tuple[str, ...], tensors) -> None:
    for name, tensor in zip(names, tensors):
        setattr(task, name, address(tensor))
