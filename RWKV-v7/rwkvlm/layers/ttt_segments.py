"""Training through many segments of test-time training at once: kernel and steps in turns, with the derivative of the whole written out.

Between two segments the number of operations is what a step costs, not their arithmetic. So the loops here hold only
what one segment needs of the one before, forwards the state and backwards its derivative; all else is one product over
all segments. layers/ttt.py is the reference.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from ..ops.wkv7 import native


class Segments(torch.autograd.Function):
    """y, the state after the last token: the wkv7 operator, with a gradient step after each of the first `steps` segments.

    The steps are on the first c value rows of the state, second-order. What follows these segments, at most one more,
    has none.
    """

    @staticmethod
    def forward(ctx, r, w, k, v, a, b, state, values, rate, w1, w2, segment, steps):
        """r, w, k, v, a, b [B, T, H, N] as for wkv7, a = -kk; state [B, H, N, N] or None.

        values [B, T, H, c], the targets; rate [H] = eta / segment; w1 [h, c], w2 [c, h] or None.
        """
        (B, _, H, N), c = r.shape, values.shape[3]
        save = any(ctx.needs_input_grad)
        K, Z = _by_segment(a, segment, steps).to(values.dtype).neg(), _by_segment(values, segment, steps)  # [steps, B H, segment, .]
        rates = rate.repeat(B)[:, None, None]
        scaled = K * rates
        U, slope, cores = torch.empty_like(Z), torch.empty_like(Z), Z.new_empty(steps, B * H, c, N)
        made = [U, slope]
        if w1 is not None:
            miss, (hidden, inner) = torch.empty_like(Z), (Z.new_empty(*Z.shape[:3], w1.shape[0]) for _ in range(2))
            made += [miss, hidden, inner]
        each = zip(*(x.unbind(0) for x in (K, Z, scaled, cores, U, slope)), zip(*(_tokens(x) for x in made)))
        pieces = list(zip(*(_cut(x, segment, steps) for x in (r, w, k, v, a, b))))
        ys, saved = [], []
        for inputs in pieces:
            y, state, *rest = native.forward(*inputs, state, save)
            ys.append(y)
            saved += rest
            if len(ys) > steps:
                break
            key, z, scaled_key, core, u, gradient, (u_, gradient_, *head) = next(each)
            now = state.flatten(0, 1)[:, :c]
            core.copy_(now)
            torch.bmm(key, core.mT, out=u)
            if head:
                m, h, g = head
                torch.mm(u_, w1.mT, out=h).relu_()
                torch.addmm(torch.sub(u, z).view_as(u_), h, w2.mT, out=m)
                g.copy_(torch.ops.aten.threshold_backward(m @ w2, h, 0))
                torch.addmm(m, g, w1, out=gradient_)
            else:
                torch.sub(u, z, out=gradient)
            now.baddbmm_(gradient.mT, scaled_key, alpha=-1)
        if save:
            ctx.sizes = segment, steps
            ctx.save_for_backward(K, scaled, cores, rates, w1, w2, *made)
            ctx.pieces, ctx.kept = pieces, saved
        return torch.cat(ys, 1), state

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_state):
        K, scaled, cores, rates, w1, w2, U, slope, *head = ctx.saved_tensors
        segment, steps = ctx.sizes
        (_, _, _, c), (B, _, H, _) = U.shape, d_y.shape
        d_cores, d_slope = torch.empty_like(cores), torch.empty_like(U)
        d_U, made = d_slope, [d_slope]
        if head:
            miss, hidden, inner = head
            d_U, d_miss, (d_inner, d_hidden) = torch.empty_like(U), torch.empty_like(U), (torch.empty_like(hidden) for _ in range(2))
            made += [d_U, d_miss, d_inner, d_hidden, (hidden > 0).to(hidden.dtype)]
        each = zip(*(reversed(x.unbind(0)) for x in (K, scaled, d_cores, d_slope, d_U)), zip(*(reversed(_tokens(x)) for x in made)))
        grads = []
        for i, dy in reversed([*enumerate(_cut(d_y, segment, steps))]):
            *found, d_state = native.backward(dy, d_state, *ctx.pieces[i], *ctx.kept[2 * i : 2 * i + 2])
            grads.append(found)
            if i == 0:
                break
            key, scaled_key, d_core, ds, du, (ds_, *tokens) = next(each)  # the step before this segment, d_core with the sign of K
            now = d_state.flatten(0, 1)[:, :c]
            d_core.copy_(now)
            torch.bmm(scaled_key, d_core.mT, out=ds).neg_()
            if head:
                du_, m, g, h, active = tokens
                torch.mm(ds_, w1.mT, out=g).mul_(active)
                torch.addmm(ds_, g, w2.mT, out=m)
                torch.mm(m, w2, out=h).mul_(active)
                torch.addmm(m, h, w1, out=du_)
            now.baddbmm_(du.mT, key)
        d_r, d_w, d_k, d_v, d_a, d_b = (torch.cat(found, 1) for found in zip(*reversed(grads)))
        # keys take part in u = core k and in the step core -= slope^T k rate; a = -k
        d_a[:, : segment * steps] += _in_sequence(((slope * rates) @ d_cores).sub_(d_U @ cores), B)
        d_rate = -((K @ d_cores.mT) * slope).sum((0, 2, 3)).view(B, H).sum(0)
        d_w1 = d_w2 = None
        if head:
            rows = lambda x: x.flatten(0, 2)
            d_w1 = torch.addmm(rows(inner).mT @ rows(d_slope), rows(d_hidden).mT, rows(U))
            d_w2 = torch.addmm(rows(miss).mT @ rows(d_inner), rows(d_miss).mT, rows(hidden))
        d_initial = d_state if ctx.needs_input_grad[6] else None
        return d_r, d_w, d_k, d_v, d_a, d_b, d_initial, None, d_rate, d_w1, d_w2, None, None


def _cut(x: torch.Tensor, segment: int, steps: int) -> list[torch.Tensor]:
    """[B, T, H, n] -> the segments and what follows them, contiguous, in two copies."""
    whole = x[:, : segment * steps].unflatten(1, (steps, segment)).transpose(0, 1).contiguous()
    return [*whole.unbind(0), x[:, segment * steps :].contiguous()]


def _tokens(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[steps, B H, segment, n] -> [B H segment, n] for each step."""
    return x.flatten(1, 2).unbind(0)


def _by_segment(x: torch.Tensor, segment: int, steps: int) -> torch.Tensor:
    """[B, T, H, n] -> the first segments as [steps, B H, segment, n]."""
    B, _, H, n = x.shape
    cut = x[:, : segment * steps].reshape(B, steps, segment, H, n).permute(1, 0, 3, 2, 4)
    return cut.reshape(steps, B * H, segment, n).contiguous()


def _in_sequence(x: torch.Tensor, B: int) -> torch.Tensor:
    """The inverse of _by_segment."""
    steps, _, segment, n = x.shape
    return x.view(steps, B, -1, segment, n).permute(1, 0, 3, 2, 4).reshape(B, steps * segment, -1, n)
