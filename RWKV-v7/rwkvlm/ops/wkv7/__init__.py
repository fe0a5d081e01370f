"""WKV7, the recurrence of RWKV-7: the contract, and the choice of who computes it.

For each head, with a state S [N, N]:

    S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   d_t = exp(-exp(-1/2) sigmoid(w_t)),   y_t = S_t r_t
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from . import cuda, native
from .arguments import check_arguments
from .chunked import wkv7_chunked
from .cuda import wkv7_cuda
from .native import wkv7_native
from .reference import wkv7_reference

__all__ = ["backend_for", "wkv7", "wkv7_chunked", "wkv7_cuda", "wkv7_native", "wkv7_reference"]


def wkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    pass_on: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Run the recurrence over T tokens for B rows and H heads.

    r, w, k, v, a, b: [B, T, H, N], contiguous, bfloat16 or float32 (float64 runs in plain PyTorch, float16 in float32), any T >= 1,
        N in {16, 32, 64, 128}. w is the raw decay, any real number. The model passes a = -kk, b = kk * in-context rate.
    initial_state: [B, H, N, N] float32 (rows value, columns key); zeros when None.
    cu_seqlens: [documents + 1] int32 or int64, rising from 0 to T, with B = 1: documents packed in one row, the state is
        reset at each boundary; states are then [documents, H, N, N].
    Returns y [B, T, H, N] in the dtype of r, with output_final_state also the float32 state after the last token, with
    pass_on also r, k and v: for what reads them besides, so that the gradients of both are added up as they are stored,
    without passes over memory of their own.
    Gradients reach all six inputs and initial_state. ValueError for anything else; UserError for a kernel that cannot run.
    """
    inputs = backend.widened(r, w, k, v, a, b)
    check_arguments(inputs, initial_state, cu_seqlens)
    form = backend_for(r.device, r.dtype)
    if form == "torch":
        y, state, *passed = *wkv7_chunked(*inputs, initial_state, cu_seqlens), inputs[0], inputs[2], inputs[3]
    else:
        y, state, *passed = {"cuda": wkv7_cuda, "cpu": wkv7_native}[form](*inputs, initial_state, cu_seqlens, pass_on)
    y, *passed = (x.to(r.dtype) for x in (y, *passed))
    out = (y, *([state] if output_final_state else []), *(passed if pass_on else []))
    return out if len(out) > 1 else y


@backend.decided_while_tracing
def backend_for(device: torch.device, dtype: torch.dtype) -> str:
    """Who computes it here: "cuda", "cpu" or "torch"; builds what is missing. UserError for a kernel asked for that cannot run."""
    dtype = backend.computed_in(dtype)
    supported = {"cuda": lambda: cuda.why_not(dtype), "cpu": lambda: native.why_not(dtype)}
    return backend.choose("wkv7", device, supported)
