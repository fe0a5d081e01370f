"""WKV4, the recurrence of RWKV-4: the contract, and the choice of who computes it.

    y_t = (A_{t-1} + exp(u + k_t) v_t) / (B_{t-1} + exp(u + k_t))
    A_t = d A_{t-1} + exp(k_t) v_t,   B_t = d B_{t-1} + exp(k_t),   d = exp(-exp(w))

in each channel by itself: a mean of the values seen so far, each weighted by its key and its age. A and B leave the
range of numbers, so that the state holds A exp(-p), B exp(-p) and p, the largest exponent among their terms.

Source: the RWKV-4 paper, arXiv 2305.13048, and RWKV-LM, RWKV-v4neo.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ..arguments import state_dtype
from ..launch import on_either_device
from . import native
from .arguments import EMPTY, check_arguments
from .chunked import wkv4_chunked
from .native import wkv4_native
from .reference import wkv4_reference

__all__ = ["EMPTY", "backend_for", "wkv4", "wkv4_chunked", "wkv4_native", "wkv4_reference"]


def wkv4(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None, output_final_state: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence over T tokens for B rows and C channels.

    k, v: [B, T, C], contiguous, bfloat16 or float32 (float64 runs in plain PyTorch, float16 in float32), any T >= 1.
    w, u: [C], of the dtype of k or float32. w is the raw decay, any real number, as time_decay is in the official files.
    initial_state: [B, 3, C] float32: A exp(-p), B exp(-p), p; None: nothing seen yet, which is 0, 0, EMPTY.
    Returns y [B, T, C] in the dtype of k, with output_final_state also the float32 state after the last token.
    Gradients reach all four inputs and initial_state. ValueError for anything else; UserError for a kernel that cannot run.
    """
    dtype = k.dtype
    w, u, k, v = backend.widened(w, u, k, v)
    check_arguments(w, u, k, v, initial_state)
    form = wkv4_chunked if backend_for(k.device, k.dtype, k.shape[2]) == "torch" else wkv4_native
    y, state = form(-torch.exp(w.to(state_dtype(k.dtype))), u.to(state_dtype(k.dtype)), k, v, initial_state)
    y = y.to(dtype)
    return (y, state) if output_final_state else y


@backend.decided_while_tracing
def backend_for(device: torch.device, dtype: torch.dtype, channels: int = 16) -> str:
    """Who computes it here: "cuda", "cpu" or "torch"; builds what is missing. UserError for a kernel asked for that cannot run."""
    dtype = backend.computed_in(dtype)
    return backend.choose("wkv4", device, on_either_device("wkv4", lambda: native.why_not(dtype, channels)))
