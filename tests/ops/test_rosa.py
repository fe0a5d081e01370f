"""ROSA: every form against the definition and against running again with each bit turned; states, edges, errors; a citizen of torch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from oracles.rosa import KINDS, close, from_definition, numbers, results
from rwkvlm import native as build
from rwkvlm.config import UserError
from rwkvlm.ops import backend
from rwkvlm.ops.rosa import RosaState, backend_for, rosa, rosa_self, rosa_tokens

BUILT, REASON = build.available("rosa")
needs_native = pytest.mark.skipif(not BUILT, reason=REASON)
CPU = torch.device("cpu")


@pytest.fixture(params=["cpu", "torch"])
def form(request, monkeypatch):
    if request.param == "cpu" and not BUILT:
        pytest.skip(REASON)
    monkeypatch.setattr(backend, "_requested", request.param)
    return request.param


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def ends(C, rng):
    return torch.randn(C, generator=rng), torch.randn(C, generator=rng)


def numbered(symbols, bits):
    """Symbols [B, T] as the numbers [B, T, bits] that they are made of."""
    return ((symbols.unsqueeze(-1) >> torch.arange(bits)) & 1) * 2.0 - 1


def read(out, bits):
    """Symbols [B, T] of an output with low 0 and high 1."""
    return (out.long() << torch.arange(bits)).sum(-1)


def test_tokens_against_the_definition(form, rng):
    for n in range(500 if form == "cpu" else 120):
        symbols, T = 2 + n % 15, 1 + n % 37
        x = torch.randint(symbols, (2, T), generator=rng)
        x = x[:, : 1 + n % 5].repeat(1, T)[:, :T] if n % 4 == 0 else x
        x = x * 10**17 - 5  # any numbers are tokens
        assert rosa_tokens(x).tolist() == [from_definition(row, row, row) for row in x.tolist()]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_symbols_against_the_definition(form, bits, rng):
    for n in range(300 if form == "cpu" else 60):
        T = 1 + n % 37
        q, k, v = torch.randint(2 + n % (2**bits - 1), (3, 1, T), generator=rng)
        if n % 4 == 0:
            q = k = k[:, : 1 + n % 5].repeat(1, T)[:, :T]
        arguments = [numbered(x, bits) for x in (q, k, v)]
        out = rosa(*arguments, torch.zeros(bits), torch.ones(bits), bits, "low")
        want = from_definition(*(x[0].tolist() for x in (q, k, v)))
        assert read(out, bits)[0].tolist() == [max(0, y) for y in want]
        missed = rosa(*arguments, torch.ones(bits), torch.ones(bits), bits, "zero")[0, :, 0] == 0
        assert missed.tolist() == [y < 0 for y in want]


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_by_the_automaton(kind, rng):
    """Longer than what is scanned; the tokens at once, whose transitions are hashed."""
    bits = 2
    x = numbers(kind, 1, 3000, 2 * bits, rng=rng)
    low, high = torch.zeros(2 * bits), torch.ones(2 * bits)
    out, after = [], None
    with backend.asked_for("cpu"):
        whole, state = rosa_self(x, low, high, bits, "low", return_state=True)
        symbols = read((x > 0).view(1, 3000, 2, bits), bits)
        tokens, token_state = rosa_tokens(symbols[0].t().contiguous(), return_state=True)
        assert torch.equal(read(whole.view(1, 3000, 2, bits), bits)[0].t(), tokens.clamp(min=0))
        for piece in symbols[0].t().split(40, 1):  # short enough to be scanned
            y, after = rosa_tokens(piece.contiguous(), after, True)
            out.append(y)
    assert torch.equal(torch.cat(out, 1), tokens)
    assert torch.equal(after.runs, token_state.runs) and torch.equal(state.runs[0], after.runs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 4])
def test_pieces_and_single_tokens_give_the_whole(form, bits, kind, rng):
    T, C = 60, 2 * bits
    q, k, v = (numbers(kind, 2, T, C, rng=rng) for _ in range(3))
    low, high = ends(C, rng)
    tokens = torch.randint(3, (2, T), generator=rng)
    calls = [
        (lambda s, *x: rosa(*x, low, high, bits, "zero", state=s, return_state=True), [q, k, v]),
        (lambda s, *x: rosa_self(*x, low, high, bits, "low", state=s, return_state=True), [q]),
        (lambda s, x: rosa_tokens(x, s, True), [tokens]),
    ]
    for call, inputs in calls:
        whole, last = call(None, *inputs)
        for cuts in ([1] * T, [7, 1, 30, 22], [59, 1]):
            outs, state = [], None
            for pieces in zip(*(x.split(cuts, 1) for x in inputs)):
                out, state = call(state, *pieces)
                outs.append(out)
            assert torch.equal(torch.cat(outs, 1), whole)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(state, last))


@needs_native
@pytest.mark.parametrize("split", [700, 1400])
def test_the_automaton_goes_on_behind_a_state(split, rng):
    q, k, v = (numbers("almost periodic", 1, 1500, 3, rng=rng) for _ in range(3))
    low, high = ends(3, rng)
    with backend.asked_for("cpu"):
        whole, last = rosa(q, k, v, low, high, return_state=True)
        first, state = rosa(q[:, :split], k[:, :split], v[:, :split], low, high, return_state=True)
        second, state = rosa(q[:, split:], k[:, split:], v[:, split:], low, high, state=state, return_state=True)
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert all(torch.equal(a, b) for a, b in zip(state, last))


@needs_native
def test_the_automaton_is_the_scan_on_many_rows(rng):
    """Random, nearly and wholly periodic ones.

    States that are divided again and again, a match in hand behind a state, matches longer than all that is new.
    """
    rows, T = 600, 1200
    periods, symbols = torch.randint(1, 8, (rows,), generator=rng), torch.randint(4, (T, rows), generator=rng)
    often = torch.tensor([0.0, 1 / 12, 1.0, 1.0]).repeat(rows // 4)
    for t in range(7, T):
        symbols[t] = torch.where(torch.rand(rows, generator=rng) < often, symbols[t], symbols[t - periods, torch.arange(rows)])
    x, ends, after, out = numbered(symbols, 2).view(1, T, 2 * rows), (-torch.ones(2 * rows), torch.ones(2 * rows), 2), None, []
    with backend.asked_for("cpu"):
        halves = [rosa_self(x[:, :600], *ends, return_state=True)]
        halves.append(rosa_self(x[:, 600:], *ends, state=halves[0][1], return_state=True))
        for piece in x.split(40, 1):  # short enough to be scanned
            y, after = rosa_self(piece, *ends, state=after, return_state=True)
            out.append(y)
    assert torch.equal(torch.cat([y for y, _ in halves], 1), torch.cat(out, 1)) and torch.equal(halves[1][1].runs, after.runs)


def against_turning(kind, bits, T, rng, B=1, groups=1, dtype=torch.float32, tolerance=2e-5):
    C = bits * groups
    low, high = (x.to(dtype) for x in ends(C, rng))
    inputs = [numbers(kind, B, T, C, rng=rng).to(dtype) for _ in range(3)]
    for function, arguments in ((rosa, inputs), (rosa_self, inputs[:1])):
        for miss in ("zero", "low"):
            with backend.asked_for("torch"):
                want = results(function, arguments, low, high, bits=bits, miss=miss, tau=0.1)
            with backend.asked_for("cpu"):
                close(results(function, arguments, low, high, bits=bits, miss=miss, tau=0.1), want, tolerance)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits, T", [(1, 1), (1, 2), (1, 33), (2, 24), (3, 17), (4, 12), (8, 9)])
def test_flips_against_turning_every_bit(kind, bits, T, rng):
    against_turning(kind, bits, T, rng, B=2, groups=2)


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 2])
def test_flips_of_longer_rows(kind, bits, rng):
    for T in (64, 70):
        against_turning(kind, bits, T, rng)


@needs_native
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("kind", ["random", "repeated", "constant"])
def test_flips_of_rows_longer_than_a_vector(kind, bits, rng):
    """Against the forward kernel over all rows with a bit turned: long enough for matches that are not looked at one by one.

    Other rows go before it, in the same memory.
    """
    T = 300
    low, high = torch.randn(2, bits, generator=rng)
    slopes = torch.randn(T, bits, generator=rng)
    for function, count in ((rosa_self, 1), (rosa, 3)):
        symbols = torch.randint(2**bits, (count, T), generator=rng)
        if kind == "repeated":
            symbols = torch.where(torch.rand(count, T, generator=rng) < 0.03, symbols, symbols[:1, :40].repeat(1, 8)[:, :T])
        xs = numbered(symbols * (kind != "constant"), bits)  # [count, T, bits]
        with backend.asked_for("cpu"):
            leaves = [torch.stack([*(x.roll(r, 0) * (-1) ** r for r in range(1, 4)), x]).requires_grad_() for x in xs]
            grads = torch.autograd.grad((function(*leaves, low, high, bits, "low") * slopes).sum(), leaves)
            for n, grad in enumerate(grads):
                turned = xs[n].repeat(T * bits, 1, 1)
                turned.view(T * bits, T * bits).diagonal().neg_()
                rows = [turned if i == n else x.expand(T * bits, T, bits) for i, x in enumerate(xs)]
                change = (function(*[x.contiguous() for x in rows], low, high, bits, "low") * slopes).sum((1, 2)).view(T, bits)
                change -= (function(*[x[None] for x in xs], low, high, bits, "low") * slopes).sum()
                assert torch.allclose(grad[-1], -xs[n] * change / 2, rtol=1e-3, atol=1e-3)


@needs_native
@pytest.mark.slow
def test_flips_where_places_have_more_than_16_bits(rng):
    """Of the last outputs alone, for speed, whose match lies at such a place.

    And of the same row without its beginning, in which no long match can lie.
    """
    start, T = 700, 66_000
    x = torch.randn(1, T, 1, generator=rng)
    x[:, :start], x[:, start], x[:, -150:] = -1, 1, x[:, -300:-150].clone()
    found = []
    with backend.asked_for("cpu"):
        for row in (x, x[:, start:].contiguous()):
            row.requires_grad_()
            last = rosa_self(row, torch.tensor([-1.0]), torch.tensor([1.0]))[0, -4:, 0]
            found.append(torch.autograd.grad((last * torch.tensor([1.0, 2.0, 4.0, 8.0])).sum(), row)[0])
    whole, short = found
    assert torch.equal(whole[:, start:], short) and short.count_nonzero() > 8


@needs_native
def test_bfloat16(rng):
    against_turning("random", 1, 40, rng, dtype=torch.bfloat16, tolerance=0.01)


@needs_native
@pytest.mark.parametrize("level", [0, 1, 2], ids=["plain", "avx2", "avx512"])
def test_every_instruction_set(level, rng):
    assert backend_for(CPU, torch.float32) in ("cpu", "torch")
    used = torch.ops.rwkvlm.rosa_limit_isa(level)
    try:
        if used != level:
            pytest.skip("this processor has no such instructions")
        for kind in ("random", "constant", "almost periodic"):
            against_turning(kind, 1, 45, rng)
            against_turning(kind, 3, 14, rng)
    finally:
        torch.ops.rwkvlm.rosa_limit_isa(2)


def test_turning_and_autograd_of_the_plain_form(rng):
    """The oracle itself: one bit turned by hand."""
    q, k, v = (numbers("random", 1, 9, 2, rng=rng) for _ in range(3))
    low, high = ends(2, rng)
    with backend.asked_for("torch"):
        _, dq, dk, dv, dlow, dhigh = results(rosa, [q, k, v], low, high, bits=2, tau=0.5)
        slopes = torch.sin(torch.arange(18) * 1.7).view(1, 9, 2)
        for which, gradient in enumerate((dq, dk, dv)):
            phi = []
            for bit in (1.0, -1.0):
                inputs = [q.clone(), k.clone(), v.clone()]
                inputs[which][0, 4, 1] = bit
                phi.append((rosa(*inputs, low, high, 2) * slopes).sum())
            size = max(abs([q, k, v][which][0, 4, 1].item()), 0.5)
            torch.testing.assert_close(gradient[0, 4, 1], (phi[0] - phi[1]) / (2 * size), rtol=1e-4, atol=1e-5)
        out = rosa(q, k, v, torch.zeros(2), torch.ones(2), 2)
        torch.testing.assert_close(dhigh, (slopes * out).sum((0, 1)))


def test_zeros_and_nan_are_no_ones(form):
    x = torch.tensor([1.0, -0.0, 0.0, 1.0, float("nan"), -1.0, float("inf"), 1.0]).view(1, 8, 1)
    bits = [1, 0, 0, 1, 0, 0, 1, 1]
    out = rosa_self(x, torch.zeros(1), torch.ones(1), miss="low")
    assert out.flatten().tolist() == [max(0, y) for y in from_definition(bits, bits, bits)]
    gradient = results(rosa_self, [x], torch.zeros(1), torch.ones(1))[1].flatten()
    assert gradient.isnan().tolist() == [i == 4 for i in range(8)]


def test_no_batch_and_one_token(form, rng):
    for B, T in ((0, 5), (2, 1)):
        x = torch.randn(B, T, 4, generator=rng)
        for got in results(rosa, [x, x, x], *ends(4, rng), bits=2):
            assert not got.any()
        assert rosa_tokens(torch.zeros(B, T, dtype=torch.int64)).tolist() == [[-1] * T] * B


def test_soft_gradients_are_dense(form, rng):
    q, k, v = (torch.randn(2, 12, 4, generator=rng) for _ in range(3))
    low, high = ends(4, rng)
    flips, soft = (results(rosa, [q, k, v], low, high, bits=2, grad=grad) for grad in ("flip", "soft"))
    assert torch.equal(flips[0], soft[0]) and all(torch.allclose(a, b) for a, b in zip(flips[4:], soft[4:]))
    dq, dk, dv = soft[1:4]
    assert (dq[:, 1:] != 0).all() and (dk[:, :-1] != 0).all() and (dv[:, 1:] != 0).all() and (dv[:, 0] == 0).all()
    assert results(rosa_self, [q], low, high, bits=2, grad="soft")[1].isfinite().all()


def test_the_five_variants(form, rng):
    """1-bit self, 4-bit self, 1-bit and 4-bit QKV; that of tokens is above."""
    x, emb = torch.randn(1, 30, 4, generator=rng), torch.rand(4, generator=rng) + 0.5
    one = rosa(x, x, x, -emb, emb, miss="low")
    assert torch.equal(one.abs(), emb.expand_as(one)), "a miss counts as 0: -emb"
    four = rosa(x, x, x, -emb, emb, bits=4, miss="zero")
    assert ((four == 0).all(-1) | (four.abs() == emb).all(-1)).all()
    assert torch.equal(rosa_self(x, -emb, emb), rosa(x, x, x, -emb, emb))


@needs_native
def test_the_same_bits_on_any_number_of_threads(rng):
    inputs, threads, found = [torch.randn(2, 50, 6, generator=rng) for _ in range(3)], torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(results(rosa, inputs, *ends(6, torch.Generator().manual_seed(1)), bits=2))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("name", ["rosa_plain", pytest.param("rosa", marks=needs_native)])
def test_opcheck(name, rng):
    if name == "rosa":
        assert backend_for(CPU, torch.float32) == "cpu"
    operator = getattr(torch.ops.rwkvlm, name)
    q, k, v = (torch.randn(2, 7, 4, generator=rng, requires_grad=True) for _ in range(3))
    low, high = (x.requires_grad_() for x in ends(4, rng))
    for soft in (False, True):
        torch.library.opcheck(operator, (q, k, v, low, high, 2, False, 0.1, soft, None, None, None, False))
        torch.library.opcheck(operator, (q, None, None, low, high, 1, True, 0.1, soft, None, None, None, False))
    plain = [t.detach() for t in (q, k, v, low, high)]
    _, *state = operator(*plain, 2, False, 0.1, False, None, None, None, True)
    torch.library.opcheck(operator, (*plain, 2, False, 0.1, False, *state, True))
    backward = getattr(torch.ops.rwkvlm, f"{name}_backward")
    for flips in (False, True):
        torch.library.opcheck(backward, (plain[0], *plain, 2, False, 0.1, flips))
    tokens = getattr(torch.ops.rwkvlm, f"{name}_tokens")
    torch.library.opcheck(tokens, (torch.arange(6).view(2, 3) % 2, None, None, True))


@pytest.mark.parametrize("grad", ["flip", "soft"])
def test_a_second_derivative_is_an_error(form, grad, rng):
    q = torch.randn(1, 7, 4, generator=rng, requires_grad=True)
    low, high = (x.requires_grad_() for x in ends(4, rng))
    slopes = torch.autograd.grad(rosa_self(q, low, high, grad=grad).square().sum(), (q, high), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(x.square().sum() for x in slopes).backward()


def test_compiles_into_one_graph_and_checkpoints(form, rng):
    torch._dynamo.reset()
    inputs = [torch.randn(1, 11, 4, generator=rng) for _ in range(3)]
    low, high = ends(4, rng)
    want = results(lambda *t: rosa(*t, bits=2) * 2, inputs, low, high)
    compiled = torch.compile(lambda *t: rosa(*t, bits=2) * 2, fullgraph=True, backend="aot_eager")
    for again in (compiled, lambda *t: checkpoint(lambda *u: rosa(*u, bits=2) * 2, *t, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(results(again, inputs, low, high), want))


def test_what_it_does_not_take_is_an_error(rng):
    q, low, high = torch.randn(2, 5, 4, generator=rng), *ends(4, rng)
    state = rosa_self(q, low, high, return_state=True)[1]
    wrong = {
        r"expected q \[B, T, C\]": lambda: rosa(q[0], q, q, low, high),
        r"expected x \[B, T, C\]": lambda: rosa_self(q.long(), low, high),
        "expected k and v, or neither": lambda: rosa(q, q, None, low, high),
        "expected k like q": lambda: rosa(q, q[:, :4], q, low, high),
        r"expected v like q.*got \[2, 5, 4\] of torch.float64": lambda: rosa(q, q, q.double(), low, high),
        "expected bits from 1 to 8 that divide the 4 channels, got 3": lambda: rosa(q, q, q, low, high, bits=3),
        r"expected low \[4\]": lambda: rosa(q, q, q, low[:2], high),
        r"expected high \[4\]": lambda: rosa(q, q, q, low, high.view(1, 1, 4)),
        "expected miss": lambda: rosa(q, q, q, low, high, miss="none"),
        "expected grad": lambda: rosa(q, q, q, low, high, grad="hard"),
        "expected tau > 0": lambda: rosa(q, q, q, low, high, tau=0.0),
        "T >= 1": lambda: rosa_self(q[:, :0], low, high),
        "no gradient": lambda: rosa_self(q.clone().requires_grad_(), low, high, return_state=True),
        r"expected state.runs \[2, 4, 5\]": lambda: rosa_self(q, low, high, state=state._replace(runs=state.runs.long())),
        r"expected state.k \[2, 2, 5\]": lambda: rosa_self(q, low, high, bits=2, state=state),
        r"rosa_tokens: expected \[B, T\] int64": lambda: rosa_tokens(torch.zeros(2, 3, dtype=torch.int32)),
        r"expected state.k \[2, 5\] of torch.int64": lambda: rosa_tokens(
            torch.zeros(2, 3, dtype=torch.int64), RosaState(*(t[:, 0] for t in state))
        ),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_an_operator_of_which_half_a_state_is_asked_says_so():
    if not build.available("rosa")[0]:
        pytest.skip(build.available("rosa")[1])
    x, end, old, tokens = (
        torch.zeros(1, 3, 2),
        torch.zeros(2),
        torch.zeros(1, 2, 4, dtype=torch.uint8),
        torch.zeros(1, 3, dtype=torch.int64),
    )
    with pytest.raises(RuntimeError, match="expected old_k, old_v and old_runs, or none"):
        torch.ops.rwkvlm.rosa(x, None, None, end, end, 1, False, 0.1, False, old, None, None, False)
    with pytest.raises(RuntimeError, match="expected old and old_runs, or neither"):
        torch.ops.rwkvlm.rosa_tokens(tokens, tokens, None, False)


def test_other_dtypes_run_in_plain_pytorch_or_in_float32(rng):
    x, (low, high) = torch.randn(1, 9, 2, generator=rng), ends(2, rng)
    for dtype in (torch.float16, torch.float64):
        assert backend_for(CPU, dtype) == ("torch" if dtype == torch.float64 else backend_for(CPU, torch.float32))
        out = rosa_self(x.to(dtype), low, high)
        same = rosa_self(x.to(dtype).float(), low.to(dtype).float(), high.to(dtype).float())
        assert out.dtype == dtype and torch.equal(out, same.to(dtype))
    with pytest.raises(UserError, match="rosa cannot run"), backend.asked_for("cuda"):
        rosa_self(x, low, high)
