"""One residual block: time mixing, then channel mixing, each behind a LayerNorm."""

from __future__ import annotations

import torch
from torch import nn

from ..config import ModelConfig
from ..layers.norm_mix import NormMix
from ..layers.packed import Packed
from ..layers.state import BlockState


class Block(nn.Module):
    """`x += att(ln1(x)); x += ffn(ln2(x))`; block 0 also normalises the embedding with ln0.

    att, ffn: the mixers, with the signatures of TimeMix and ChannelMix.
    """

    def __init__(self, config: ModelConfig, layer: int, att: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        C = config.n_embd
        # the layer's number is not kept: only blocks with equal attributes share one compilation
        self.ln0 = nn.LayerNorm(C) if layer == 0 else None
        self.ln1 = NormMix(C)
        self.ln2 = NormMix(C)
        self.att = att
        self.ffn = ffn

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> BlockState:
        x = torch.zeros(batch, *self.ln1.normalized_shape, device=device, dtype=dtype)
        return BlockState(x, self.att.init_state(batch, device, dtype), x.clone())

    def forward(
        self,
        x: torch.Tensor,
        v_first: torch.Tensor | None,
        state: BlockState | None = None,
        return_state: bool = False,
        packed: Packed | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, BlockState | None]:
        """x: [B, T, C] residual stream; v_first: [B, T, C] block 0's value, None with RWKV-4. Returns x, v_first, the new state or None."""
        if self.ln0 is not None:
            x = self.ln0(x)
        return self.mix(x, v_first, state, return_state, packed)

    def mix(
        self,
        x: torch.Tensor,
        v_first: torch.Tensor | None,
        state: BlockState | None = None,
        return_state: bool = False,
        packed: Packed | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, BlockState | None]:
        """The two residual branches; arguments and results as for forward."""
        att_x, wkv, ffn_x = state if state is not None else (None, None, None)
        x, att, v_first, att_x, wkv = self.att(x, self.ln1, v_first, att_x, wkv, return_state, packed)
        x, ffn, ffn_x = self.ffn(x, att, self.ln2, ffn_x, packed)
        return x + ffn, v_first, BlockState(att_x, wkv, ffn_x) if return_state else None
