"""Public wkv7 kernels as bench/gpu_kernels.py times them, from sources that lie where the user says; nothing of them is kept here.

    --peer official=RWKV-LM/RWKV-v7/train_temp    cuda/rwkv7_clampw.cu with its .cpp: torch.ops.rwkv7_clampw.forward(r, w, k, v, a, b,
                                                  y, s, sa), backward(...)
    --peer official_v3=RWKV-LM/RWKV-v7/train_temp the same of cuda/rwkv7_clampw_v3.cpp and rwkv7_clampw_v3_for_h100.cu,
                                                  torch.ops.rwkv7_clampw_v3
    --peer wind=wind_rwkv                         wind_rwkv.rwkv7: load_chunked_cuda(64), attn_chunked_cuda(r, w, k, v, a, b);
                                                  decay exp(-exp(w))
    --peer fla=flash-linear-attention             fla.ops.rwkv7.chunk_rwkv7(r=, w=, k=, v=, a=, b=), w the logarithm of the decay
    --peer anything=file.py                       a file with `wkv7(r, w, k, v, a, b) -> y`, and perhaps
                                                  `prepare(r, w, k, v, a, b)`, which makes its inputs of ours

All tensors are [B, T, H, N]; our w is raw: decay = exp(-exp(-1/2) sigmoid(w)). What `prepare` does is not timed. The first
two and wind build with torch.utils.cpp_extension, and so need nvcc and ninja; fla needs triton. Interfaces as of the
snapshots read in November 2026; one that has changed shows as an error or as wrong results, and is not timed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Peer(NamedTuple):
    prepare: Callable[..., list[Tensor]]  # our six inputs -> its own
    call: Callable[..., Tensor]  # these -> y


def load(given: str) -> Peer:
    """NAME=PATH."""
    name, path = given.split("=", 1)
    if Path(path).suffix == ".py":
        return _file(Path(path))
    makers = {"official": _official, "official_v3": _official_v3, "wind": _wind, "fla": _fla}
    if name not in makers:
        raise SystemExit(f"error: --peer {given}: {name} is not one of {', '.join(makers)}, and {path} is no .py file")
    if not Path(path).is_dir():
        raise SystemExit(f"error: --peer {given}: there is no folder {path}")
    return makers[name](Path(path).resolve())


def _as_given(*inputs: Tensor) -> list[Tensor]:
    return list(inputs)


def _file(path: Path) -> Peer:
    spec = importlib.util.spec_from_file_location("peer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Peer(getattr(module, "prepare", _as_given), module.wkv7)


def _official(path: Path) -> Peer:
    return _clampw("rwkv7_clampw", [path / "cuda" / "rwkv7_clampw.cu", path / "cuda" / "rwkv7_clampw.cpp"])


def _official_v3(path: Path) -> Peer:
    return _clampw("rwkv7_clampw_v3", [path / "cuda" / "rwkv7_clampw_v3_for_h100.cu", path / "cuda" / "rwkv7_clampw_v3.cpp"])


def _clampw(name: str, sources: list[Path]) -> Peer:
    from torch.utils.cpp_extension import load as build

    length = 16
    flags = ["-D_N_=64", f"-D_CHUNK_LEN_={length}", "--use_fast_math", "-O3", "-Xptxas", "-O3", "--extra-device-vectorization"]
    build(name=name, sources=[str(s) for s in sources], is_python_module=False, extra_cuda_cflags=flags)
    ops = getattr(torch.ops, name)

    class Recurrence(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            B, T, H, N = inputs[0].shape
            y = torch.empty_like(inputs[0])
            s = y.new_empty(B, H, T // length, N, N, dtype=torch.float32)
            sa = y.new_empty(B, T, H, N, dtype=torch.float32)
            ops.forward(*inputs, y, s, sa)
            ctx.save_for_backward(*inputs, s, sa)
            return y

        @staticmethod
        def backward(ctx, dy):
            *inputs, s, sa = ctx.saved_tensors
            gradients = [torch.empty_like(x) for x in inputs]
            ops.backward(*inputs, dy.contiguous(), s, sa, *gradients)
            return tuple(gradients)

    return Peer(_as_given, Recurrence.apply)


def _wind(path: Path) -> Peer:
    sys.path.insert(0, str(path))
    from wind_rwkv.rwkv7 import attn_chunked_cuda, load_chunked_cuda

    load_chunked_cuda(64)

    def prepare(r, w, k, v, a, b):
        return [r, (-F.softplus(-w.float()) - 0.5).to(w.dtype), k, v, a, b]  # exp(w) = exp(-1/2) sigmoid(our w)

    return Peer(prepare, lambda *inputs: attn_chunked_cuda(*inputs)[0])


def _fla(path: Path) -> Peer:
    sys.path.insert(0, str(path))
    from fla.ops.rwkv7 import chunk_rwkv7

    def prepare(r, w, k, v, a, b):
        return [r, (-torch.sigmoid(w.float()) * 0.60653065971263342).to(w.dtype), k, v, a, b]

    def call(r, w, k, v, a, b):
        return chunk_rwkv7(r=r, w=w, k=k, v=v, a=a, b=b, scale=1.0, initial_state=None, output_final_state=False)[0]

    return Peer(prepare, call)
