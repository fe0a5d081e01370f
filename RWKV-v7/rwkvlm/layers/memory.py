"""A memory beside the recurrence: a small network per head whose weights are trained on the text while it is read.

Source: Test-Time Training Done Right (arXiv 2505.23884): gated fast weights, one normalised step per large segment, read by every token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ..config.phantom import PhantomConfig
from ..ops.fused import token_mix
from .packed import Packed, by_document
from .segments import pieces, seen_after


class MemoryState(NamedTuple):
    """last: [B, C] last normalised input
    fast: [B, h, 3, m, N] fp32, the fast weights W1, W3 and W2^T of m hidden units
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
    fast[0] = W1, fast[1] = W3, fast[2] = W2^T, each [m, N]. The output begins at zero: at first the model is what it is without a memory.
    """

    def __init__(self, config: PhantomConfig) -> None:
        super().__init__()
        C, M, N = config.n_embd, config.memory_dim, config.head_size
        self.segment, self.heads, self.head_size = config.ttt_chunk, M // N, N
        self.ln = nn.LayerNorm(C)
        self.x_q, self.x_k, self.x_v = (nn.Parameter(torch.empty(1, 1, C)) for _ in range(3))
        self.query, self.key, self.value = (nn.Linear(C, M, bias=False) for _ in range(3))
        self.rate = nn.Linear(C, self.heads)
        self.fast = nn.Parameter(torch.empty(self.heads, 3, config.memory_rows, N))
        self.ln_x = nn.GroupNorm(self.heads, M, eps=1e-5)
        self.output = nn.Linear(M, C, bias=False)

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> MemoryState:
        """The state before the first token."""
        fast = self._fast(batch).to(device)
        return MemoryState(torch.zeros(batch, self.query.in_features, device=device, dtype=dtype), fast, torch.zeros_like(fast), torch.zeros(batch, dtype=torch.int64))

    def _fast(self, batch: int) -> torch.Tensor:
        return self.fast.to(torch.promote_types(self.fast.dtype, torch.float32)).expand(batch, -1, -1, -1, -1)

    def forward(
        self, x: torch.Tensor, state: MemoryState | None = None, return_state: bool = False, packed: Packed | None = None
    ) -> tuple[torch.Tensor, MemoryState | None]:
        """x: [B, T, C], the residual stream; packed: documents in one row, without states. Returns what is added to it, and the new state or None."""
        B, T, C = x.shape
        x = self.ln(x)
        if packed is not None:
            x = x.index_fill(1, packed.bounds[1:].long() - 1, 0)  # padding
        last, fast, *begun = state if state is not None else (None, self._fast(B), None, torch.zeros(B, dtype=torch.int64))
        mixed = token_mix(x, last, [self.x_q, self.x_k, self.x_v])
        q, k, v = (project(xi).view(B, T, self.heads, -1).transpose(1, 2).to(fast.dtype) for project, xi in zip((self.query, self.key, self.value), mixed))
        q, k = F.normalize(F.silu(q), dim=-1), F.normalize(F.silu(k), dim=-1)
        v = v * F.softplus(self.rate(x).mT.to(fast.dtype)).unsqueeze(-1)

        if packed is None:
            o, *remembered = self._by_segment(q, k, v, fast, *begun, return_state)
        else:
            o = by_document(lambda *document: self._by_segment(*document, fast, *begun, False)[0], packed, q, k, v, dim=2)
        o = o.transpose(1, 2).reshape(B * T, -1).to(x.dtype)
        y = self.output(self.ln_x(o)).view(B, T, C)
        return y, MemoryState(x[:, -1].clone(), *remembered) if return_state else None

    def _by_segment(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, fast: torch.Tensor, sums: torch.Tensor | None, seen: torch.Tensor, return_state: bool
    ) -> tuple[torch.Tensor, ...]:
        """q, k, v: [B, h, T, N]. Returns f(q) of the same shape, with return_state also fast, sums and seen behind the last token."""
        plan = pieces(seen.tolist(), q.shape[2], self.segment)
        lengths = [piece.stop - piece.start for piece in plan]
        read = []
        for i, (piece, Q, K, V) in enumerate(zip(plan, *(t.split(lengths, 2) for t in (q, k, v)))):
            read.append(_Read.apply(fast, Q))
            if i + 1 == len(plan) and not return_state:
                break
            gradient = _Gradient.apply(fast, K, V)
            sums = gradient if sums is None else sums + gradient
            if len(piece.full) == len(q):
                fast, sums = self._step(fast, sums), None
            elif piece.full:
                rows = torch.tensor(piece.full, device=q.device)
                fast = fast.index_copy(0, rows, self._step(fast[rows], sums[rows]))
                sums = sums.index_fill(0, rows, 0)
        o = torch.cat(read, 2)
        return (o, fast, torch.zeros_like(fast) if sums is None else sums, seen_after(plan[-1], self.segment)) if return_state else (o,)

    def _step(self, fast: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
        length = self.fast.to(fast.dtype).norm(dim=-1, keepdim=True)
        return F.normalize(fast - sums, dim=-1) * length


class _Read(torch.autograd.Function):
    """f(q): fast [B, h, 3, m, N], q [B, h, n, N] -> [B, h, n, N]. Derivatives are written out, here and below: they take fewer operations over
    all tokens than autograd's."""

    @staticmethod
    def forward(ctx, fast, q):
        W, Q = fast.flatten(0, 1), q.flatten(0, 1)
        AG = Q @ W[:, :2].flatten(1, 2).mT
        A, G = AG.chunk(2, -1)
        hidden = F.silu(A).mul_(G)
        ctx.save_for_backward(W, Q, AG, hidden)
        return (hidden @ W[:, 2]).view(q.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_o):
        W, Q, AG, hidden = ctx.saved_tensors
        d_O, (A, G) = d_o.reshape(Q.shape), AG.chunk(2, -1)
        d_hidden, s = d_O @ W[:, 2].mT, torch.sigmoid(A)
        silu, slope = _silu(A, s)
        d_AG, rows = torch.empty_like(AG), G.shape[-1]
        torch.mul(d_hidden * G, slope, out=d_AG[..., :rows])
        torch.mul(d_hidden, silu, out=d_AG[..., rows:])
        d_fast = torch.cat([d_AG.mT @ Q, hidden.mT @ d_O], 1).view(*d_o.shape[:2], 3, *W.shape[2:])
        return d_fast, (d_AG @ W[:, :2].flatten(1, 2)).view(d_o.shape)


