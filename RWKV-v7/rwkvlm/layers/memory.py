"""A memory beside the recurrence: a small network per head whose weights are trained on the text while it is read.

Source: Test-Time Training Done Right (arXiv 2505.23884): gated fast weights, one normalised step per large segment, read by every token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..config.phantom import PhantomConfig
from .segments import pieces, seen_after
from .token_shift import token_shift


class MemoryState(NamedTuple):
    """last: [B, C] last normalised input
    fast: [B, h, 3, N, N] fp32, the fast weights W1, W3 and W2^T
    sums: the same shape, gradients summed over the tokens of the segment that is not complete
    seen: [B] int64 on the CPU, these tokens
    """

    last: torch.Tensor
    fast: torch.Tensor
    sums: torch.Tensor
    seen: torch.Tensor


class Memory(nn.Module):
    """A residual branch. Per head of N channels, with q, k of length 1 and v made from the normalised input and its token shift:

        f(x) = W2 (silu(W1 x) * W3 x),     o_t = f(q_t),     l = - sum_t rate_t f(k_t) . v_t
        at a segment's end     W <- norm(W - grad l)

    The gradient is written out. Within a segment W does not change, so the gradient is a sum over tokens as they come, and the state needs
    none of them; norm gives each row its initial length, so W neither grows nor fades however long the text is. Matrices act on rows:
    fast[0] = W1, fast[1] = W3, [hidden, N]; fast[2] = W2^T, [hidden, N]. The output begins at zero: the model begins as it is without.
    """

    def __init__(self, config: PhantomConfig) -> None:
        super().__init__()
        C, M, N = config.n_embd, config.memory_dim, config.head_size
        self.segment, self.heads, self.head_size = config.ttt_chunk, M // N, N
        self.ln = nn.LayerNorm(C)
        self.x_q, self.x_k, self.x_v = (nn.Parameter(torch.empty(1, 1, C)) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(C, M, bias=False) for _ in range(3))
        self.rate = nn.Linear(C, self.heads)
        self.fast = nn.Parameter(torch.empty(self.heads, 3, N, N))
        self.ln_x = nn.GroupNorm(self.heads, M, eps=1e-5)
        self.output = nn.Linear(M, C, bias=False)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MemoryState:
        """The state before the first token."""
        fast = self._fast(batch).to(device)
        return MemoryState(torch.zeros(batch, self.query.in_features, device=device, dtype=dtype), fast, torch.zeros_like(fast), torch.zeros(batch, dtype=torch.int64))

    def _fast(self, batch: int) -> torch.Tensor:
        return self.fast.to(torch.promote_types(self.fast.dtype, torch.float32)).expand(batch, -1, -1, -1, -1)

    def forward(self, x: torch.Tensor, state: MemoryState | None = None, return_state: bool = False) -> tuple[torch.Tensor, MemoryState | None]:
        """x: [B, T, C], the residual stream. Returns what is added to it, and the new state or None."""
        B, T, C = x.shape
        x = self.ln(x)
        last, fast, sums, seen = state if state is not None else (None, self._fast(B), None, torch.zeros(B, dtype=torch.int64))
        xx = token_shift(x, last) - x
        q, k, v = (project(torch.addcmul(x, xx, mix)).view(B, T, self.heads, -1).transpose(1, 2).to(fast.dtype)
                   for project, mix in ((self.query, self.x_q), (self.key, self.x_k), (self.value, self.x_v)))  # fmt: skip
        q, k = F.normalize(F.silu(q), dim=-1), F.normalize(F.silu(k), dim=-1)
        v = v * F.softplus(self.rate(x).mT.to(fast.dtype)).unsqueeze(-1)

        plan = pieces(seen.tolist(), T, self.segment)
        lengths = [piece.stop - piece.start for piece in plan]
        read = []
        for i, (piece, Q, K, V) in enumerate(zip(plan, *(t.split(lengths, 2) for t in (q, k, v)))):
            read.append(self._read(fast, Q))
            if i + 1 == len(plan) and not return_state:
                break
            gradient = self._gradient(fast, K, V)
            sums = gradient if sums is None else sums + gradient
            if len(piece.full) == B:
                fast, sums = self._step(fast, sums), None
            elif piece.full:
                rows = torch.tensor(piece.full, device=x.device)
                fast = fast.index_copy(0, rows, self._step(fast[rows], sums[rows]))
                sums = sums.index_fill(0, rows, 0)

        o = torch.cat(read, 2).transpose(1, 2).reshape(B * T, -1).to(x.dtype)
        y = self.output(self.ln_x(o)).view(B, T, C)
        if not return_state:
            return y, None
        return y, MemoryState(x[:, -1], fast, torch.zeros_like(fast) if sums is None else sums, seen_after(plan[-1], self.segment))

    def _read(self, fast: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
        """f(q): fast [B, h, 3, N, N], Q [B, h, n, N] -> [B, h, n, N]."""
        W1, W3, W2t = fast.unbind(2)
        return (F.silu(Q @ W1.mT) * (Q @ W3.mT)) @ W2t

    def _gradient(self, fast: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """grad l summed over the tokens, [B, h, 3, N, N]; K [B, h, n, N], V [B, h, n, N] times the rates."""
        W1, W3, W2t = fast.unbind(2)
        A, G = K @ W1.mT, K @ W3.mT
        s = torch.sigmoid(A)
        silu = A * s
        D = V @ W2t.mT  # -dl/d(silu * G)
        dA, dG = D * G * (s + silu * (1 - s)), D * silu
        return -torch.stack([dA.mT @ K, dG.mT @ K, (silu * G).mT @ V], dim=2)

    def _step(self, fast: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        length = self.fast.to(fast.dtype).norm(dim=-1, keepdim=True)
        return F.normalize(fast - sums, dim=-1) * length
