"""Every form of WKV4 against the float64 oracle: outputs, all gradients, states, extreme keys; and WKV4 as a citizen of torch."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from oracles.wkv4_cases import Case, errors
from rwkvlm.config import UserError
from rwkvlm.ops import backend
from rwkvlm.ops.wkv4 import EMPTY, native, wkv4, wkv4_chunked, wkv4_native, wkv4_reference

FAILURE = native.why_not(torch.float32, 16)
needs_native = pytest.mark.skipif(bool(FAILURE), reason=FAILURE)
FP32, BF16 = torch.float32, torch.bfloat16
FORMS = {"torch": wkv4_chunked, "cpu": wkv4_native}
FORM = [pytest.param("torch"), pytest.param("cpu", marks=needs_native)]
# p is as large as the keys, and float32 keeps seven digits of it: with keys of 100 exp(k - p) has an error of 1e-5, in the
# official kernel as in the loop in float32. A decay near 1 is added to p token by token, each time with a rounding.
TOLERANCE = {"large": 5e-5, "slow": 2e-5}


@pytest.fixture(autouse=True)
def poisoned():
    """All new memory is filled with NaN. One thread: of many small operations each would only wait for the others."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    if not FAILURE:
        torch.ops.rwkvlm.wkv4_limit_isa(2)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["normal", "large", "slow", "fast", "repeated", "empty"])
@pytest.mark.parametrize("form", FORM)
def test_outputs_states_and_gradients(form, kind, dtype):
    case = Case(kind=kind, dtype=dtype)
    rounding = 4e-3 if dtype == BF16 else 0
    for name, error in errors(case.run(FORMS[form]), case.exact()).items():
        assert error < TOLERANCE.get(kind, 3e-6) + rounding * (name in ("y", "dk", "dv")), (name, error)


@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 31, 32, 33, 64, 65, 150])
@pytest.mark.parametrize("form", FORM)
def test_any_length_with_and_without_a_state(form, T):
    for case in (Case(B=1, T=T, C=16), Case(B=3, T=T, C=80, state=False)):
        assert max(errors(case.run(FORMS[form]), case.exact()).values()) < 5e-6


@needs_native
@pytest.mark.parametrize("isa", [0, 1, 2], ids=["plain", "avx2", "avx512"])
@pytest.mark.parametrize("C", [16, 32, 48, 64, 144])
def test_every_instruction_set_and_strip(isa, C):
    if torch.ops.rwkvlm.wkv4_limit_isa(isa) != isa:
        pytest.skip("not on this machine")
    for dtype in (FP32, BF16):
        case = Case(B=2, T=37, C=C, dtype=dtype, seed=C)
        assert max(errors(case.run(wkv4_native), case.exact()).values()) < (5e-6 if dtype == FP32 else 4e-3)


@needs_native
def test_the_same_bits_again_and_for_any_number_of_threads():
    case, results = Case(B=3, T=100, C=208), []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        results.append(case.run(wkv4_native))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@pytest.mark.parametrize("form", FORM)
def test_a_long_text_with_a_key_that_everything_waits_for(form):
    """A thousand tokens whose exponents all come from the first one, decayed: the longest way for roundings to add up."""
    case = Case(B=1, T=1000, C=16, kind="slow")
    case.inputs[2][:, 0] = 8.0
    assert max(errors(case.run(FORMS[form]), case.exact()).values()) < 2e-3


@pytest.mark.parametrize("form", FORM)
@pytest.mark.parametrize("key", [100.0, -100.0])
def test_keys_far_beyond_the_range_of_exp(form, key):
    """Each key is a hundred larger, or smaller, than what came before: y is the newest value alone, or the oldest, to the last digit."""
    k = key * torch.ones(1, 6, 16) * torch.arange(1, 7)[None, :, None] / 6
    v = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    w, u = torch.full((16,), -1e-3), torch.zeros(16)
    y, state = FORMS[form](w, u, k, v)
    want = v if key > 0 else v[:, :1].expand_as(v)
    assert torch.isfinite(state).all() and (y - want).abs().max() < 2e-6


