"""Time mixing and channel mixing of RWKV-4; names as in the official files."""

from __future__ import annotations

import functools

import torch
from torch import nn

from ..config import ModelConfig
from ..ops.fused import relu_square
from ..ops.wkv4 import EMPTY, wkv4
from .linear import dense
from .norm_mix import NormMix
from .packed import Packed, by_document


def _vector(channels: int) -> nn.Parameter:
    """The share of the token itself in a blend with the one before it."""
    return nn.Parameter(torch.empty(1, 1, channels))


class TimeMix4(nn.Module):
    """`O (sigmoid(R x_r) * wkv4(K x_k, V x_v))`, each x a blend of the token and the one before it.

    Source: RWKV-4 paper (arXiv 2305.13048).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.time_decay, self.time_first = (nn.Parameter(torch.empty(C)) for _ in range(2))
        self.time_mix_k, self.time_mix_v, self.time_mix_r = (_vector(C) for _ in range(3))
        self.key, self.value, self.receptance, self.output = (
            dense(f"att.{name}", C, C) for name in ("key", "value", "receptance", "output")
        )

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The state of the recurrence before the first token."""
        wkv = torch.zeros(batch, 3, self.key.in_features, device=device, dtype=torch.promote_types(dtype, torch.float32))
        wkv[:, 2] = EMPTY
        return wkv

    def forward(
        self,
        x: torch.Tensor,
        norm: NormMix,
        v_first: None,
        last: torch.Tensor | None = None,
        wkv: torch.Tensor | None = None,
        return_state: bool = False,
        packed: Packed | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, None, torch.Tensor, torch.Tensor | None]:
        """x: [B, T, C], the residual stream, which norm leads in; v_first: RWKV-7's, None here;
        last: [B, C] and wkv: [B, 3, C] fp32, the state, or None at the beginning; packed: documents in one row.

        Returns x, the output [B, T, C] for it, v_first, and the new state: the last normalised token, and wkv (None unless return_state).
        """
        mixes = [1 - self.time_mix_k, 1 - self.time_mix_v, 1 - self.time_mix_r]  # norm's are the shares of the token before
        x, last, (xk, xv, xr) = norm(x, None, last, mixes, packed)
        recurrence = functools.partial(wkv4, self.time_decay, self.time_first, initial_state=wkv, output_final_state=return_state)
        out = by_document(recurrence, packed, self.key(xk), self.value(xv))
        y, wkv = out if return_state else (out, None)
        return x, self.output(torch.sigmoid(self.receptance(xr)) * y), v_first, last, wkv


class ChannelMix4(nn.Module):
    """`sigmoid(R x_r) * V relu(K x_k)^2`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.time_mix_k, self.time_mix_r = _vector(C), _vector(C)
        self.key = dense("ffn.key", C, config.dim_ffn)
        self.receptance = dense("ffn.receptance", C, C)
        self.value = dense("ffn.value", config.dim_ffn, C)

    def forward(
        self, x: torch.Tensor, branch: torch.Tensor, norm: NormMix, last: torch.Tensor | None = None, packed: Packed | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, branch, last, packed: what norm takes. Returns x + branch, the output [B, T, C], and the last normalised token [B, C]."""
        x, last, (xk, xr) = norm(x, branch, last, [1 - self.time_mix_k, 1 - self.time_mix_r], packed)
        return x, torch.sigmoid(self.receptance(xr)) * self.value(relu_square(self.key(xk))), last
