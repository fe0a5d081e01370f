"""WKV4 in plain PyTorch, for every other device and dtype: in chunks of tokens, each a softmax over the tokens before it and the state."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import state_dtype
from .reference import empty_state

# work grows with it, Python's share falls: of 2, 4, 8 and 16 the fastest or nearly so, at 1 and at 8 x 512 tokens of 768 channels
CHUNK = 8


def wkv4_chunked(w: Tensor, u: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """w [C], the logarithm of the decay, u [C], k, v [B, T, C], state [B, 3, C] -> y [B, T, C], final state."""
    dtype = state_dtype(k.dtype)
    a, b, p = (empty_state(k) if initial_state is None else initial_state).unbind(1)
    y = []
    for keys, values in zip(k.to(dtype).split(CHUNK, dim=1), v.to(dtype).split(CHUNK, dim=1)):
        out, a, b, p = _chunk(w, u, keys, values, a, b, p)
        y.append(out)
    return torch.cat(y, dim=1).to(k.dtype), torch.stack([a, b, p], dim=1)


def _chunk(w: Tensor, u: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y of the chunk [B, L, C], and the state after it."""
    L = k.shape[1]
    t = torch.arange(L, device=k.device)
    age = (t[:, None] - 1 - t).to(k.dtype)  # [L, L]: row t sees column s, decayed so many times
    seen = k.unsqueeze(1) + age.clamp(min=0).unsqueeze(-1) * w  # [B, L, L, C]
    here = (age == -1).unsqueeze(-1)
    exponents = torch.where(here, (u + k).unsqueeze(1), seen).masked_fill((age < -1).unsqueeze(-1), float("-inf"))
    old = p.unsqueeze(1) + t.to(k.dtype).unsqueeze(-1) * w  # [B, L, C]: of the state
    most = torch.maximum(old, exponents.amax(2)).detach()
    weights, before = torch.exp(exponents - most.unsqueeze(2)), torch.exp(old - most)
    y = ((weights * v.unsqueeze(1)).sum(2) + before * a.unsqueeze(1)) / (weights.sum(2) + before * b.unsqueeze(1))

    exponents, old = k + (L - 1 - t).to(k.dtype).unsqueeze(-1) * w, p + L * w
    most = torch.maximum(old, exponents.amax(1))
    weights, before = torch.exp(exponents - most.unsqueeze(1)), torch.exp(old - most)
    return y, (weights * v).sum(1) + before * a, weights.sum(1) + before * b, most
