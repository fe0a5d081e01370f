"""The elementwise parts of a block: every form against plain PyTorch in float64, outputs and all gradients."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from oracles.elementwise import Case, close, misfits, squarable
from rwkvlm import native as build
from rwkvlm.config import UserError
from rwkvlm.ops import backend, fused
from rwkvlm.ops.fused import native, reference

# rms, relative, for each output and gradient: bf16 rounds each once, and plain PyTorch often
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 8e-3}
PLAIN_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


@pytest.fixture(params=["cpu", "torch"], autouse=True)
def form(request, monkeypatch):
    if request.param == "cpu" and not build.available("fused")[0]:
        pytest.skip(build.available("fused")[1])
    monkeypatch.setattr(backend, "_requested", request.param)
    return request.param


CASES = {
    "token_mix": [
        dict(),
        dict(T=1),
        dict(T=1, state=True),
        dict(T=64, state=True),
        dict(B=3, T=65, H=1, N=16),
        dict(B=1, T=100, H=2, N=64),
    ],
    "time_mix_inputs": [dict(), dict(T=1), dict(residual=False), dict(B=3, T=65, H=1, N=16), dict(B=1, T=40, H=2, N=128)],
    "time_mix_output": [dict(), dict(T=1), dict(B=3, T=65, H=1, N=16), dict(B=1, T=40, H=2, N=128)],
    "relu_square": [dict(), dict(T=1, B=1, H=1, N=16), dict(B=3, T=700)],
}
ALL = [pytest.param(name, sizes, id=f"{name}-{sizes}") for name, several in CASES.items() for sizes in several]


@pytest.fixture
def poisoned():
    """Memory that nobody has written to is likely NaN: the allocator hands out what was freed last."""
    for size in (1 << 8, 1 << 10, 1 << 12, 1 << 13, 1 << 14, 1 << 15):
        blocks = [torch.full((size,), float("nan")) for _ in range(40)]
        del blocks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name, sizes", ALL)
def test_against_float64(form, poisoned, name, sizes, dtype):
    case = Case(name, dtype=dtype, **sizes)
    tolerance = (TOLERANCE if form == "cpu" else PLAIN_TOLERANCE)[dtype]
    for got, want in zip(case.outputs_and_gradients(fused), case.exact()):
        close(got, want, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [dict(), dict(T=1, state=True), dict(residual=False), dict(B=1, T=40, documents=[1, 16, 23])], ids=str)
def test_norm_mix_is_its_parts(form, sizes, dtype):
    case = Case("norm_mix", dtype=dtype, **sizes)
    for got, want in zip(case.outputs_and_gradients(fused), case.exact()):
        close(got, want, PLAIN_TOLERANCE[dtype])
    x, branch, weight, bias, last, *mixes = case.inputs
    stream = x if branch is None else x + branch
    normal = torch.nn.functional.layer_norm(stream, weight.shape, weight, bias, 1e-3)
    if case.bounds is not None:
        normal = normal.index_fill(1, case.bounds[1:].long() - 1, 0)
    parts = [stream, normal[:, -1], *fused.token_mix(normal, last, mixes)]
    assert all(torch.equal(a, b) for a, b in zip(case.call(fused, *case.inputs), parts, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_on_any_number_of_threads(form, name):
    if form == "torch":
        pytest.skip("C++ only")
    threads, results = torch.get_num_threads(), []
    case = Case(name, B=2, T=150, residual=True)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outputs, grads = case.outputs_and_gradients(fused)
        results.append([*outputs, *grads])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("level", [0, 1, 2], ids=["plain", "avx2", "avx512"])
def test_every_instruction_set(form, name, level):
    if form == "torch":
        pytest.skip("C++ only")
    used = native.why_not((torch.float32,), 16) or torch.ops.rwkvlm.fused_limit_isa(level)
    try:
        if used != level:
            pytest.skip("this processor has no such instructions")
        for dtype in TOLERANCE:
            case = Case(name, dtype=dtype)
            for got, want in zip(case.outputs_and_gradients(fused), case.exact()):
                close(got, want, TOLERANCE[dtype])
    finally:
        torch.ops.rwkvlm.fused_limit_isa(2)


@pytest.mark.parametrize("name", CASES)
def test_what_lies_askew_is_put_right(form, name):
    """Inputs, and gradients of outputs, as views give them. What the kernels read is in order."""
    case, results = Case(name, T=20, state=True), []
    turned = [t if t is None or t.dim() < 2 else t.detach().mT.contiguous().mT.requires_grad_() for t in case.inputs]
    for inputs, order in ((case.inputs, lambda x: x), (turned, lambda x: x.mT.contiguous().mT)):
        outputs = case.call(fused, *inputs)
        slopes = [order(torch.linspace(-1, 1, out.numel()).view_as(out)) for out in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, [t for t in inputs if t is not None], slopes)])
    close(*results, PLAIN_TOLERANCE[torch.float32])


def test_keys_of_length_zero_and_tiny_ones(form):
    """As torch.nn.functional.normalize: divided by 1e-12 at least, no NaN."""
    case = Case("time_mix_inputs", T=4)
    with torch.no_grad():
        case.inputs[1][0, 1] = 0
        case.inputs[1][0, 2] *= 1e-14
    for got, want in zip(case.outputs_and_gradients(fused), case.exact()):
        close(got, want, 1e-5)


def test_extreme_rates_keep_their_digits(form):
    case = Case("time_mix_inputs", T=4)
    with torch.no_grad():
        case.inputs[2][0] *= 60
        case.inputs[5][0] *= 60
    (outputs, grads), (exact_outputs, exact_grads) = case.outputs_and_gradients(fused), case.exact()
    close(outputs, exact_outputs, 1e-5)
    close(grads, exact_grads, 1e-5)
    far = (case.inputs[2][0] > -80) & (case.inputs[2][0] < -20)  # each by itself: beside the others their gradients are nothing
    assert far.sum() > 50 and (grads[2][0] / exact_grads[2][0] - 1)[far].abs().median() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_square_alone_gives_every_bit_of_its_gradient(dtype):
    """2 max(x, 0) dy from max(x, 0)^2: what is kept of x is its rounded square."""
    x = squarable(dtype).requires_grad_()
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (dx,) = torch.autograd.grad(fused.relu_square(x), x, dy)
    assert torch.equal(dx, (2 * x.detach().clamp_min(0).float() * dy.float()).to(dtype))


def test_relu_square_keeps_nothing_but_its_output(form):
    if form == "torch":
        pytest.skip("C++ only")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = fused.relu_square(torch.randn(1, 3, 32, requires_grad=True) * 1)
    assert kept == [y.data_ptr()]


@pytest.mark.parametrize("x, dx", [(2e-20, [0.0, 4e-20]), (float("inf"), [float("inf")] * 2), (-float("inf"), [0.0, 0.0])], ids=str)
def test_where_the_square_is_no_normal_number(x, dx):
    """Its gradient is then 0 at worst: 2e-20 squared is no number but zero."""
    x = torch.full((1, 1, 16), x, requires_grad=True)
    (found,) = torch.autograd.grad(fused.relu_square(x), x, torch.ones_like(x))
    assert found.eq(found[0, 0, 0]).all() and dx[0] <= found[0, 0, 0] <= dx[1] * (1 + 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_nan_is_not_hidden(name):
    case = Case(name)
    with torch.no_grad():
        case.inputs[name == "time_mix_inputs"][0, 3, 5] = float("nan")
    for got, want in zip(case.outputs_and_gradients(fused), case.exact()):
        assert any(x.isnan().any() for x in want) and all(
            torch.equal(x.isnan().cpu(), y.isnan().cpu()) for x, y in zip(got, want, strict=True)
        )


@pytest.mark.parametrize("name", CASES)
def test_checkpointing_gives_the_same_bits(name):
    case = Case(name)
    plain = case.outputs_and_gradients(fused)

    class Again:
        def __getattr__(self, op):
            return lambda *inputs: checkpoint(getattr(fused, op), *inputs, use_reentrant=False)

    again = case.outputs_and_gradients(Again())
    assert all(torch.equal(a, b) for one, two in zip(plain, again) for a, b in zip(one, two))


@pytest.mark.parametrize("name", CASES)
def test_compiles(name):
    torch._dynamo.reset()
    case = Case(name)

    class Compiled:
        def __getattr__(self, op):
            return torch.compile(getattr(fused, op), fullgraph=True, backend="aot_eager")

    for one, two in zip(case.outputs_and_gradients(fused), case.outputs_and_gradients(Compiled())):
        close(one, [t.double() for t in two], 1e-6)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_are_well_formed(form, dtype, residual):
    if form == "torch":
        pytest.skip("C++ only")
    assert native.why_not((dtype,), 16) == ""
    ops, tests = torch.ops.rwkvlm, ("test_schema", "test_faketensor")

    def tensors(name, **sizes):
        return [None if t is None else t.detach() for t in Case(name, T=5, dtype=dtype, **sizes).inputs]

    x, last, *mixes = tensors("token_mix", state=residual)
    torch.library.opcheck(ops.token_mix_forward.default, (x, last, mixes), test_utils=tests)
    torch.library.opcheck(ops.token_mix_backward.default, ([torch.randn_like(x) for _ in mixes], x, last, mixes), test_utils=tests)
    inputs = tensors("time_mix_inputs", residual=residual)
    grads = [torch.randn_like(x) for _ in range(5)]
    torch.library.opcheck(ops.time_mix_inputs_forward.default, (*inputs, 32), test_utils=tests)
    torch.library.opcheck(
        ops.time_mix_inputs_backward.default, (*grads[:4], grads[4] if residual else None, *inputs, 32, *grads[:residual]), test_utils=tests
    )
    inputs = tensors("time_mix_output")
    torch.library.opcheck(ops.time_mix_output_forward.default, (*inputs, 32, 1e-5), test_utils=tests)
    torch.library.opcheck(ops.time_mix_output_backward.default, (grads[0], *inputs, 32, 1e-5), test_utils=tests)
    torch.library.opcheck(ops.relu_square_forward.default, (x,), test_utils=tests)
    torch.library.opcheck(ops.relu_square_backward.default, (x, x.square()), test_utils=tests)


def test_a_state_of_another_dtype_is_not_read_as_if_it_were_the_same(form):
    """Four bytes taken for two: numbers that are not there.

    Asked for by name the kernels refuse, like any other mixture; by itself, plain PyTorch runs.
    """
    x, last, mix = torch.randn(2, 5, 64, dtype=torch.bfloat16), torch.randn(2, 64), torch.randn(1, 1, 64, dtype=torch.bfloat16)
    for call in (
        lambda: fused.token_mix(x, last, [mix])[0],
        lambda: fused.norm_mix(x, None, mix[0, 0], mix[0, 0], 1e-5, last, [mix])[2][0],
    ):
        if form == "torch":
            assert call().isfinite().all()
        else:
            with pytest.raises(UserError, match="they take bfloat16 or float32 alone, not torch.bfloat16, torch.float32"):
                call()


@pytest.mark.parametrize("name", [*CASES, "norm_mix"])
def test_an_input_that_does_not_fit_is_a_value_error(form, name):
    """Plain PyTorch would take many: it broadcasts, and promotes dtypes, which alone is left to it."""
    case = Case(name, T=5, state=True)
    for what, inputs in misfits(case):
        if "double" in what and (form == "torch" or name == "norm_mix"):  # whose normalisation is PyTorch's on a CPU
            continue
        with pytest.raises(ValueError):
            pytest.fail(f"{what} was taken: {case.call(fused, *inputs)}")
    for x in (torch.zeros(2, 0, 96), torch.zeros(2, 96)):
        with pytest.raises(ValueError):
            pytest.fail(str(fused.token_mix(x, None, [torch.zeros(96)])))
    inputs = Case("time_mix_inputs", T=5).inputs
    for part in range(4, 11):
        if part in (4, 5, 10):
            with pytest.raises(ValueError):
                pytest.fail(str(fused.time_mix_inputs(*(None if i == part else t for i, t in enumerate(inputs)), 32)))


def test_what_reaches_an_operator_itself_is_looked_at(form):
    """What autograd hands to a backward fits; whoever calls it gets an error all the same, and no kernel reads beside a tensor."""
    if form == "torch":
        pytest.skip("the operators of the C++ form")
    ops, B, T, C = torch.ops.rwkvlm, 2, 5, 32
    whole, row, other = torch.ones(B, T, C), torch.ones(C), torch.ones(T, B, C)
    apart, wide, wider = torch.ones(B, C, T).transpose(1, 2), whole.double(), row.double()
    inputs, output = [*[whole] * 6, *[row] * 5], [*[whole] * 5, *[row] * 3]
    plain = [*inputs[:4], None, None, *inputs[6:10], None]  # without a value residual
    calls = {
        "token_mix": [
            ("at most 8 mixes", lambda: ops.token_mix_forward(whole, None, [row] * 9)),
            ("expected x \\[B, T, C\\]", lambda: ops.token_mix_forward(whole[0], None, [row])),
            ("expected last \\[B, C\\]", lambda: ops.token_mix_forward(whole, torch.ones(C, B), [row])),
            ("or another dtype", lambda: ops.token_mix_forward(whole, None, [wider])),
            ("expected contiguous", lambda: ops.token_mix_forward(apart, None, [row])),
            ("a gradient for each mix", lambda: ops.token_mix_backward([whole], whole, None, [row] * 2)),
            ("of one shape", lambda: ops.token_mix_backward([other], whole, None, [row])),
        ],
        "relu_square": [
            ("bfloat16 or float32", lambda: ops.relu_square_forward(wide)),
            ("bfloat16 or float32", lambda: ops.relu_square_forward(whole.half())),
            ("multiple of 16", lambda: ops.relu_square_forward(whole[..., :24].contiguous())),
            ("none 0", lambda: ops.relu_square_forward(whole[:0])),
            ("of one shape", lambda: ops.relu_square_backward(other, whole)),
            ("or another dtype", lambda: ops.relu_square_backward(wide, whole)),
        ],
        "time_mix_inputs": [
            *(("multiple of 16 wide and divide C", lambda N=N: ops.time_mix_inputs_forward(*inputs, N)) for N in (0, 8, 64)),
            ("come together", lambda: ops.time_mix_inputs_forward(*inputs[:5], None, *inputs[6:], 16)),
            ("come together", lambda: ops.time_mix_inputs_forward(*inputs[:10], None, 16)),
            ("a gradient for each output", lambda: ops.time_mix_inputs_backward(*[whole] * 4, None, *inputs, 16)),
            ("a gradient for each output", lambda: ops.time_mix_inputs_backward(*[whole] * 5, *plain, 16)),
        ],
        "time_mix_output": [
            *(("multiple of 16 wide and divide C", lambda N=N: ops.time_mix_output_forward(*output, N, 1e-5)) for N in (0, 8, 64)),
            ("of one shape", lambda: ops.time_mix_output_backward(other, *output, 16, 1e-5)),
            ("16 elements instead of 32", lambda: ops.time_mix_output_forward(*output[:7], row[:16], 16, 1e-5)),
        ],
    }
    for name, several in calls.items():
        for message, call in several:
            with pytest.raises((RuntimeError, ValueError), match=message):
                pytest.fail(f"{name}, instead of '{message}': {call()}")


def test_one_token_of_more_channels_than_a_block_of_rows_has():
    case = Case("token_mix", B=1, T=3, H=1025, N=16)
    for got, want in zip(case.outputs_and_gradients(fused), case.exact()):
        close(got, want, 3e-6)


def test_dispatch(form, monkeypatch, capfd):
    x = torch.randn(1, 3, 32)
    if form == "cpu":
        for bad, why in ((x.double(), "not torch.float64"), (x[..., :8], "a multiple of 16")):
            with pytest.raises(UserError, match=why):
                fused.relu_square(bad)
    monkeypatch.setattr(backend, "_requested", "auto")
    monkeypatch.setattr(backend, "_said", set())
    assert torch.equal(fused.relu_square(x.double()), reference.relu_square(x.double()))
    assert "elementwise parts: running in plain PyTorch" in capfd.readouterr().err
