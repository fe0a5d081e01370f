"""The CUDA kernels (cuda/fused) as the operators of native.py on a GPU: the same schemas, fakes and autograd, another device."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ..launch import Place, address, ask, given, launch, why_not_built
from . import native

INT, FLOAT, POINTER = ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
MOST_ROWS, MOST_MIXES = 2**31 - 1, 6  # what the fields of the tasks hold
_like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)


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

    _fields_ = [(n, INT) for n in ("rows", "C", "N")] + [
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
        op = "norm_mix"
        at, (B, T, C) = given(op, "x", x), _sequences(op, x)
        task = NormMix(B, T, C, len(mixes), 0 if bounds is None else bounds.numel() - 1, eps=eps)
        task.x, task.branch = at("x", x, x.shape), at("branch", branch, x.shape)
        task.weight, task.bias, task.mix[:] = at("weight", weight, C), at("bias", bias, C), _mixes(op, at, mixes, C)
        task.last, task.bounds = at("last", last, (B, C)), at("bounds", bounds, (task.documents + 1,), torch.int32)
        stream, newest, moments = x.new_empty(0) if branch is None else _like(x), x.new_empty(B, C), x.new_empty(B, T, 2, dtype=torch.float32)
        out = _likes(x, len(mixes))
        task.stream, task.newest, task.moments, task.out[:] = address(stream), address(newest), address(moments), _six([t.data_ptr() for t in out])
        self.run("norm_mix", x, task)
        return [stream, newest, moments, *out]

    def norm_mix_backward(self, dstream, dnewest, douts, stream, moments, weight, bias, last, mixes) -> tuple[Tensor, Tensor, Tensor]:
        op, n, shape = "norm_mix_backward", len(mixes), stream.shape
        at, (B, T, C) = given(op, "stream", stream), _sequences(op, stream)
        task = NormMix(B, T, C, n)
        task.x, task.moments = at("stream", stream, shape), at("moments", moments, (B, T, 2), torch.float32)
        task.weight, task.bias, task.mix[:] = at("weight", weight, C), at("bias", bias, C), _mixes(op, at, mixes, C)
        task.last, task.dstream, task.dnewest = at("last", last, (B, C)), at("dstream", dstream, shape), at("dnewest", dnewest, (B, C))
        task.dout[:] = _douts(op, at, douts, shape, n)
        dx, dlast, sums = _like(stream), stream.new_empty(0 if last is None else B, C), stream.new_empty(n + 2, C)
        task.blocks = ask(self.library, "fused_norm_parts", stream.device, task, int(stream.dtype == torch.float32))
        parts = stream.new_empty(task.blocks, n + 2, C, dtype=torch.float32)
        task.dx, task.dlast, task.sums, task.parts = address(dx), None if last is None else address(dlast), address(sums), address(parts)
        self.run("norm_mix_backward", stream, task)
        return dx, dlast, sums

    def token_mix(self, x: Tensor, last: Tensor | None, mixes: list[Tensor]) -> list[Tensor]:
        task, at = _token_mix("token_mix", x, last, mixes)
        out = _likes(x, len(mixes))
        task.out[:] = _six([t.data_ptr() for t in out])
        self.run("token_mix", x, task)
        return out

    def token_mix_backward(self, douts: list[Tensor], x: Tensor, last: Tensor | None, mixes: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        op = "token_mix_backward"
        task, at = _token_mix(op, x, last, mixes)
        task.dout[:] = _douts(op, at, douts, x.shape, len(mixes))
        dx, dlast = _like(x), x.new_empty(0 if last is None else x.shape[0], x.shape[2])
        parts, dmix = self.sums(x, x.shape[0], x.shape[1], len(mixes))
        task.dx, task.dlast, task.dmix, task.parts = address(dx), None if last is None else address(dlast), address(dmix), address(parts)
        self.run("token_mix_backward", x, task)
        return dx, dlast, dmix

    def time_mix_inputs(self, *inputs: Tensor | int | None) -> list[Tensor]:
        task, at = _inputs("time_mix_inputs", *inputs)
        k = inputs[1]
        out = _likes(k, 4 if inputs[4] is None else 5)
        _point(task, ("w", "k_out", "a", "b", "v_out"), out)
        self.run("time_mix_inputs", k, task)
        return out

    def time_mix_inputs_backward(self, dw, dk_out, da, db, dv_out, *inputs: Tensor | int | None) -> list[Tensor]:
        *inputs, more_dv_first = inputs if len(inputs) == 13 else (*inputs, None)
        task, at = _inputs("time_mix_inputs_backward", *inputs)
        k, shape = inputs[1], inputs[1].shape
        task.dw, task.dk_out, task.da, task.db = at("dw", dw, shape), at("dk_out", dk_out, shape), at("da", da, shape), at("db", db, shape)
        task.dv_out, task.more_dv_first = at("dv_out", dv_out, shape), at("more_dv_first", more_dv_first, shape)
        out = _likes(k, 2 if inputs[4] is None else 5)
        parts, sums = self.sums(k, 1, task.rows, 5)
        _point(task, ("dk", "da_low", "dv", "dv_first", "dv_low"), out)
        _point(task, ("sums", "parts"), (sums, parts))
        self.run("time_mix_inputs_backward", k, task)
        return [*out, sums]

    def time_mix_output(self, *inputs: Tensor | int | float) -> Tensor:
        task, at = _output("time_mix_output", *inputs)
        out = _like(inputs[0])
        task.out = address(out)
        self.run("time_mix_output", out, task)
        return out

    def time_mix_output_backward(self, dout: Tensor, *inputs: Tensor | int | float) -> list[Tensor]:
        task, at = _output("time_mix_output_backward", *inputs)
        y = inputs[0]
        task.dout = at("dout", dout, y.shape)
        out = _likes(y, 5)
        parts, sums = self.sums(y, 1, task.rows, 3)
        _point(task, ("dy", "dr", "dk", "dv", "dg", "sums", "parts"), (*out, sums, parts))
        self.run("time_mix_output_backward", y, task)
        return [*out, sums]

    def relu_square(self, x: Tensor) -> Tensor:
        at, y = given("relu_square", "x", x), _like(x)
        launch(self.library, "fused_relu_square", x.device, at("x", x, x.shape), address(y), x.numel(), int(x.dtype == torch.float32))
        return y

    def relu_square_backward(self, dy: Tensor, y: Tensor) -> Tensor:
        at, dx = given("relu_square_backward", "y", y), _like(y)
        places = at("dy", dy, y.shape), at("y", y, y.shape), address(dx)
        launch(self.library, "fused_relu_square_backward", y.device, *places, y.numel(), int(y.dtype == torch.float32))
        return dx


# Each of these makes a task of what a forward was given. What it returns besides keeps copies alive, until the task has been started.


def _token_mix(op: str, x: Tensor, last: Tensor | None, mixes: list[Tensor]) -> tuple[TokenMix, Place]:
    at, (B, T, C) = given(op, "x", x), _sequences(op, x)
    task = TokenMix(B, T, C, len(mixes), at("x", x, x.shape), at("last", last, (B, C)))
    task.mix[:] = _mixes(op, at, mixes, C)
    return task, at


def _inputs(op: str, w_low, k, a_low, v, v_first, v_low, w0, k_k, k_a, a0, v0, head_size) -> tuple[Inputs, Place]:
    at, shape, (B, T, C) = given(op, "k", k), k.shape, _sequences(op, k)
    task = Inputs(B * T, C, head_size)
    task.w_low, task.k, task.a_low, task.v = at("w_low", w_low, shape), at("k", k, shape), at("a_low", a_low, shape), at("v", v, shape)
    task.v_first, task.v_low, task.v0 = at("v_first", v_first, shape), at("v_low", v_low, shape), at("v0", v0, C)
    task.w0, task.k_k, task.k_a, task.a0 = at("w0", w0, C), at("k_k", k_k, C), at("k_a", k_a, C), at("a0", a0, C)
    return task, at


def _output(op: str, y, r, k, v, g, weight, bias, r_k, head_size, eps) -> tuple[Output, Place]:
    at, shape, (B, T, C) = given(op, "y", y), y.shape, _sequences(op, y)
    task = Output(B * T, C, head_size, eps)
    task.y, task.r, task.k, task.v, task.g = at("y", y, shape), at("r", r, shape), at("k", k, shape), at("v", v, shape), at("g", g, shape)
    task.weight, task.bias, task.r_k = at("weight", weight, C), at("bias", bias, C), at("r_k", r_k, C)
    return task, at


def _sequences(op: str, x: Tensor) -> tuple[int, int, int]:
    if x.dim() != 3 or not 1 <= x.shape[0] * x.shape[1] <= MOST_ROWS or x.shape[2] < 1:
        raise ValueError(f"{op}: expected [B, T, C], none of them 0 and B T < 2^31, got {list(x.shape)}")
    return x.shape


def _mixes(op: str, at: Place, mixes: list[Tensor], C: int) -> list[int | None]:
    if len(mixes) > MOST_MIXES:
        raise ValueError(f"{op}: expected at most {MOST_MIXES} mixes, got {len(mixes)}")
    return _six([at("a mix", mix, C) for mix in mixes])


def _douts(op: str, at: Place, douts: list[Tensor], shape: torch.Size, n: int) -> list[int | None]:
    if len(douts) != n:
        raise ValueError(f"{op}: expected a gradient for each of {n} mixes, got {len(douts)}")
    return _six([at("a gradient", d, shape) for d in douts])


def _likes(x: Tensor, count: int) -> list[Tensor]:
    """Memory for as many tensors like x, contiguous."""
    first = _like(x)
    return [first, *[torch.empty_like(first) for _ in range(count - 1)]]


def _six(places: list[int | None]) -> list[int | None]:
    return places + [None] * (MOST_MIXES - len(places))


def _point(task: ctypes.Structure, names: tuple[str, ...], tensors) -> None:
    for name, tensor in zip(names, tensors):
        setattr(task, name, address(tensor))