class _Gradient(torch.autograd.Function):
    """grad l summed over the tokens, [B, h, 3, m, N]: fast as there, k [B, h, n, N], v [B, h, n, N] times the rates.

    With A = W1 k, G = W3 k, D = W2^T v: -grad l = [(D G silu'(A)) k^T, (D silu(A)) k^T, (silu(A) G) v^T].
    """

    @staticmethod
    def forward(ctx, fast, k, v):
        W, K, V = (x.flatten(0, 1) for x in (fast, k, v))
        AG, D = K @ W[:, :2].flatten(1, 2).mT, V @ W[:, 2].mT
        A, G = AG.chunk(2, -1)
        silu, slope = _silu(A, torch.sigmoid(A))
        P = torch.empty_like(AG)
        torch.mul(D * G, slope, out=P[..., : D.shape[-1]])
        torch.mul(D, silu, out=P[..., D.shape[-1] :])
        hidden = silu * G
        ctx.save_for_backward(W, K, V, AG, D, P, hidden)
        return torch.cat([P.mT @ K, hidden.mT @ V], 1).neg_().view(fast.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_gradient):
        W, K, V, AG, D, P, hidden = ctx.saved_tensors
        heads, rows = (*d_gradient.shape[:2], *K.shape[1:]), D.shape[-1]
        A, G = AG.chunk(2, -1)
        s = torch.sigmoid(A)
        silu, slope = _silu(A, s)
        E = d_gradient.neg().flatten(0, 1)
        E13, E2, W13 = E[:, :2].flatten(1, 2), E[:, 2], W[:, :2].flatten(1, 2)
        d_P, d_hidden = K @ E13.mT, V @ E2.mT
        d_P1, d_P3 = d_P.chunk(2, -1)
        DG, GP = D * G, G * d_P1
        d_D = torch.addcmul(d_P3 * silu, GP, slope)
        d_silu = torch.addcmul(d_P3 * D, d_hidden, G)
        # silu'' = (1 - s) (s + silu' - silu s)
        bend = torch.addcmul(s + slope, silu, s, value=-1).mul_(1 - s)
        d_AG = torch.empty_like(AG)
        torch.add(d_silu.mul_(slope), bend.mul_(DG).mul_(d_P1), out=d_AG[..., :rows])
        torch.add((d_P1 * D).mul_(slope), d_hidden * silu, out=d_AG[..., rows:])
        d_K = torch.baddbmm(P @ E13, d_AG, W13)
        d_V = torch.baddbmm(hidden @ E2, d_D, W[:, 2])
        d_fast = torch.cat([d_AG.mT @ K, d_D.mT @ V], 1).view(d_gradient.shape)
        return d_fast, d_K.view(heads), d_V.view(heads)


def _silu(A: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(A) and its derivative, s = sigmoid(A)."""
    silu = A * s
    return silu, torch.addcmul(s, silu, 1 - s)
