"""Test-time training on the state: its gradient against autograd, derivatives through it in float64, and what it does to the inner loss."""

import pytest
import torch
from torch.nn import functional as F

from rwkvlm.config import PhantomConfig
from rwkvlm.layers import ttt as module
from rwkvlm.layers.segments import stretches
from rwkvlm.layers.ttt import StateTTT
from rwkvlm.layers.ttt_segments import Segments
from rwkvlm.ops.wkv7 import backend_for, cuda, wkv7, wkv7_reference

B, H, N, n = 2, 2, 16, 5


def make(seed=0, dtype=torch.float64, **settings):
    sizes = dict(n_layer=1, n_embd=H * N, head_size=N, vocab_size=8, ttt_chunk=16, ttt_lr=0.05)
    ttt = StateTTT(PhantomConfig(**sizes | settings)).to(dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in ttt.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / 2)
    return ttt


def problem(ttt, tokens=n, seed=1):
    """State, unit keys and targets."""
    g = torch.Generator().manual_seed(seed)
    S, K, V = (
        torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((B, H, N, N), (B, tokens, H, N), (B, tokens, H, ttt.rows))
    )
    return S, F.normalize(K, dim=-1), V


def eta_of(ttt):
    return 2 * torch.sigmoid(ttt.rate)[:, None, None]


def inner_loss(ttt, core, before, K, V):
    """l of StateTTT's docstring, [B, H]: core, before [B, H, c, N], K [B, H, n, N], V [B, H, n, c]."""
    u = K @ core.mT
    guess = u + torch.relu(u @ ttt.w1.mT) @ ttt.w2.mT if ttt.has_head else u
    return 0.5 * (guess - V).square().sum(-1).mean(-1) + ttt.config.ttt_anchor / 2 * (core - before).square().sum((-2, -1))


