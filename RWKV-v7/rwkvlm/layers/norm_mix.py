"""From the residual stream into a mixer: residual addition, LayerNorm and token shift as one operator."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.fused import norm_mix
from .packed import Packed


class NormMix(nn.LayerNorm):
    """Adds the output of the branch before to the residual stream, normalises the sum, and blends each token with the one before it.

    The mixer calls it, with blends of its own; the norm belongs to the block. Under ZeRO-3 a parameter is there only
    while the module that owns it runs.
    """

    def forward(
        self,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        last: torch.Tensor | None,
        mixes: list[torch.Tensor],
        packed: Packed | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Returns x + branch, its last normalised token [B, C], and for each mix a [B, T, C].

        x: [B, T, C] residual stream; branch: [B, T, C] or None; last: [B, C], the normalised token before x[:, 0], or None
        at the beginning; mixes: [1, 1, C] each; packed: documents in one row.
        """
        return norm_mix(x, branch, self.weight, self.bias, self.eps, last, mixes, packed.bounds if packed is not None else None)
