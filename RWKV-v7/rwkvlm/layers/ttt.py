"""Test-time training on the wkv state: at the end of each segment, gradient steps that make the state recall its values better."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..config.phantom import PhantomConfig
from ..ops.wkv7 import backend_for, ttt_cuda, wkv7
from .packed import Packed, by_document
from .segments import seen_after, stretches
from .ttt_segments import Segments


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
    """The wkv7 operator, and at each segment's end, in each head, gradient steps on a part of the state.

    With S_c the first c value rows of the state, kk_t the normalised keys and z_t the targets of the segment:

        u_t = S_c kk_t,    P(u) = u + W2 relu(W1 u),    l(S_c) = mean_t 1/2 |P(u_t) - z_t|^2 + anchor/2 |S_c - S_c,before|^2
        S_c <- S_c - eta_h grad l(S_c)

    eta = 2 sigmoid(rate) lies below 2: with |kk| = 1 and P the identity, steps diverge from there on. The gradient is
    written out, so it needs no autograd, and autograd goes through it. The targets are constants to the outer loss. The
    prediction head (W1, W2) is left out where nothing would train it.
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
        return TttState(
            wkv, wkv.new_zeros(B, T, H, N), wkv.new_zeros(B, T, H, self.rows), torch.zeros(B, dtype=torch.int64), wkv.new_zeros(B)
        )

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
        pass_on: bool = False,
        packed: Packed | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor | TttState, ...]:
        """r, w, k, v, a, b [B, T, H, N] as for wkv7, a = -kk; packed: documents in one row, without states.

        Returns y [B, T, H, N], with output_final_state also the new state, with pass_on also r, k, v. The kernel runs once
        a segment, as a segment begins with the state after the step before; an operator that has the steps in it runs once.
        """
        if packed is not None:
            return by_document(functools.partial(self.forward, pass_on=pass_on), packed, r, w, k, v, a, b)
        B, T, H, N = r.shape
        config, segment = self.config, self.config.ttt_chunk
        if T > segment and not output_final_state and (initial_state is None or not initial_state.seen.any()):
            form = self._at_once(r)
            if form is not None:
                y, *passed = form(r, w, k, v, a, b, None if initial_state is None else initial_state.wkv)
                return (y, *passed) if pass_on else y
        passed = (r, k, v) if pass_on else ()
        S, held_keys, held_values, seen, error = (
            initial_state if initial_state is not None else (None, None, None, torch.zeros(B, dtype=torch.int64), None)
        )
        plan = stretches(seen.tolist(), T, segment)
        lengths = [stretch.stop - stretch.start for stretch in plan]
        inputs = zip(*(_cut(x, lengths) for x in (r, w, k, v, a, b)))
        dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
        keys = -a.to(dtype)
        values = self._targets(k.to(dtype), v[..., : self.rows].to(dtype), keys)
        eta = 2 * torch.sigmoid(self.rate.to(dtype))[:, None, None]
        problems = zip(*(x.split(lengths, 2) for x in self._problem(keys, values, eta, segment)))
        watch = config.ttt_meta and self.training

        ys, stepped = [], False
        for i, (stretch, tensors, problem) in enumerate(zip(plan, inputs, problems)):
            if watch and stepped:
                found = self.relative_error(S, *problem[:2])
                error = found if error is None else error + found
            y, S = wkv7(*tensors, initial_state=S, output_final_state=True)
            ys.append(y)
            stepped = len(stretch.full) == B
            if i + 1 == len(plan) and not output_final_state:
                break
            if lengths[i] == segment:  # a whole segment in every row
                S = self._steps(S, *problem, eta)
                continue
            if held_keys is None:
                held_keys, held_values = keys.new_zeros(B, segment, H, N), keys.new_zeros(B, segment, H, self.rows)
            where = torch.tensor(stretch.seen)[:, None] + torch.arange(lengths[i])
            where = (torch.arange(B, device=r.device)[:, None], where.to(r.device))
            held_keys = held_keys.index_put(where, keys[:, stretch.start : stretch.stop])
            held_values = held_values.index_put(where, values[:, stretch.start : stretch.stop])
            if stepped:
                S = self.step(S, held_keys, held_values, eta)
            elif stretch.full:
                rows = torch.tensor(stretch.full, device=r.device)
                S = S.index_copy(0, rows, self.step(S[rows], held_keys[rows], held_values[rows], eta))

        y = torch.cat(ys, 1) if len(ys) > 1 else ys[0]
        if not output_final_state:
            return (y, *passed) if pass_on else y
        empty = self.init_state(S)
        keep = (new if new is not None else old for new, old in zip((S, held_keys, held_values), empty))
        return y, TttState(*keep, seen_after(plan[-1], segment), error if error is not None else empty.error), *passed

    def _at_once(self, r: torch.Tensor) -> Callable[..., tuple[torch.Tensor, ...]] | None:
        """What computes all segments of such inputs at once, from the beginning of one, and passes r, k and v on; None where nothing does.

        Several steps a segment, first-order gradients and the error after each segment are left to the loop.
        """
        config, training = self.config, torch.is_grad_enabled()
        if (
            config.ttt_steps > 1
            or (config.ttt_meta and self.training)
            or (training and not config.ttt_second_order)
            or r.dtype == torch.float16
        ):
            return None
        kernel = backend_for(r.device, r.dtype)
        if kernel == "cuda" and ttt_cuda.runs_here(r.device, r.dtype, r.shape[3], config.ttt_chunk):
            return self._in_kernel
        return self._in_segments if kernel == "cpu" and training else None

    def _in_kernel(self, r, w, k, v, a, b, S) -> tuple[torch.Tensor, ...]:
        rate = 2 * torch.sigmoid(self.rate.float()) / self.config.ttt_chunk
        head = torch.stack([self.w1.float(), self.w2.float().mT]) if self.has_head else None
        y, _, *passed = ttt_cuda.wkv7_ttt(
            r, w, k, v, a, b, S, rate, head, self.rows, self.config.ttt_chunk, self.config.ttt_target == "stored", True
        )
        return y, *passed

    def _in_segments(self, r, w, k, v, a, b, S) -> tuple[torch.Tensor, ...]:
        segment = self.config.ttt_chunk
        values = self._targets(k.float(), v[..., : self.rows].float(), -a.float())
        head = (self.w1.float(), self.w2.float()) if self.has_head else (None, None)
        rate, steps = 2 * torch.sigmoid(self.rate.float()) / segment, (r.shape[1] - 1) // segment
        return Segments.apply(r, w, k, v, a, b, S, values, rate, *head, segment, steps)[0], r, k, v

    def step(self, S: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
        """The state after the steps of one segment. S [B, H, N, N]; keys [B, n, H, N]; values [B, n, H, c]; eta [H, 1, 1]."""
        return self._steps(S, *self._problem(keys, values, eta, keys.shape[1]), eta)

    def _problem(
        self, keys: torch.Tensor, values: torch.Tensor, eta: torch.Tensor, n: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values, and keys times eta / n, with tokens behind heads: [B, H, T, N or c]. Made for all segments at once."""
        K, V = keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()
        return K, V, (K if self.config.ttt_second_order else K.detach()) * (eta / n)

    def _steps(self, S: torch.Tensor, K: torch.Tensor, V: torch.Tensor, scaled: torch.Tensor, eta: torch.Tensor) -> torch.Tensor:
        """As step, from what _problem gives for one segment. Few operations: between two segments they are what a step costs."""
        B, H, N, _ = S.shape
        core = before = S[:, :, : self.rows].flatten(0, 1)
        K, V, scaled = K.flatten(0, 1), V.flatten(0, 1), scaled.flatten(0, 1)
        for number in range(self.config.ttt_steps):
            slope, away = self._slope(core, K, V), core - before if number else None
            if not self.config.ttt_second_order:
                slope, away = slope.detach(), away.detach() if number else None
            core = torch.baddbmm(core, slope.mT, scaled, alpha=-1)
            if number:  # after the first step only: before it the anchor pulls nowhere
                core = core - self.config.ttt_anchor * eta.repeat(B, 1, 1) * away
        return torch.cat([core.unflatten(0, (B, H)), S[:, :, self.rows :]], dim=2)

    def _slope(self, core: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """d 1/2 |P(u_t) - z_t|^2 / d u_t for every token, [M, n, c].

        core [M, c, N], K [M, n, N], V [M, n, c]; M: the heads of all sequences.
        """
        if not self.has_head:
            return torch.baddbmm(V, K, core.mT, beta=-1)
        w1, w2 = self.w1.to(K.dtype), self.w2.to(K.dtype)
        U = torch.bmm(K, core.mT)
        hidden = torch.relu(U.flatten(0, 1) @ w1.mT)
        miss = torch.addmm((U - V).flatten(0, 1), hidden, w2.mT)
        return torch.addmm(miss, (miss @ w2) * (hidden > 0), w1).view_as(U)

    def relative_error(self, S: torch.Tensor, K: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """|P(S_c kk) - z|^2 / |z|^2 over tokens and heads, [B], of S [B, H, N, N] with K [B, H, n, N] and V [B, H, n, c].

        Relative, so that its weight in the outer loss means the same for every model: |z|^2 itself is in the hundreds.
        """
        U = K @ S[:, :, : self.rows].mT
        if self.has_head:
            U = U + torch.relu(U @ self.w1.to(U.dtype).mT) @ self.w2.to(U.dtype).mT
        return (U - V).square().sum((1, 2, 3)) / V.square().sum((1, 2, 3)).clamp(min=1e-6)

    def _targets(self, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """z [B, T, H, c], without a gradient: v, or what the delta rule has stored for the key, v (k . kk)."""
        k, v, keys = k.detach(), v.detach(), keys.detach()
        return v if self.config.ttt_target == "value" else v * (k * keys).sum(-1, keepdim=True)


def _cut(x: torch.Tensor, lengths: list[int]) -> list[torch.Tensor]:
    """x [B, T, H, N] -> contiguous pieces of these lengths along T. Not slices, whose backward would pad each to the whole."""
    if len(set(lengths)) == 1:
        return list(x.unflatten(1, (len(lengths), -1)).transpose(0, 1).contiguous().unbind(0))
    return [piece.contiguous() for piece in x.split(lengths, 1)]