@pytest.mark.parametrize("settings", [{}, {"ttt_head": False}], ids=["head", "identity"])
@pytest.mark.parametrize("steps", [1, 3])
def test_steps_go_down_the_gradient_of_the_inner_loss(settings, steps):
    ttt = make(ttt_steps=steps, ttt_anchor=0.3, **settings)
    S, K, V = problem(ttt)
    before = core = S[:, :, : ttt.rows]
    for _ in range(steps):
        core = core.detach().requires_grad_()
        (slope,) = torch.autograd.grad(inner_loss(ttt, core, before, K.transpose(1, 2), V.transpose(1, 2)).sum(), core)
        core = core - eta_of(ttt) * slope
    assert torch.allclose(ttt.step(S, K, V, eta_of(ttt))[:, :, : ttt.rows], core, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("target", ["stored", "value"])
def test_one_step_by_hand(head, target):
    """Token by token and head by head, straight from the specification."""
    ttt = make(ttt_head=head, ttt_target=target)
    S, K, V = problem(ttt)
    k = torch.randn(B, n, H, N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        Z = ttt._targets(k, V, K)
        got = ttt.step(S, K, Z, eta_of(ttt))
        for row in range(B):
            for h in range(H):
                gradient = torch.zeros(ttt.rows, N, dtype=torch.float64)
                for t in range(n):
                    z = V[row, t, h] * (1 if target == "value" else k[row, t, h] @ K[row, t, h])
                    u = S[row, h, : ttt.rows] @ K[row, t, h]
                    hidden = ttt.w1 @ u if head else None
                    miss = u + ttt.w2 @ hidden.clamp(min=0) - z if head else u - z
                    back = miss + ttt.w1.T @ ((ttt.w2.T @ miss) * (hidden > 0)) if head else miss
                    gradient += torch.outer(back, K[row, t, h]) / n
                want = S[row, h, : ttt.rows] - eta_of(ttt)[h] * gradient
                assert torch.allclose(got[row, h, : ttt.rows], want, rtol=1e-12)
                assert torch.equal(got[row, h, ttt.rows :], S[row, h, ttt.rows :])


@pytest.mark.parametrize("settings", [{}, {"ttt_head": False}, {"ttt_steps": 3}], ids=["head", "identity", "three steps"])
def test_derivatives_through_the_steps(settings):
    """Second order: the outer loss sees how the update depends on the state, the keys, the rate and the head."""
    ttt = make(**settings)
    S, K, V = (x[:1] for x in problem(ttt, tokens=3))

    def step(S, K, *parameters):
        named = dict(zip(dict(ttt.named_parameters()), parameters))
        eta = 2 * torch.sigmoid(named["rate"])[:, None, None]
        return torch.func.functional_call(_Step(ttt), {f"ttt.{name}": p for name, p in named.items()}, (S, K, V, eta))

    parameters = [p.detach().clone().requires_grad_() for p in ttt.parameters()]
    assert torch.autograd.gradcheck(step, (S.requires_grad_(), K.requires_grad_(), *parameters), fast_mode=True)


class _Step(torch.nn.Module):
    def __init__(self, ttt):
        super().__init__()
        self.ttt = ttt

    def forward(self, *args):
        return self.ttt.step(*args)


def inputs(T, seed=5):
    g = torch.Generator().manual_seed(seed)
    r, w, k, v, kk, rate = (torch.randn(B, T, H, N, generator=g, dtype=torch.float64) for _ in range(6))
    kk = F.normalize(kk, dim=-1)
    return [r, w, k, v, -kk, kk * torch.sigmoid(rate)]


def test_derivatives_through_kernel_and_steps():
    """From the outputs of later segments to the inputs of earlier ones, over two steps; targets are constants, so k and v are left out."""
    ttt = make(ttt_target="value")
    r, w, k, v, a, b = (x[:1, :, :1] for x in inputs(37))
    ttt.rate = torch.nn.Parameter(ttt.rate[:1].detach())

    def run(w, a, rate):
        return torch.func.functional_call(ttt, {"rate": rate}, (r, w, k, v, a, b))[:, 30:, :, :4]

    leaves = [x.detach().contiguous().requires_grad_() for x in (w, a, ttt.rate)]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_against_kernel_and_steps_in_turns():
    ttt = make()
    tensors = inputs(40)
    with torch.no_grad():
        y, end = ttt(*tensors, output_final_state=True)
        r, w, k, v, a, b = tensors
        S, want = None, []
        for at in range(0, 40, 16):
            part = [x[:, at : at + 16].contiguous() for x in tensors]
            out, S = wkv7_reference(*part, S)
            want.append(out)
            if at + 16 <= 40:
                S = ttt.step(S, -part[4], ttt._targets(part[2], part[3][..., : ttt.rows], -part[4]), eta_of(ttt))
    assert torch.allclose(y, torch.cat(want, 1), rtol=1e-10, atol=1e-12)
    assert torch.allclose(end.wkv, S, rtol=1e-10, atol=1e-12)
    assert end.seen.tolist() == [8, 8]


@pytest.mark.parametrize(
    ("rows", "length", "settings"),
    [(2, 70, {}), (1, 33, {}), (2, 32, {"ttt_head": False}), (2, 40, {"ttt_target": "value"})],
    ids=["head", "one row", "identity", "values as targets"],
)
def test_all_segments_at_once(monkeypatch, rows, length, settings):
    """What trains is the loop over segments, its outputs and all its derivatives."""
    if backend_for(torch.device("cpu"), torch.float32) == "torch":
        pytest.skip("the kernel does not run here")
    ttt = make(**settings).float()
    leaves = [x[:rows].float().contiguous().requires_grad_() for x in (*inputs(length), problem(ttt)[0])]
    called, apply = [], Segments.apply
    monkeypatch.setattr(Segments, "apply", lambda *args: called.append(1) or apply(*args))

    def run():
        y = ttt(*leaves[:-1], ttt.init_state(leaves[-1]))
        return y.detach(), torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), [*leaves, *ttt.parameters()])

    y, grads = run()
    assert called
    monkeypatch.setattr(StateTTT, "_at_once", lambda *_: None)
    want_y, want = run()
    assert len(called) == 1 and not torch.allclose(y[:, 16:], wkv7(*(x.detach() for x in leaves))[:, 16:], rtol=1e-2)
    assert torch.allclose(y, want_y, rtol=1e-5, atol=1e-6)
    for got, grad in zip(grads, want, strict=True):
        assert grad.abs().max() > 0 and (got - grad).norm() < 1e-5 * grad.norm()


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("kernel", "dtype", "settings", "form"),
    [
        ("cpu", FP32, {}, "_in_segments"),
        ("torch", FP32, {}, None),
        ("cuda", BF16, {}, "_in_kernel"),
        ("cuda", BF16, {"ttt_chunk": 32}, None),  # half a chunk
        ("cuda", BF16, {"ttt_steps": 2}, None),
        ("cuda", BF16, {"ttt_second_order": False}, None),
        ("cuda", BF16, {"ttt_meta": True}, None),
        ("cuda", FP32, {}, None),
    ],
)
def test_what_computes_all_segments_at_once(monkeypatch, kernel, dtype, settings, form):
    monkeypatch.setattr(module, "backend_for", lambda device, dtype: kernel)
    monkeypatch.setattr(cuda, "machine", lambda device: cuda.Machine(None, (9, 0), 0))
    ttt, r = make(**{"ttt_chunk": 64, "ttt_lr": 0.01} | settings), torch.zeros(2, 70, H, N, dtype=dtype)
    found = ttt._at_once(r)
    assert (found and found.__name__) == form
    with torch.no_grad():  # nothing is first-order then, and the CPU's form is for training
        found = ttt._at_once(r)
        assert (found and found.__name__) == ("_in_kernel" if "ttt_second_order" in settings else form if kernel == "cuda" else None)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_step_lowers_the_inner_loss(steps):
    for head in (False, True):
        ttt = make(ttt_head=head, ttt_steps=steps)
        with torch.no_grad():
            ttt.rate.fill_(-1.5)
            S, K, V = problem(ttt, tokens=16)
            core, K_, V_ = S[:, :, : ttt.rows], K.transpose(1, 2), V.transpose(1, 2)
            after = ttt.step(S, K, V, eta_of(ttt))[:, :, : ttt.rows]
            assert (inner_loss(ttt, after, core, K_, V_) < inner_loss(ttt, core, core, K_, V_)).all()


