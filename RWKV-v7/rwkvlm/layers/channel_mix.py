"""Channel mixing of RWKV-7: a squared-ReLU MLP on a blend of each token with the one before it."""

from __future__ import annotations

import torch
from torch import nn

from ..config import ModelConfig, RosaConfig
from ..ops.fused import relu_square
from .linear import Linear, dense
from .norm_mix import NormMix
from .packed import Packed


class ChannelMix(nn.Module):
    """`V relu(K (x + (shift(x) - x) * x_k))^2`. Source: RWKV-7 paper (arXiv 2503.14456), section 4."""

    def __init__(self, config: ModelConfig, linear: Linear = dense) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = linear("ffn.key", config.n_embd, config.dim_ffn)
        self.value = linear("ffn.value", config.dim_ffn, config.n_embd)

    def forward(
        self,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        norm: NormMix,
        last: torch.Tensor | None = None,
        packed: Packed | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, branch, last, packed: what norm takes. Returns x + branch, the output [B, T, C], and the last normalised token [B, C]."""
        x, last, (mixed,) = norm(x, branch, last, [self.x_k], packed)
        return x, self.value(relu_square(self.key(mixed))), last


class DeepChannelMix(ChannelMix):
    """DeepEmbed: channel mixing whose output is multiplied elementwise by a learned vector of the token. Source: RWKV-LM, RWKV-8."""

    def __init__(self, config: RosaConfig) -> None:
        super().__init__(config)
        self.enn = nn.Embedding(config.vocab_size, config.n_embd)

    def forward(
        self,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        norm: NormMix,
        last: torch.Tensor | None,
        packed: Packed | None,
        tokens: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """tokens: [B, T] int64; else as ChannelMix."""
        x, y, last = super().forward(x, branch, norm, last, packed)
        return x, y * self.enn(tokens), last
