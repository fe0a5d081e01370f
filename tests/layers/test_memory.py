"""The memory beside the recurrence: its formulas token by token, derivatives through its steps, and that it learns while reading."""

import pytest
import torch
from torch.nn import functional as F

from rwkvlm.config import PhantomConfig
from rwkvlm.layers.memory import Memory
from rwkvlm.ops.wkv7 import wkv7

B, H, N = 2, 2, 16


def make(features=N, eta=0.7):
    memory = Memory(PhantomConfig(n_layer=1, n_embd=H * N, head_size=N, vocab_size=8, ttt_kind="memory", ttt_features=features)).double()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        memory.features.copy_(torch.randn(memory.features.shape, generator=g, dtype=torch.float64))
        memory.rate.copy_(torch.logit(torch.tensor([eta, 0.3]).double() / 2))
        memory.gain.copy_(torch.randn(memory.gain.shape, generator=g, dtype=torch.float64))
    return memory


def inputs(T, batch=B, seed=1):
    """r, w, k, v, a, b as time mixing gives them."""
    r, w, k, v, iclr = (
        torch.randn(batch, T, H, N, generator=torch.Generator().manual_seed(seed + i), dtype=torch.float64) for i in range(5)
    )
    kk = F.normalize(k, dim=-1)
    return r, w, k, v, -kk, kk * torch.sigmoid(iclr)


def slowly(memory, r, w, k, v, a, b):
    """y and the fast weights at the end, each step by autograd from the loss that it goes down."""
    y = wkv7(r, w, k, v, a, b)
    W1, W3 = memory.features.detach()

    def f(x):
        z = (W1 @ x) * torch.sigmoid(W1 @ x) * (W3 @ x)
        return z / z.norm()

    fast = torch.zeros(r.shape[0], H, N, W1.shape[0], dtype=torch.float64)
    for i in range(r.shape[0]):
        for h in range(H):
            for t in range(r.shape[1]):
                M = fast[i, h].clone().requires_grad_()
                (grad,) = torch.autograd.grad((M @ f(-a[i, t, h]) - v[i, t, h]).square().sum() / 2, M)
                fast[i, h] -= 2 * torch.sigmoid(memory.rate[h].detach()) * grad
                y[i, t, h] += memory.gain[h].detach() * (fast[i, h] @ f(r[i, t, h] / r[i, t, h].norm()))
    return y, fast


@pytest.mark.parametrize("features", [16, 32])
def test_against_the_formulas(features):
    memory, given = make(features), inputs(23)
    with torch.no_grad():
        y, end, *passed = memory(*given, output_final_state=True, pass_on=True)
    want, fast = slowly(memory, *given)
    assert torch.allclose(y, want, rtol=1e-9, atol=1e-11)
    assert torch.allclose(end.fast.double(), fast, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(passed, (given[0], given[2], given[3])))
    with torch.no_grad():
        assert torch.equal(memory(*given), y)


def test_derivatives_through_the_steps():
    memory, given = make(), [x.requires_grad_() for x in inputs(5, batch=1)]
    parameters = dict(memory.named_parameters())

    def run(*values):
        return torch.func.functional_call(memory, dict(zip(parameters, values)), tuple(values[len(parameters) :]))

    assert torch.autograd.gradcheck(run, (*parameters.values(), *given), fast_mode=True, atol=1e-4)
    key = given[4]
    (early,) = torch.autograd.grad(memory(*given)[:, 4:].square().sum(), key)
    assert early[:, 0].abs().max() > 0, "later tokens train what was written"


def test_begins_as_nothing():
    memory, given = make(), inputs(20)
    with torch.no_grad():
        memory.gain.zero_()
        assert torch.equal(memory(*given), wkv7(*given))


def test_more_keys_than_channels_are_told_apart():
    """24 pairs in heads of 16, read ten times: 64 features hold what no matrix over the keys can."""
    memory, g = make(64, eta=1.0), torch.Generator().manual_seed(7)
    keys, values = (
        F.normalize(torch.randn(1, 24, H, N, generator=g, dtype=torch.float64), dim=-1),
        torch.randn(1, 24, H, N, generator=g, dtype=torch.float64),
    )
    nothing = torch.zeros_like(keys)
    with torch.no_grad():
        memory.gain.fill_(1)
        memory.rate.fill_(0)  # a step of 1
        _, state = memory(*(x.repeat(1, 10, 1, 1) for x in (keys, nothing, nothing, values, -keys, nothing)), output_final_state=True)
        memory.rate.fill_(-50)  # none
        read = memory(keys, nothing, nothing, nothing, -keys, nothing, initial_state=state)
        missed = (read - values).square().mean()
        K, V = keys[0].transpose(0, 1), values[0].transpose(0, 1)
        best = (K @ torch.linalg.lstsq(K, V).solution - V).square().mean()
    assert missed < 0.05 * best, (missed, best)


def test_pieces_and_rows_are_what_the_whole_is():
    memory, given = make(32), inputs(50)
    with torch.no_grad():
        whole, end = memory(*given, output_final_state=True)
        for cut in (1, 17, 49):
            head, state = memory(*(x[:, :cut].contiguous() for x in given), output_final_state=True)
            tail, state = memory(*(x[:, cut:].contiguous() for x in given), initial_state=state, output_final_state=True)
            assert torch.allclose(torch.cat([head, tail], 1), whole, rtol=1e-5, atol=1e-5)
            assert torch.allclose(state.fast, end.fast, rtol=1e-5, atol=1e-5) and torch.allclose(state.wkv, end.wkv, rtol=1e-5, atol=1e-5)


def test_the_largest_step_does_not_diverge_in_bfloat16():
    """Of keys of length 1 many are a little longer there; one is stored an odd number of times, which overshoots most."""
    memory, given = make(32).bfloat16(), [x[:, :1].bfloat16().repeat(1, 1025, 1, 1) for x in inputs(1, batch=16)]
    with torch.no_grad():
        memory.rate.fill_(30)
        _, early = memory(*(x[:, :65].contiguous() for x in given), output_final_state=True)
        _, late = memory(*given, output_final_state=True)
    assert late.fast.abs().max() <= early.fast.abs().max()
    assert late.fast.untyped_storage().nbytes() == late.fast.nbytes
