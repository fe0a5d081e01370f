"""What a block remembers between two calls in recurrent mode."""

from __future__ import annotations

from typing import NamedTuple

import torch


class BlockState(NamedTuple):
    """State of one block for a batch of B sequences; but for attention its size does not depend on the number of tokens read.

    att_x: [B, C] last normalised input of time mixing
    wkv:   [B, H, N, N] fp32, value rows times key columns; of RWKV-4 [B, 3, C] (ops/wkv4), of attention KeyValues; with steps on the
           state a TttState, with a memory a MemoryState
    ffn_x: [B, C] last normalised input of channel mixing
    """

    att_x: torch.Tensor
    wkv: torch.Tensor
    ffn_x: torch.Tensor
