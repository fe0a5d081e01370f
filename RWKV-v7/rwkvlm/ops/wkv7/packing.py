"""Packed documents for the PyTorch forms: one after the other, each with a state of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .arguments import sequence_bounds


def per_sequence(form: Callable) -> Callable:
    """Give `form(r, w, k, v, a, b, initial_state) -> (y, final_state)` the further argument cu_seqlens and keep it out of autocast."""

    @functools.wraps(form)
    def packed(r, w, k, v, a, b, initial_state: Tensor | None = None, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        inputs = (r, w, k, v, a, b)
        with torch.autocast(r.device.type, enabled=False):  # its bf16 matmuls would round the state
            if cu_seqlens is None:
                return form(*inputs, initial_state)
            bounds = sequence_bounds(cu_seqlens, r.shape[1])
            results = [
                form(*(x[:, start:end] for x in inputs), None if initial_state is None else initial_state[i : i + 1])
                for i, (start, end) in enumerate(zip(bounds, bounds[1:]))
            ]
        return torch.cat([y for y, _ in results], dim=1), torch.cat([state for _, state in results])

    return packed
