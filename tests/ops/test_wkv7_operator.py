"""WKV7 as a citizen of torch: dispatch, opcheck, torch.compile, activation checkpointing, autocast."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rwkvlm.config import ModelConfig, UserError
from rwkvlm.models import build, init_weights
from rwkvlm.ops import backend
from rwkvlm.ops.wkv7 import native, wkv7, wkv7_chunked

FAILURE = native.why_not(torch.float32)
needs_native = pytest.mark.skipif(bool(FAILURE), reason=FAILURE)


def inputs(B=2, T=19, H=2, N=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(B, T, H, N, generator=generator) / 4 for _ in range(6)]
    return [x.to(dtype).requires_grad_() for x in tensors]


def gradients(function, tensors):
    return torch.autograd.grad(function(*tensors).float().square().sum(), tensors)


@needs_native
def test_dispatch_takes_the_kernel_and_gives_its_bits(monkeypatch):
    monkeypatch.setattr(backend, "_requested", "cpu")
    x = inputs()
    y, state = wkv7(*x, output_final_state=True)
    assert torch.equal(y, native.wkv7_native(*x)[0]) and state.dtype == torch.float32
    assert torch.equal(wkv7(*x), y)
    monkeypatch.setattr(backend, "_requested", "torch")
    assert torch.equal(wkv7(*x), wkv7_chunked(*x)[0])


def test_an_asked_for_kernel_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr(backend, "_requested", "cuda")
    with pytest.raises(UserError, match="--kernel cuda: wkv7 cannot run: the tensors are on cpu"):
        wkv7(*inputs())
    monkeypatch.setattr(backend, "_requested", "cpu")
    with pytest.raises(UserError, match="takes bfloat16 or float32, not torch.float64"):
        wkv7(*(x.double() for x in inputs()))


def test_auto_falls_back_with_one_line_said_once(monkeypatch, capfd):
    monkeypatch.setattr(backend, "_requested", "auto")
    monkeypatch.setattr(backend, "_said", set())
    monkeypatch.setattr("rwkvlm.native.available", lambda name: (False, "native kernel wkv7: no C++ compiler (g++ is not on the PATH)"))
    x = inputs()
    for _ in range(3):
        assert torch.equal(wkv7(*x), wkv7_chunked(*x)[0])
    assert (
        capfd.readouterr().err
        == "wkv7: running in plain PyTorch, which is slower (native kernel wkv7: no C++ compiler (g++ is not on the PATH))\n"
    )


@needs_native
@pytest.mark.parametrize("case", ["plain", "bfloat16", "initial state", "packed", "nothing saved"])
def test_opcheck(case):
    x = inputs(1, 70, 2, 16, torch.bfloat16 if case == "bfloat16" else torch.float32)
    if case == "nothing saved":
        x = [t.detach() for t in x]
    state = torch.randn(1, 2, 16, 16, requires_grad=True) if case == "initial state" else None
    cu_seqlens = torch.tensor([0, 4, 70]) if case == "packed" else None
    torch.library.opcheck(torch.ops.rwkvlm.wkv7_forward, (*x, state, cu_seqlens, case != "nothing saved"))


@needs_native
@pytest.mark.parametrize("bounds", [[0, 5, 18], [0, 5, 20], [0, 5, 5, 19], [0, 6, 5, 19], [1, 19], [-1, 19]], ids=str)
def test_the_operator_itself_looks_at_bounds(bounds):
    """torch.compile leaves out the checks in Python; what lies outside of the tensors must not be read."""
    with pytest.raises(RuntimeError, match="cu_seqlens must (rise strictly from 0 to T|end at T)"):
        torch.ops.rwkvlm.wkv7_forward(*(t.detach() for t in inputs(1, 19, 2, 16)), None, torch.tensor(bounds), False)


@needs_native
def test_the_operator_itself_looks_at_what_it_reads():
    x = [t.detach() for t in inputs(2, 5, 3, 16)]
    state, forward, backward = torch.zeros(2, 3, 16, 16), torch.ops.rwkvlm.wkv7_forward, torch.ops.rwkvlm.wkv7_backward
    _, final, removed, checkpoints = forward(*x, state, None, True)
    empty, thin, askew = x[0][:, :0], x[0][:, :4].contiguous(), x[0].transpose(1, 2).contiguous().transpose(1, 2)
    for wrong in (thin, askew, x[0].bfloat16(), x[0].flatten(2)):
        for call in (
            *(lambda i=i: forward(*x[:i], wrong, *x[i + 1 :], None, None, False) for i in range(1, 6)),
            lambda: backward(wrong, None, *x, None, removed, checkpoints),
            lambda: backward(x[0], None, *x, None, wrong, checkpoints),
            lambda: backward(x[0], None, *x, None, removed, checkpoints, None, None, wrong),
        ):
            with pytest.raises(RuntimeError, match="dtypes and shapes fit"):
                call()
    for wrong in (state[:1], state.double(), state.mT):
        for call in (
            lambda: forward(*x, wrong, None, False),
            lambda: backward(x[0], wrong, *x, None, removed, checkpoints),
            lambda: backward(x[0], final, *x, None, removed, wrong),
        ):
            with pytest.raises(RuntimeError, match="dtypes and shapes fit"):
                call()
    for wrong in (empty, x[0][:0], x[0][0]):
        with pytest.raises(RuntimeError, match="none of them 0"):
            forward(*[wrong] * 6, None, None, False)


@needs_native
@pytest.mark.parametrize("bounds", [None, [0, 4, 70, 71]], ids=["plain", "packed"])
def test_opcheck_of_the_backward(bounds):
    x = [t.detach() for t in inputs(1, 71, 2, 16)]
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    _, state, removed, checkpoints = torch.ops.rwkvlm.wkv7_forward(*x, None, cu_seqlens, True)
    arguments = (torch.randn_like(x[0]), torch.randn_like(state), *x, cu_seqlens, removed, checkpoints)
    torch.library.opcheck(torch.ops.rwkvlm.wkv7_backward, arguments)
    torch.library.opcheck(torch.ops.rwkvlm.wkv7_backward, (*arguments, x[0], None, x[2]))


@pytest.mark.parametrize("kernel", ["torch", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_into_one_graph(monkeypatch, kernel, compiler):
    if compiler == "inductor" and FAILURE:
        pytest.skip("inductor needs a C++ compiler too")
    monkeypatch.setattr(backend, "_requested", kernel)
    torch._dynamo.reset()
    x = inputs()
    compiled = torch.compile(lambda *t: wkv7(*t) * 2, fullgraph=True, backend=compiler)
    for ours, theirs in zip(gradients(lambda *t: wkv7(*t) * 2, x), gradients(compiled, x)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@needs_native
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_block_compiles_into_one_graph(monkeypatch, compiler):
    monkeypatch.setattr(backend, "_requested", "cpu")
    torch._dynamo.reset()
    model = build(ModelConfig(n_layer=2, n_embd=64, vocab_size=64))
    init_weights(model, 0)
    block = model.blocks[1]
    generator = torch.Generator().manual_seed(0)
    x, v_first = (torch.randn(2, 19, 64, generator=generator) for _ in range(2))
    leaves = [x.requires_grad_(), v_first.requires_grad_(), *block.parameters()]

    def results(function):
        y, passed, _ = function(x, v_first)
        return [y, *torch.autograd.grad(y.square().sum() + passed.square().sum(), leaves, allow_unused=True, materialize_grads=True)]

    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    for ours, theirs in zip(results(block), results(compiled), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("pass_on", [False, True])
def test_a_second_derivative_is_an_error(monkeypatch, pass_on):
    """Silent, it would be zero."""
    monkeypatch.setattr(backend, "_requested", "cpu")
    x = inputs(1, 5, 1, 16)
    y = wkv7(*x, output_final_state=True, pass_on=pass_on)[0]
    (slope,) = torch.autograd.grad(y.square().sum(), x[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.square().sum().backward()


@needs_native
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(reentrant):
    x = inputs()
    again = gradients(lambda *t: checkpoint(wkv7, *t, use_reentrant=reentrant), x) if not reentrant else None
    if reentrant:  # the reentrant form supports .backward() only
        checkpoint(wkv7, *x, use_reentrant=True).float().square().sum().backward()
        again = [t.grad for t in x]
    assert all(torch.equal(p, q) for p, q in zip(gradients(wkv7, x), again))


@pytest.mark.parametrize("kernel", ["torch", pytest.param("cpu", marks=needs_native)])
def test_autocast_changes_nothing(monkeypatch, kernel):
    monkeypatch.setattr(backend, "_requested", kernel)
    x = inputs()
    plain = wkv7(*x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wkv7(*x), plain)
