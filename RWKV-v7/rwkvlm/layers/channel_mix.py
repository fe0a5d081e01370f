"""Channel mixing of RWKV-7: a squared-ReLU MLP on a blend of each token with the one before it."""

from __future__ import annotations

import torch
from torch import nn

from ..config import ModelConfig
from ..ops.fused import relu_square, token_mix
from .linear import Linear, dense


class ChannelMix(nn.Module):
    """`V relu(K (x + (shift(x) - x) * x_k))^2`. Source: RWKV-7 paper (arXiv 2503.14456), section 4."""

    def __init__(self, config: ModelConfig, linear: Linear = dense) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, config.n_embd))
        self.key = linear("ffn.key", config.n_embd, config.dim_ffn)
        self.value = linear("ffn.value", config.dim_ffn, config.n_embd)

    def forward(self, x: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        """x: [B, T, C]; last: [B, C], the token before x[:, 0], or None at the beginning. Returns [B, T, C]."""
        (mixed,) = token_mix(x, last, [self.x_k])
        return self.value(relu_square(self.key(mixed)))