def test_steps_below_two_never_diverge():
    ttt = make(ttt_head=False, ttt_steps=1)
    with torch.no_grad():
        S, K, V = problem(ttt, tokens=16)
        K[:] = K[:, :1]  # one key only: the steepest inner loss there is
        start = S.norm()
        for _ in range(200):
            S = ttt.step(S, K, V, torch.full((H, 1, 1), 1.99, dtype=torch.float64))
        assert S.norm() < 3 * start


def test_first_order_stops_at_the_gradient():
    ttt = make(ttt_second_order=False)
    assert not ttt.has_head, "nothing would train it"
    S, K, V = problem(ttt)
    K.requires_grad_()
    out = ttt.step(S, K, V, eta_of(ttt))
    (grad_rate, grad_keys) = torch.autograd.grad(out.square().sum(), (ttt.rate, K), allow_unused=True)
    assert grad_keys is None and grad_rate.abs().min() > 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_runs_without_autograd(context):
    ttt = make()
    with context():
        y, state = ttt(*inputs(20), output_final_state=True)
        more, _ = ttt(*inputs(20), state, output_final_state=True)
    assert torch.isfinite(y).all() and torch.isfinite(more).all() and not y.requires_grad


def test_error_is_that_of_the_next_segment():
    """What meta-learning lowers: after the step at 16, the miss on tokens 16 to 31; a last segment that is not complete counts as well."""
    ttt = make(ttt_meta=True).train()
    tensors = inputs(40)
    with torch.no_grad():
        _, end = ttt(*tensors, output_final_state=True)
        want = torch.zeros(B, dtype=torch.float64)
        for at in (16, 32):
            _, before = StateTTT.forward(ttt.eval(), *(x[:, :at].contiguous() for x in tensors), output_final_state=True)
            part = [x[:, at : at + 16] for x in tensors]
            keys = -part[4]
            values = ttt._targets(part[2], part[3][..., : ttt.rows], keys)
            want += ttt.relative_error(before.wkv, keys.transpose(1, 2), values.transpose(1, 2))
    assert torch.allclose(end.error, want, rtol=1e-10)


def test_stretches():
    assert [p[:2] for p in stretches([0], 40, 16)] == [(0, 16), (16, 32), (32, 40)]
    assert [(p.start, p.stop, p.full) for p in stretches([3, 10, 10], 20, 16)] == [(0, 6, [1, 2]), (6, 13, [0]), (13, 20, [])]
    assert [(p.start, p.stop, p.full) for p in stretches([15], 1, 16)] == [(0, 1, [0])]