@pytest.mark.parametrize("form", FORM)
@pytest.mark.parametrize("pieces", [[1] * 70, [32, 32, 6], [3, 1, 66], [69, 1]], ids=str)
def test_pieces_with_the_state_between_them_are_the_whole(form, pieces):
    """Forward, and backward through the states."""
    case = Case(state=False)

    def in_pieces(w, u, k, v, state):
        y = []
        for keys, values in zip(k.split(pieces, 1), v.split(pieces, 1)):
            out, state = FORMS[form](w, u, keys.contiguous(), values.contiguous(), state)
            y.append(out)
        return torch.cat(y, 1), state

    assert max(errors(case.run(in_pieces), case.exact()).values()) < 5e-6


@pytest.mark.parametrize("form", FORM)
def test_nan_is_not_hidden(form):
    for which in (2, 3):
        case = Case()
        case.inputs[which][0, 5, 3] = float("nan")
        y, state, dw, *_, dv, d_initial = case.run(FORMS[form])
        assert y[0, 5:, 3].isnan().all() and dw[3].isnan()
        assert not y[0, :5, :3].isnan().any() and not y[1].isnan().any()
        assert form == "torch" or not y[0, :5].isnan().any()  # in a chunk of plain PyTorch 0 x NaN reaches the tokens before


@pytest.mark.parametrize("form", FORM)
def test_gradients_that_nobody_has(form):
    """The final state alone: y's gradient is zeros, not anything in memory."""
    case = Case(T=40)

    def final_alone(function, double=False):
        inputs = [(x.double() if double else x.detach().clone()).requires_grad_() for x in case.inputs]
        # u has none
        return torch.autograd.grad(function(*inputs)[1][:, :2].square().sum(), inputs, allow_unused=True, materialize_grads=True)

    for got, want in zip(final_alone(FORMS[form]), final_alone(wkv4_reference, double=True)):
        assert (got.double() - want).norm() < 5e-6 * want.norm() + 1e-12


@pytest.mark.parametrize("kernel", FORM)
def test_the_contract(monkeypatch, kernel):
    """The raw decay, parameters in the dtype of k, and whose bits they are."""
    monkeypatch.setattr(backend, "_requested", kernel)
    case = Case(dtype=BF16)
    _, u, k, v, state = case.inputs
    w = torch.randn(48, generator=torch.Generator().manual_seed(3)).bfloat16().requires_grad_()
    u = u.bfloat16().requires_grad_()
    y, final = wkv4(w, u, k, v, state, output_final_state=True)
    want, want_final = FORMS[kernel](-torch.exp(w.float()), u.float(), k, v, state)
    assert y.dtype == BF16 and final.dtype == FP32 and torch.equal(y, want) and torch.equal(final, want_final)
    assert torch.equal(wkv4(w, u, k, v, state), y)
    dw, du = torch.autograd.grad(y.float().square().sum(), (w, u))
    exact = [x.detach().double().requires_grad_() for x in (w, u)]
    out, _ = wkv4_reference(-torch.exp(exact[0]), exact[1], k.double(), v.double(), state.double())
    for got, want in zip((dw, du), torch.autograd.grad(out.square().sum(), exact)):
        assert got.dtype == BF16 and (got.double() - want).norm() < 2e-2 * want.norm()


def test_float64_runs_in_plain_pytorch():
    w, u, k, v, state = (x.double().requires_grad_() for x in Case(B=1, T=20, C=3).inputs)
    assert torch.autograd.gradcheck(lambda *x: wkv4(*x, output_final_state=True), (w, u, k, v, state), atol=1e-6)
    empty = wkv4(w, u, k, v, output_final_state=True)
    none_yet = torch.tensor([0.0, 0.0, EMPTY], dtype=torch.float64)[None, :, None].expand(1, 3, 3).contiguous()
    assert all(torch.equal(a, b) for a, b in zip(empty, wkv4(w, u, k, v, none_yet, True)))


