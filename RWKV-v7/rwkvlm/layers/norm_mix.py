"""The way from the residual stream into a mixer: a LayerNorm with what comes before and after it."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.fused import norm_mix


class NormMix(nn.LayerNorm):
    """The branch before is added to the residual stream, the sum normalised, each token blended with the one before it.

    A mixer calls it, with its own blends: the block owns the norm, and under ZeRO-3 parameters are there only while their owner runs.
    """

    def forward(
        self,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        last: torch.Tensor | None,
        mixes: list[torch.Tensor],
        bounds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """x: [B, T, C] residual stream; branch: [B, T, C] or None; last: [B, C], the normalised token before x[:, 0], or None at the beginning;
        mixes: [1, 1, C] each; bounds: of packed documents (layers/packed.py).

        Returns x + branch, its last normalised token, and for each mix a [B, T, C].
        """
        return norm_mix(x, branch, self.weight, self.bias, self.eps, last, mixes, bounds)
