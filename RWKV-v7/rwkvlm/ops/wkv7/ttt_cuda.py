"""The CUDA kernels with test-time training of the state inside, as a torch operator: all segments in one call, forwards and backwards."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from . import cuda
from .arguments import check_arguments


@backend.decided_while_tracing
def runs_here(device: torch.device, dtype: torch.dtype, N: int, segment: int) -> bool:
    """Whether they take these inputs: bf16 on tensor cores, segments of whole chunks.

    Only where cuda.why_not has returned "" for this device.
    """
    return cuda.form_for(dtype, cuda.machine(device).capability) == "chunked" and segment % cuda.chunk_tokens("chunked", N) == 0


def wkv7_ttt(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    rate: Tensor,
    head: Tensor | None,
    rows: int,
    segment: int,
    stored: bool,
    pass_on: bool = False,
) -> tuple[Tensor, ...]:
    """wkv7, and after each of the first (T - 1) // segment segments a gradient step on the state; layers/ttt.py has the formula.

    r, w, k, v, a, b [B, T, H, N] bfloat16, a = -kk; initial_state [B, H, N, N] float32 or None. rate [H] float32: eta / segment.
    head [2, hidden, rows] float32: W1 and the transpose of W2, or None. rows: the first value rows of the state, which the
    steps change. stored: targets are v (k . kk), else v; they are constants.
    Returns y and the state after the last token, with pass_on also r, k, v, as wkv7 does. Gradients reach the six
    inputs, initial_state, rate and head. Only where `runs_here`.
    """
    inputs = (r, w, k, v, a, b)
    check_arguments(inputs, initial_state, None)
    return torch.ops.rwkvlm.wkv7_ttt_cuda(*inputs, initial_state, rate, head, rows, segment, stored, pass_on, cuda.number_of(r.device))
