"""One residual block: time mixing, then channel mixing, each behind a LayerNorm."""

from __future__ import annotations

import torch
from torch import nn

from ..config import ModelConfig
from ..layers.channel_mix import ChannelMix
from ..layers.linear import Linear, dense
from ..layers.norm_mix import NormMix
from ..layers.packed import Packed
from ..layers.state import BlockState
from ..layers.time_mix import TimeMix


class Block(nn.Module):
    """`x += att(ln1(x)); x += ffn(ln2(x))`; block 0 also normalises the embedding with ln0. att: in the place of RWKV-7's time mixing."""

    def __init__(self, config: ModelConfig, layer: int, linear: Linear = dense, ttt: nn.Module | None = None, att: nn.Module | None = None) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head, self.head_size = config.n_head, config.head_size
        self.ln0 = nn.LayerNorm(C) if layer == 0 else None  # the layer's number is not kept: only blocks with equal attributes share one compilation
        self.ln1 = NormMix(C)
        self.ln2 = NormMix(C)
        self.att = TimeMix(config, layer, linear, ttt) if att is None else att
        self.ffn = ChannelMix(config, linear)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        return BlockState.zeros(batch, self.n_head, self.head_size, device, dtype)

    def forward(
        self, x: torch.Tensor, v_first: torch.Tensor | None, state: BlockState | None = None, return_state: bool = False, packed: Packed | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, BlockState | None]:
        """x: [B, T, C] residual stream; v_first: [B, T, C] block 0's value. Returns x, v_first and the new state or None."""
        if self.ln0 is not None:
            x = self.ln0(x)
        return self.mix(x, v_first, state, return_state, packed)

    def mix(
        self, x: torch.Tensor, v_first: torch.Tensor | None, state: BlockState | None = None, return_state: bool = False, packed: Packed | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, BlockState | None]:
        """The two residual branches; arguments and results as for forward."""
        att_x, wkv, ffn_x = state if state is not None else (None, None, None)
        x, att, v_first, att_x, wkv = self.att(x, self.ln1, v_first, att_x, wkv, return_state, packed)
        x, ffn, ffn_x = self.ffn(x, att, self.ln2, ffn_x, packed.bounds if packed is not None else None)
        return x + ffn, v_first, BlockState(att_x, wkv, ffn_x) if return_state else None
