"""The optimizer's step and the norms of gradients: one pass over memory each, and the choice of who makes it.

A step of AdamW moves 28 bytes a parameter and computes little: its time is that of the memory. So gradients stay as backward left
them, bf16 or fp32, clipping is a factor that the step applies, and a bf16 parameter is rounded from its master on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ..launch import on_either_device
from . import native, plain

__all__ = ["adamw_", "backend_for", "gradient_norms"]


def adamw_(
    masters: list[Tensor], rounded: list[Tensor], grads: list[Tensor],
    exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], steps: list[Tensor],
    scale: Tensor | None, found_inf: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    """One step of AdamW, in place (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with bias correction).

    masters, exp_avgs, exp_avg_sqs   fp32, contiguous
    rounded    bf16 parameters, which become their masters; or [] where the masters are the parameters
    grads      bf16 or fp32; computed with in fp32, multiplied by scale, a scalar (None: 1)
    steps      fp32 scalars, the steps made before; each is raised by 1
    found_inf  a scalar: where it is not 0, nothing changes
    """
    form = _form(masters[0].device)
    form.adamw_(masters, rounded, grads, exp_avgs, exp_avg_sqs, steps, scale, found_inf, lr, beta1, beta2, eps, weight_decay)


def gradient_norms(grads: list[Tensor]) -> Tensor:
    """The Euclidean norm of each gradient (bf16 or fp32): [len(grads)] fp32.

    The native kernels' bits are the same on each run, on any number of threads.
    """
    return _form(grads[0].device).gradient_norms(grads)


def backend_for(device: torch.device) -> str:
    """Who computes it here: "cuda", "cpu", or "torch" (its own fused step). UserError for a kernel asked for that cannot run.

    Builds what is missing.
    """
    return backend.choose("adamw", device, on_either_device("adamw", native.why_not))


def _form(device: torch.device):
    return plain if backend_for(device) == "torch" else native  # native: the operators of cuda/adamw, which have a form for either device
