"""Time mixing of RWKV-7: everything around the wkv7 operator."""

from __future__ import annotations

import torch
from torch import nn

from ..config import ModelConfig
from ..ops.fused import time_mix_inputs, time_mix_output
from ..ops.wkv7 import wkv7
from .linear import Linear, dense
from .memory import Memory, MemoryState
from .norm_mix import NormMix
from .packed import Packed
from .ttt import StateTTT, TttState


class HeadNorm(nn.GroupNorm):
    """A norm over each head of what the recurrence gives, plus the current token's own value, times the gate."""

    def forward(
        self, y: torch.Tensor, r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, r_k: torch.Tensor
    ) -> torch.Tensor:
        """y, r, k, v, g: [B, T, C]; r_k: [H, N]. Returns [B, T, C]."""
        return time_mix_output(y, r, k, v, g, self.weight, self.bias, r_k, self.eps)


class TimeMix(nn.Module):
    """The generalised delta rule with vector-valued decay and in-context learning rate.

    Source: RWKV-7 paper (arXiv 2503.14456), section 4; names as in the official checkpoints.
    The first block's value is the target of the value residual of all others, so block 0 has no residual of its own;
    official files carry v0, v1, v2 there all the same, and so do we, as buffers that nothing reads.

    linear makes the large matrices. ttt, when given, runs in the place of the wkv7 operator, with a state of its own.
    """

    def __init__(self, config: ModelConfig, layer: int, linear: Linear = dense, ttt: StateTTT | Memory | None = None) -> None:
        super().__init__()
        C, H, N = config.n_embd, config.n_head, config.head_size
        self.first, self.n_head, self.head_size = layer == 0, H, N

        def vector() -> nn.Parameter:
            return nn.Parameter(torch.empty(1, 1, C))

        def low_rank(rank: int) -> tuple[nn.Parameter, nn.Parameter]:
            return nn.Parameter(torch.empty(C, rank)), nn.Parameter(torch.empty(rank, C))

        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (vector() for _ in range(6))
        self.w0, (self.w1, self.w2) = vector(), low_rank(config.rank_w)
        self.a0, (self.a1, self.a2) = vector(), low_rank(config.rank_a)
        v0, (v1, v2) = vector(), low_rank(config.rank_v)
        for name, value in (("v0", v0), ("v1", v1), ("v2", v2)):
            if layer == 0:
                self.register_buffer(name, value.detach())
            else:
                self.register_parameter(name, value)
        self.g1, self.g2 = low_rank(config.rank_g)
        self.k_k, self.k_a = vector(), vector()
        self.r_k = nn.Parameter(torch.empty(H, N))
        self.receptance = linear("att.receptance", C, C)
        self.key = linear("att.key", C, C)
        self.value = linear("att.value", C, C)
        self.output = linear("att.output", C, C)
        self.ln_x = HeadNorm(H, C, eps=64e-5)
        self.ttt = ttt

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor | TttState | MemoryState:
        """The state of the recurrence before the first token."""
        wkv = torch.zeros(
            batch, self.n_head, self.head_size, self.head_size, device=device, dtype=torch.promote_types(dtype, torch.float32)
        )
        return wkv if self.ttt is None else self.ttt.init_state(wkv)

    def forward(
        self,
        x: torch.Tensor,
        norm: NormMix,
        v_first: torch.Tensor | None,
        last: torch.Tensor | None = None,
        wkv: torch.Tensor | None = None,
        return_state: bool = False,
        packed: Packed | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """x: [B, T, C], the residual stream, which norm leads in; v_first: [B, T, C], block 0's value (None in block 0);
        last: [B, C] and wkv: [B, H, N, N] fp32, the state, or None at the beginning; packed: documents in one row.

        Returns x, the output [B, T, C] for it, v_first, and the new state: the last normalised token, and wkv (None unless return_state).
        """
        B, T, C = x.shape
        heads = (B, T, self.n_head, self.head_size)

        mixes = [self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g]
        x, last, (xr, xw, xk, xv, xa, xg) = norm(x, None, last, mixes, packed)

        r = self.receptance(xr)
        k = self.key(xk)
        v = self.value(xv)
        w = torch.tanh(xw @ self.w1) @ self.w2
        a = xa @ self.a1 @ self.a2
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        residual, v0 = ((None, None), None) if self.first else ((v_first, xv @ self.v1 @ self.v2), self.v0)

        # Operators pass on the inputs that are read again later: their backward passes get the gradients of those uses
        # and add their own, which saves additions.
        *inputs, v_first = time_mix_inputs(w, k, a, v, *residual, self.w0, self.k_k, self.k_a, self.a0, v0, self.head_size)
        r, w, k, a, b, v = (t.view(heads) for t in (r, *inputs))
        options = dict(initial_state=wkv, output_final_state=return_state, pass_on=True)
        if self.ttt is None:
            y, *new_wkv, r, k, v = wkv7(r, w, k, v, a, b, cu_seqlens=packed.bounds if packed is not None else None, **options)
        else:
            y, *new_wkv, r, k, v = self.ttt(r, w, k, v, a, b, packed=packed, **options)
        y, r, k, v = (t.reshape(B, T, C) for t in (y, r, k, v))

        return x, self.output(self.ln_x(y, r, k, v, g, self.r_k)), v if self.first else v_first, last, new_wkv[0] if return_state else None
