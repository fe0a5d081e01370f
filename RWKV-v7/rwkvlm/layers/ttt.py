"""Test-time training on the wkv state: at the end of each segment, gradient steps that make the state recall the segment's values better."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..config.phantom import PhantomConfig
from ..ops.wkv7 import wkv7
from .segments import pieces, seen_after


class TttState(NamedTuple):
    """wkv:    [B, H, N, N] fp32, as RWKV-7's
    keys:   [B, segment, H, N] fp32, normalised keys of the segment that is not complete, rows from `seen` on are meaningless
    values: [B, segment, H, c] fp32, its targets
    seen:   [B] int64 on the CPU, tokens in it; rows of a batch may stand at different positions
    error:  [B] fp32, sum over the steps so far of the relative error on the segment after each; counted when meta-learning only
    """

    wkv: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    seen: torch.Tensor
    error: torch.Tensor


class StateTTT(nn.Module):
    """The wkv7 operator, and at each segment's end, per head, with S_c the first c value rows of the state, kk_t the normalised keys and z_t
    the targets of the segment:

        u_t = S_c kk_t,    P(u) = u + W2 relu(W1 u),    l(S_c) = mean_t 1/2 |P(u_t) - z_t|^2 + anchor/2 |S_c - S_c,before|^2
        S_c <- S_c - eta_h grad l(S_c)

    eta = 2 sigmoid(rate) lies below 2: with |kk| = 1 and P the identity, that is where steps do not diverge. The gradient is written out,
    so it needs no autograd, and autograd goes through it. The targets are constants to the outer loss.
    The prediction head is left out where nothing would train it.
    """

    def __init__(self, config: PhantomConfig) -> None:
        super().__init__()
        self.config, self.rows = config, config.ttt_rows
        self.rate = nn.Parameter(torch.empty(config.n_head))
        self.has_head = config.has_ttt_head
        if self.has_head:
            self.w1 = nn.Parameter(torch.empty(self.rows // 4, self.rows))
            self.w2 = nn.Parameter(torch.empty(self.rows, self.rows // 4))

    def init_state(self, wkv: torch.Tensor) -> TttState:
        """The state before the first token, around RWKV-7's."""
        B, H, N, _ = wkv.shape
        T = self.config.ttt_chunk
        return TttState(wkv, wkv.new_zeros(B, T, H, N), wkv.new_zeros(B, T, H, self.rows), torch.zeros(B, dtype=torch.int64), wkv.new_zeros(B))

    def forward(
        self,
        r: torch.Tensor,
        w: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        initial_state: TttState | None = None,
        output_final_state: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, TttState]:
        """r, w, k, v, a, b [B, T, H, N] as for wkv7, a = -kk. Returns y [B, T, H, N], with output_final_state also the new state.

        The kernel runs once a segment: the state after a step is what the next segment begins with.
        """
        B, T, H, N = r.shape
        config, segment = self.config, self.config.ttt_chunk
        S, held_keys, held_values, seen, error = initial_state if initial_state is not None else (None, None, None, torch.zeros(B, dtype=torch.int64), None)
        plan = pieces(seen.tolist(), T, segment)
        lengths = [piece.stop - piece.start for piece in plan]
        inputs = zip(*(_Cut.apply(x, lengths) for x in (r, w, k, v, a, b)))
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        keys = -a.to(dtype)
        values = self._targets(k.to(dtype), v[..., : self.rows].to(dtype), keys)
        eta = 2 * torch.sigmoid(self.rate.to(dtype))[:, None, None]
        problems = zip(*(x.transpose(1, 2).contiguous().split(lengths, 2) for x in (keys, values)))
        watch = config.ttt_meta and self.training

        ys, stepped = [], False
        for i, (piece, tensors, problem) in enumerate(zip(plan, inputs, problems)):
            if watch and stepped:
                found = self.relative_error(S, *problem)
                error = found if error is None else error + found
            y, S = wkv7(*tensors, initial_state=S, output_final_state=True)
            ys.append(y)
            stepped = len(piece.full) == B
            if i + 1 == len(plan) and not output_final_state:
                break
            if lengths[i] == segment:  # a whole segment in every row
                S = self._steps(S, *problem, eta)
                continue
            if held_keys is None:
                held_keys, held_values = keys.new_zeros(B, segment, H, N), keys.new_zeros(B, segment, H, self.rows)
            where = torch.tensor(piece.seen)[:, None] + torch.arange(lengths[i])
            where = (torch.arange(B, device=r.device)[:, None], where.to(r.device))
            held_keys = held_keys.index_put(where, keys[:, piece.start : piece.stop])
            held_values = held_values.index_put(where, values[:, piece.start : piece.stop])
            if stepped:
                S = self.step(S, held_keys, held_values, eta)
            elif piece.full:
                rows = torch.tensor(piece.full, device=r.device)
                S = S.index_copy(0, rows, self.step(S[rows], held_keys[rows], held_values[rows], eta))

        y = torch.cat(ys, 1) if len(ys) > 1 else ys[0]
        if not output_final_state:
            return y
        empty = self.init_state(S)
        keep = (new if new is not None else old for new, old in zip((S, held_keys, held_values), empty))
        return y, TttState(*keep, seen_after(plan[-1], segment), error if error is not None else empty.error)

    def step(self, S: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
        """The state after the steps of one segment. S [B, H, N, N]; keys [B, n, H, N]; values [B, n, H, c]; eta [H, 1, 1]."""
        return self._steps(S, keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous(), eta)

    def _steps(self, S: torch.Tensor, K: torch.Tensor, V: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
        """As step, with tokens behind heads: K [B, H, n, N], V [B, H, n, c]."""
        before, head = S[:, :, : self.rows], (self.w1.to(K.dtype), self.w2.to(K.dtype)) if self.has_head else (None, None)
        for number in range(self.config.ttt_steps):
            away = S[:, :, : self.rows] - before if number else None
            S = _GradientStep.apply(S, K, V, eta, *head, self.config.ttt_second_order)
            if number:  # after the first step only: before it the anchor pulls nowhere
                away = away if self.config.ttt_second_order else away.detach()
                S = torch.cat([S[:, :, : self.rows] - self.config.ttt_anchor * eta * away, S[:, :, self.rows :]], dim=2)
        return S

    def gradient(self, core: torch.Tensor, before: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """grad l, [M, c, N], of core [M, c, N] with K [M, n, N] and V [M, n, c]; one row of M is one head of one sequence."""
        head = (self.w1.to(K.dtype), self.w2.to(K.dtype)) if self.has_head else (None, None)
        return _slope(core, K, V, *head)[0].mT @ K / K.shape[1] + self.config.ttt_anchor * (core - before)

    def inner_loss(self, core: torch.Tensor, before: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """l for each of M; shapes as for gradient."""
        return 0.5 * self._miss(core, K, V).square().sum(-1).mean(-1) + self.config.ttt_anchor / 2 * (core - before).square().sum((-2, -1))

    def relative_error(self, S: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """|P(S_c kk) - z|^2 / |z|^2 over tokens and heads, [B], of S [B, H, N, N] with K [B, H, n, N] and V [B, H, n, c]. Relative, so that its weight in the outer
        loss means the same for every model: |z|^2 itself is in the hundreds."""
        miss = self._miss(S[:, :, : self.rows], K, V)
        return miss.square().sum((1, 2, 3)) / V.square().sum((1, 2, 3)).clamp(min=1e-6)

    def _miss(self, core: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        U = K @ core.mT
        if self.has_head:
            U = U + torch.relu(U @ self.w1.to(U.dtype).mT) @ self.w2.to(U.dtype).mT
        return U - V

    @torch.no_grad()
    def _targets(self, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """z [B, T, H, c]: v, or what the delta rule has stored for the key, v (k . kk)."""
        return v if self.config.ttt_target == "value" else v * (k * keys).sum(-1, keepdim=True)


def _slope(core: torch.Tensor, K: torch.Tensor, V: torch.Tensor, w1: torch.Tensor | None, w2: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """d 1/2 |P(u_t) - z_t|^2 / d u_t for every token, [M, n, c], with core [M, c, N], K [M, n, N] and V [M, n, c]. With a head also what its
    derivative takes, [M n, ...]: u, relu(W1 u), P(u) - z, and its gradient before W1."""
    if w1 is None:
        return (torch.baddbmm(V, K, core.mT, beta=-1),)
    U = torch.bmm(K, core.mT)
    u = U.flatten(0, 1)
    hidden = torch.relu(u @ w1.mT)
    miss = torch.addmm((U - V).flatten(0, 1), hidden, w2.mT)
    inner = (miss @ w2) * (hidden > 0)
    return torch.addmm(miss, inner, w1).view_as(U), u, hidden, miss, inner


class _GradientStep(torch.autograd.Function):
    """One step on the first rows of every head's state. Its derivative is written out too: between two segments the number of operations is what a
    step costs, and autograd through the gradient has three times as many."""

    @staticmethod
    def forward(ctx, S, K, V, eta, w1, w2, second_order):
        """S [B, H, N, N], K [B, H, n, N], V [B, H, n, c], eta [H, 1, 1] -> S after the step."""
        (B, H), c, n = S.shape[:2], V.shape[3], K.shape[2]
        core, k, rate = S[:, :, :c].flatten(0, 1), K.flatten(0, 1), (eta / n).repeat(B, 1, 1)
        slope, *rest = _slope(core, k, V.flatten(0, 1), w1, w2)
        scaled = slope * rate
        after = S.clone()
        after[:, :, :c] = torch.baddbmm(core, scaled.mT, k, alpha=-1).unflatten(0, (B, H))
        ctx.second_order = second_order
        ctx.save_for_backward(core, k, rate, slope, scaled, w1, w2, *rest)
        return after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_after):
        core, k, rate, slope, scaled, w1, w2, *rest = ctx.saved_tensors
        (B, H), (_, n, c) = d_after.shape[:2], slope.shape
        d_core = d_after[:, :, :c].flatten(0, 1)
        d_scaled = torch.bmm(k, d_core.mT).neg_()
        d_eta = (d_scaled * slope).sum((1, 2)).view(B, H).sum(0).view(H, 1, 1) / n if ctx.needs_input_grad[3] else None
        if not ctx.second_order:
            return d_after, None, None, d_eta, None, None, None
        d_slope, d_w1, d_w2 = d_scaled.mul_(rate), None, None
        d_u = d_slope
        if w1 is not None:  # slope = miss + inner W1, inner = (miss W2) [hidden > 0], miss = u - z + hidden W2^T
            u, hidden, miss, inner = rest
            d_slope, active = d_slope.flatten(0, 1), hidden > 0
            d_inner = (d_slope @ w1.mT).mul_(active)
            d_miss = torch.addmm(d_slope, d_inner, w2.mT)
            d_hidden = (d_miss @ w2).mul_(active)
            d_u = torch.addmm(d_miss, d_hidden, w1).view_as(slope)
            d_w1 = torch.addmm(inner.mT @ d_slope, d_hidden.mT, u)
            d_w2 = torch.addmm(miss.mT @ d_inner, d_miss.mT, hidden)
        d_S = d_after.clone()
        d_S[:, :, :c] = torch.baddbmm(d_core, d_u.mT, k).unflatten(0, (B, H))
        d_K = torch.baddbmm(torch.bmm(d_u, core), scaled, d_core, alpha=-1).unflatten(0, (B, H))
        return d_S, d_K, None, d_eta, d_w1, d_w2, None


class _Cut(torch.autograd.Function):
    """x [B, T, H, N] -> contiguous pieces of these lengths along T. The backward of slices would pad each to the whole; here all are joined at once."""

    @staticmethod
    def forward(ctx, x, lengths):
        return tuple(piece.contiguous() for piece in x.split(lengths, 1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return torch.cat(grads, 1), None
