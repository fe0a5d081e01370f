"""Attention in the place of RWKV-7's time mixing: causal softmax over all earlier tokens, or over a window of them."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import HybridConfig
from .linear import dense
from .norm_mix import NormMix
from .packed import Packed, by_document


class KeyValues(NamedTuple):
    """What attention remembers: normalised keys and values, [B, G, tokens, N] each.

    Those of all tokens so far; where there is a window, of the last window - 1.
    """

    k: Tensor
    v: Tensor


class Attention(nn.Module):
    """`O (softmax(scale q k^T / sqrt(N)) v * sigmoid(xg g1 g2))`, H heads of queries on G heads of keys and values.

    Token shift, blends and names are as in RWKV-7. q and k have a LayerNorm in each head, so that no product grows
    without bound (arXiv 2010.04245, 2302.05442), and one learned scale of each channel, which q is multiplied by: without
    a position encoding between q and k only the product of their two scales would count. The gate is that of Kimi Linear
    (arXiv 2510.26692) and of Qwen3-Next (arXiv 2505.06708); fewer heads of keys and values: arXiv 2305.13245.

    There is no position encoding: the RWKV-7 blocks below and the token shift know the order, as Kimi Linear's linear
    layers do, whose attention has none either; so a text may become longer than those trained on, and a remembered key
    needs no place. v_first passes by: the values of attention are not mixed into one state, and there may be fewer heads
    of them.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        C, N, groups = config.n_embd, config.head_size, config.attention_kv_heads
        self.head_size, self.groups, self.window = N, groups, config.attention_window
        self.x_q, self.x_k, self.x_v, self.x_g, self.scale = (nn.Parameter(torch.empty(1, 1, C)) for _ in range(5))
        self.g1, self.g2 = nn.Parameter(torch.empty(C, config.rank_g)), nn.Parameter(torch.empty(config.rank_g, C))
        self.query = dense("att.query", C, C)
        self.key = dense("att.key", C, groups * N)
        self.value = dense("att.value", C, groups * N)
        self.output = dense("att.output", C, C)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> KeyValues:
        """Nothing is remembered; it grows with the tokens read, up to the window."""
        return KeyValues(*(torch.empty(batch, self.groups, 0, self.head_size, device=device, dtype=dtype) for _ in "kv"))

    def forward(
        self,
        x: Tensor,
        norm: NormMix,
        v_first: Tensor | None,
        last: Tensor | None = None,
        past: KeyValues | None = None,
        return_state: bool = False,
        packed: Packed | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, KeyValues | None]:
        """Arguments and results as for TimeMix, with KeyValues in the place of wkv."""
        x, last, (xq, xk, xv, xg) = norm(x, None, last, [self.x_q, self.x_k, self.x_v, self.x_g], packed)
        q, k, v = (y.unflatten(-1, (-1, self.head_size)) for y in (self.query(xq), self.key(xk), self.value(xv)))
        q, k = (F.layer_norm(y, (self.head_size,)) for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (q * self.scale.view(q.shape[2:]), k, v))
        if past is not None:
            k, v = torch.cat([past.k, k], dim=2), torch.cat([past.v, v], dim=2)
        y = by_document(functools.partial(attend, window=self.window), packed, q, k, v, dim=2)
        gate = torch.sigmoid(xg @ self.g1 @ self.g2)
        out = self.output(y.transpose(1, 2).flatten(2) * gate)
        return x, out, v_first, last, self._remembered(k, v) if return_state else None

    def _remembered(self, k: Tensor, v: Tensor) -> KeyValues:
        if not 0 < self.window <= k.shape[2]:
            return KeyValues(k, v)
        return KeyValues(*(t[:, :, t.shape[2] - self.window + 1 :].clone() for t in (k, v)))  # a view would keep the rest in memory


def attend(q: Tensor, k: Tensor, v: Tensor, window: int = 0) -> Tensor:
    """Causal attention of the last T of K tokens, each of which sees `window` tokens, itself included (0: all before it).

    q: [B, H, T, N]; k, v: [B, G, K, N], G a divisor of H; the K - T tokens before are fewer than window. Returns [B, H, T, N].
    Nothing of size T x T is made: from the window-th token on queries are cut into blocks of `window`, each of which sees its own tokens
    and those of the block before (arXiv 2004.05150), with one small mask for all of them.
    """
    T, before = q.shape[2], k.shape[2] - q.shape[2]
    if not 0 < window < T:
        return _attend(q, k, v, window)
    first = _attend(q[:, :, :window], k[:, :, : before + window], v[:, :, : before + window], window)
    blocks = -(-T // window) - 1
    padding = (0, 0, 0, (blocks + 1) * window - T)  # at the end, where no token that counts sees it
    queries = F.pad(q[:, :, window:], padding).unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)
    keys, values = (F.pad(t[:, :, before:], padding).unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1) for t in (k, v))
    rest = _attend(queries, keys, values, window).unflatten(0, (-1, blocks)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest[:, :, : T - window]], dim=2)


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """As attend, in one product, for T not above the window."""
    (T, K), (H, G) = (q.shape[2], k.shape[2]), (q.shape[1], k.shape[1])
    if T == K or (T == 1 and not 0 < window < K):  # without a mask PyTorch has its fastest kernels
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=G != H)
    place = torch.arange(K, device=q.device)
    back = place[K - T :, None] - place  # how far each key lies behind each query
    mask = (back >= 0) & (back < window) if window else back >= 0
    if G != H:  # a GPU's kernels with a mask know no groups
        k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
