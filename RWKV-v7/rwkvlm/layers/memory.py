"""A memory beside the recurrence: a layer over learned features of the keys, whose weights are trained on the text while it is read.

Sources: Linear Transformers Are Secretly Fast Weight Programmers (arXiv 2102.11174), for the delta rule over features of a key; Learning to
(Learn at Test Time) (arXiv 2407.04620), for its being a gradient step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..config.phantom import PhantomConfig
from ..ops.wkv7 import wkv7
from .packed import Packed

# in bfloat16 a key of length 1 may be a little longer, and the step times its square must stay below 2, where M would grow
LARGEST_STEP = 1.984375
NO_DECAY = -30.0  # of which wkv7's decay is 1 but for 6e-14


class MemoryState(NamedTuple):
    """wkv: [B, H, N, N] fp32, as RWKV-7's
    fast: [B, H, N, m] fp32, the memory's weights M
    """

    wkv: torch.Tensor
    fast: torch.Tensor


class Memory(nn.Module):
    """The wkv7 operator, and beside it, for each head, a matrix M [N, m] of fast weights over m features of its keys, which begins at zero:

        f(x) = z / |z|,  z = silu(W1 x) * W3 x           W1, W3 [m, N], one pair for all heads of a layer
        M <- M - eta_h grad 1/2 |M f(kk_t) - v_t|^2      after each token; eta = 2 sigmoid(rate) < 2: from 2 on the steps diverge
        y_t = S_t r_t + gain * M f(r_t / |r_t|)

    Features are near to products of pairs of a key's coordinates, so there may be more of them than channels, and more
    keys than N are told apart. The step is that of the delta rule, M (1 - eta f f^T) + eta v f^T, which is wkv7's own
    recurrence without a decay: its kernels compute it, exactly and with the derivative through all steps. gain begins
    at zero: at first the model is what it is without a memory.
    """

    def __init__(self, config: PhantomConfig) -> None:
        super().__init__()
        H, N, m = config.n_head, config.head_size, config.ttt_features
        self.features = nn.Parameter(torch.empty(2, m, N))
        self.rate = nn.Parameter(torch.empty(H))
        self.gain = nn.Parameter(torch.empty(H, N))

    def init_state(self, wkv: torch.Tensor) -> MemoryState:
        """The state before the first token, around RWKV-7's."""
        return MemoryState(wkv, wkv.new_zeros(*wkv.shape[:3], self.features.shape[1]))

    def forward(
        self,
        r: torch.Tensor,
        w: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        initial_state: MemoryState | None = None,
        output_final_state: bool = False,
        pass_on: bool = False,
        packed: Packed | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor | MemoryState, ...]:
        """r, w, k, v, a, b [B, T, H, N] as for wkv7, a = -kk; packed: documents in one row, without states.

        Returns y [B, T, H, N], with output_final_state also the new state, with pass_on also r, k, v.
        """
        wkv, fast = initial_state if initial_state is not None else (None, None)
        options = dict(output_final_state=True, cu_seqlens=packed.bounds if packed is not None else None)
        y, wkv, r, k, v = wkv7(r, w, k, v, a, b, wkv, pass_on=True, **options)
        asked, key = self._features(_unit(r)), self._features(-a)
        step = (2 * torch.sigmoid(self.rate)).clamp(max=LARGEST_STEP).to(key.dtype)[:, None] * key
        N, missing = v.shape[-1], key.shape[-1] - v.shape[-1]  # the operator has as many values as keys
        wide, fast = (v, fast) if not missing else (F.pad(v, (0, missing)), F.pad(fast, (0, 0, 0, missing)) if fast is not None else None)
        read, fast = wkv7(asked, torch.full_like(key, NO_DECAY), step, wide, -key, step, fast, **options)
        y, fast = torch.addcmul(y, self.gain, read[..., :N]), fast[:, :, :N].clone() if missing else fast
        out = (y, *([MemoryState(wkv, fast)] if output_final_state else []), *((r, k, v) if pass_on else ()))
        return out if len(out) > 1 else y

    def _features(self, x: torch.Tensor) -> torch.Tensor:
        """x: [B, T, H, N], of length 1. Returns [B, T, H, m], of length 1."""
        first, second = (x @ self.features.flatten(0, 1).mT).chunk(2, -1)
        return _unit(F.silu(first) * second)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1).to(x.dtype)
