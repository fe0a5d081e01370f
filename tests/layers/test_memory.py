"""The fast-weight memory: its gradient against autograd, derivatives through its step, and that it learns while reading."""

import torch
from torch.nn import functional as F

from rwkvlm.config import PhantomConfig
from rwkvlm.layers.memory import Memory, _Gradient, _Read
from rwkvlm.models.phantom import TABLE
from rwkvlm.models.table import init_from_table

B, C, N = 2, 32, 16
CONFIG = PhantomConfig(n_layer=1, n_embd=C, head_size=N, vocab_size=8, ttt_kind="memory", ttt_chunk=16, memory_dim=32, ttt_lr=0.1)


class Holder(torch.nn.Module):
    """Gives the memory the name that it has in a model, for the table."""

    def __init__(self):
        super().__init__()
        self.config = CONFIG
        self.blocks = torch.nn.ModuleList([torch.nn.Module()])
        self.blocks[0].mem = Memory(CONFIG)


def make(noise=0.3, dtype=torch.float64):
    holder = Holder().to(dtype)
    init_from_table(holder, TABLE, 0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in holder.parameters():
            p.add_(noise * torch.randn(p.shape, generator=g, dtype=torch.float64) / p.shape[-1] ** 0.5)
    return holder.blocks[0].mem


def random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_gradient_is_that_of_the_inner_loss():
    memory = make()
    fast = memory._fast(B).detach().clone().requires_grad_()
    K, V = random(B, 2, 7, N), random(B, 2, 7, N, seed=2)
    (want,) = torch.autograd.grad(-(_Read.apply(fast, K) * V).sum(), fast)
    assert torch.allclose(_Gradient.apply(fast, K, V), want, rtol=1e-11, atol=1e-13)


def test_derivatives_that_are_written_out():
    fast, Q, K, V = (random(B, 2, *shape, seed=seed).requires_grad_() for seed, shape in enumerate(((3, 6, 4), (5, 4), (5, 4), (5, 4))))
    assert torch.autograd.gradcheck(_Read.apply, (fast, Q))  # 6 hidden units in heads of 4
    assert torch.autograd.gradcheck(_Gradient.apply, (fast, K, V))


def test_derivatives_through_the_step():
    memory = make()
    x = random(1, 20, C).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, fast: torch.func.functional_call(memory, {"fast": fast}, (x,))[0], (x, memory.fast), fast_mode=True)
    early = torch.autograd.grad(memory(x)[0][:, 17:].square().sum(), [memory.key.weight, memory.value.weight, memory.rate.weight])
    assert all(g.abs().max() > 0 for g in early), "later tokens train what was written"


def slowly(memory, x):
    """What the memory adds to the residual stream x [T, C], token by token and head by head, from the formulas; and its fast weights at the end."""
    weights = {name: p.detach() for name, p in memory.named_parameters()}
    x = F.layer_norm(x, (C,), weights["ln.weight"], weights["ln.bias"])
    before = torch.cat([torch.zeros(1, C, dtype=x.dtype), x[:-1]])
    q, k, v = (torch.einsum("oi,ti->to", weights[f"{name}.weight"], x + (before - x) * weights[f"x_{name[0]}"][0]).unflatten(1, (-1, N)) for name in ("query", "key", "value"))
    rate = torch.log1p(torch.exp(torch.einsum("oi,ti->to", weights["rate.weight"], x) + weights["rate.bias"]))
    fast, read = weights["fast"].clone(), torch.empty_like(v)
    for start in range(0, len(x), memory.segment):
        moved = torch.zeros_like(fast)
        for t in range(start, min(start + memory.segment, len(x))):
            for h in range(memory.heads):
                unit = [(y * torch.sigmoid(y)) / (y * torch.sigmoid(y)).norm() for y in (q[t, h], k[t, h])]
                W1, W3, W2 = (matrix.clone().requires_grad_() for matrix in fast[h])
                found = [((W1 @ y) * torch.sigmoid(W1 @ y) * (W3 @ y)) @ W2 for y in unit]
                read[t, h] = found[0].detach()
                moved[h] += torch.stack(torch.autograd.grad(rate[t, h] * (found[1] @ v[t, h]), (W1, W3, W2)))
        if t - start + 1 == memory.segment:
            fast = F.normalize(fast + moved, dim=-1) * weights["fast"].norm(dim=-1, keepdim=True)
    out = F.group_norm(read.flatten(1), memory.heads, weights["ln_x.weight"], weights["ln_x.bias"], eps=1e-5)
    return out @ weights["output.weight"].T, fast


def test_against_the_formulas():
    memory = make()
    x = random(1, 37, C)
    with torch.no_grad():
        y, end = memory(x, None, True)
    want, fast = slowly(memory, x[0])
    assert torch.allclose(y[0], want, rtol=1e-9, atol=1e-11) and torch.allclose(end.fast[0], fast, rtol=1e-9) and end.seen.tolist() == [5]


def test_begins_as_nothing():
    memory = make(noise=0)
    assert not memory(random(B, 40, C))[0].any()


def test_a_step_recalls_what_was_read():
    memory = make(noise=0)
    with torch.no_grad():
        fast = memory._fast(B)
        K, V = F.normalize(random(B, 2, 16, N), dim=-1), random(B, 2, 16, N, seed=2)
        after = memory._step(fast, _Gradient.apply(fast, K, 0.1 * V))
        assert ((_Read.apply(after, K) * V).sum() - (_Read.apply(fast, K) * V).sum()) > 1
        assert torch.allclose(after.norm(dim=-1), memory.fast.double().norm(dim=-1).expand(B, -1, -1, -1))


def test_every_row_at_its_own_position():
    memory = make()
    x = random(B, 50, C)
    with torch.no_grad():
        _, ahead = memory(x[:1, :13], None, True)
        _, behind = memory(x[1:, :5], None, True)
        state = type(ahead)(*(torch.cat(pair) for pair in zip(ahead, behind)))
        got, end = memory(torch.stack([x[0, 13:43], x[1, 5:35]]), state, True)
        for row, (start, stop) in enumerate(((13, 43), (5, 35))):
            want, want_end = memory(x[row : row + 1, :stop], None, True)
            assert torch.allclose(got[row], want[0, start:], rtol=1e-9, atol=1e-10)
            for a, b in zip(end, want_end):
                assert torch.allclose(a[row].double(), b[0].double(), rtol=1e-9, atol=1e-10)
