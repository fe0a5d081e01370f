"""What a block remembers between two calls in recurrent mode."""

from __future__ import annotations

from typing import NamedTuple

import torch


class BlockState(NamedTuple):
    """State of one block for a batch of B sequences; memory is constant in the number of tokens read.

    att_x: [B, C] last normalised input of time mixing
    wkv:   [B, H, N, N] fp32, value rows times key columns; of an RWKV-4 [B, 3, C] (ops/wkv4)
    ffn_x: [B, C] last normalised input of channel mixing
    """

    att_x: torch.Tensor
    wkv: torch.Tensor
    ffn_x: torch.Tensor

    @classmethod
    def zeros(cls, batch: int, n_head: int, head_size: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        """The state before the first token."""
        x = torch.zeros(batch, n_head * head_size, device=device, dtype=dtype)
        wkv = torch.zeros(batch, n_head, head_size, head_size, device=device, dtype=torch.promote_types(dtype, torch.float32))
        return cls(x, wkv, x.clone())