WRONG = {
    "w too long": (lambda w, u, k, v, s: (torch.zeros(49), u, k, v, s), r"w must have the shape \[48\], got \[49\]"),
    "u in another dtype": (lambda w, u, k, v, s: (w, u.double(), k, v, s), "u must be torch.float32, got torch.float64"),
    "k of two dimensions": (lambda w, u, k, v, s: (w, u, k[0], v, s), r"k must be \[B, T, C\]"),
    "no token": (lambda w, u, k, v, s: (w, u, k[:, :0], v[:, :0], s), "with B, T, C >= 1"),
    "k in half": (lambda w, u, k, v, s: (w, u, k.half(), v, s), "k must be bfloat16, float32 or float64, got torch.float16"),
    "v shorter": (lambda w, u, k, v, s: (w, u, k, v[:, 1:], s), r"v must have the shape \[2, 70, 48\]"),
    "v not contiguous": (lambda w, u, k, v, s: (w, u, k, v.transpose(0, 1).contiguous().transpose(0, 1), s), "v must be contiguous"),
    "v elsewhere": (lambda w, u, k, v, s: (w, u, k, v.to("meta"), s), "v must be on cpu, where k is, got meta"),
    "state of heads": (lambda w, u, k, v, s: (w, u, k, v, torch.zeros(2, 3, 4, 16)), r"initial_state must have the shape \[2, 3, 48\]"),
    "state in bf16": (lambda w, u, k, v, s: (w, u, k, v, s.bfloat16()), "initial_state must be torch.float32"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_named(wrong):
    change, said = WRONG[wrong]
    with pytest.raises(ValueError, match=said) as error:
        wkv4(*change(*Case().inputs))
    assert "\n" not in str(error.value)


def test_an_asked_for_kernel_that_cannot_run_is_an_error(monkeypatch):
    monkeypatch.setattr(backend, "_requested", "cuda")
    with pytest.raises(UserError, match="--kernel cuda: wkv4 cannot run: the tensors are on cpu"):
        wkv4(*Case().inputs)
    monkeypatch.setattr(backend, "_requested", "cpu")
    with pytest.raises(UserError, match="it takes a multiple of 16 channels, not 40"):
        wkv4(*Case(C=40).inputs)


@needs_native
@pytest.mark.parametrize("case", ["plain", "bf16", "state", "nothing saved"])
def test_opcheck(case):
    inputs = [
        None if x is None else x.requires_grad_(case != "nothing saved")
        for x in Case(T=37, C=16, dtype=BF16 if case == "bf16" else FP32, state=case == "state").inputs
    ]
    torch.library.opcheck(torch.ops.rwkvlm.wkv4_forward, (*inputs, case != "nothing saved"))


@needs_native
def test_opcheck_of_the_backward():
    case = Case(T=37, C=16)
    _, _, checkpoints = torch.ops.rwkvlm.wkv4_forward(*case.inputs, True)
    torch.library.opcheck(torch.ops.rwkvlm.wkv4_backward, (*case.slopes, *case.inputs[:4], checkpoints))


@needs_native
def test_a_second_derivative_is_an_error():
    inputs = [x.requires_grad_() for x in Case(T=5, C=16).inputs]
    (slope,) = torch.autograd.grad(wkv4_native(*inputs)[0].square().sum(), inputs[2:3], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.square().sum().backward()


@needs_native
def test_compiles_into_one_graph_and_under_activation_checkpointing(monkeypatch):
    monkeypatch.setattr(backend, "_requested", "cpu")
    torch._dynamo.reset()
    case = Case()
    form = lambda *x: wkv4(*x, output_final_state=True)
    plain = case.run(form)
    compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
    again = lambda *x: checkpoint(form, *x, use_reentrant=False)
    for other in (compiled, again):
        assert all(torch.equal(a, b) for a, b in zip(plain, case.run(other)))
