"""One step of AdamW and the norms of gradients, every form against float64, on sizes around vectors and pieces of work."""

from __future__ import annotations

import pytest
import torch

from rwkvlm import native as build
from rwkvlm.ops import adamw, backend
from rwkvlm.ops.adamw import native, reference

SIZES = [(1,), (3, 5), (16,), (31, 33), (32768,), (3, 32769)]
RATES = dict(lr=3e-3, beta1=0.9, beta2=0.99, eps=1e-18, weight_decay=0.1)


@pytest.fixture(params=["cpu", "torch"], autouse=True)
def form(request, monkeypatch):
    if request.param == "cpu" and not build.available("adamw")[0]:
        pytest.skip(build.available("adamw")[1])
    monkeypatch.setattr(backend, "_requested", request.param)
    return request.param


def make(grad_dtype=torch.float32, narrow=False, fresh=False):
    """Arguments of a step; gradients of very different sizes."""
    rng = torch.Generator().manual_seed(0)

    def normal(shape):
        return torch.randn(shape, generator=rng)

    scales = [10.0 ** torch.randint(-12, 3, shape, generator=rng) for shape in SIZES]
    grads = [(normal(shape) * scale).to(grad_dtype) for shape, scale in zip(SIZES, scales)]
    masters = [normal(shape) for shape in SIZES]
    averages = [torch.zeros(shape) if fresh else normal(shape) * scale for shape, scale in zip(SIZES, scales)]
    squares = [torch.zeros(shape) if fresh else (normal(shape) * scale).square() for shape, scale in zip(SIZES, scales)]
    steps = [torch.tensor(0.0 if fresh else 7.0 + i) for i in range(len(SIZES))]
    rounded = [torch.full(shape, float("nan"), dtype=torch.bfloat16) for shape in SIZES] if narrow else []
    return masters, rounded, grads, averages, squares, steps


def copies(state):
    return [[t.clone() for t in tensors] for tensors in state]


@pytest.mark.parametrize("fresh", [False, True], ids=["going on", "first step"])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("grad_dtype, narrow", [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)], ids=str)
def test_a_step_against_float64(grad_dtype, narrow, scale, fresh):
    state, rates = make(grad_dtype, narrow, fresh), RATES | {"beta2": 0.999}  # of which a 1 - beta in float32 is off by 1e-5
    masters, rounded, grads, averages, squares, steps = copies(state)
    exact = [[t.double() for t in tensors] for tensors in (masters, grads, averages, squares, steps)]
    reference.adamw_(exact[0], [], *exact[1:], scale, None, **rates)
    adamw.adamw_(masters, rounded, grads, averages, squares, steps, None if scale is None else torch.tensor(scale), None, **rates)
    assert all(torch.equal(a, b) for a, b in zip(grads, state[2])), "gradients are left as they are"
    assert [s.item() for s in steps] == [s.item() for s in exact[4]]
    for got, want in zip(averages + squares, exact[2] + exact[3]):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=want.abs().max().item() * 1e-7)
    for got, want, before in zip(masters, exact[0], state[0]):
        moved = (want - before.double()).abs().max()
        assert (got.double() - want).abs().max() <= 1e-5 * moved + 2e-7 * want.abs().max()
    assert all(torch.equal(narrow, p.bfloat16()) for narrow, p in zip(rounded, masters))


@pytest.mark.parametrize("found", [1.0, float("nan"), float("inf")])
def test_nothing_changes_where_found_inf_says_so(found):
    state = make(narrow=True)
    after = copies(state)
    adamw.adamw_(*after, None, torch.tensor(found), **RATES)
    for one, two in zip(state[:1] + state[2:], after[:1] + after[2:]):
        assert all(torch.equal(a, b) for a, b in zip(one, two))
    adamw.adamw_(*after, None, torch.tensor(0.0), **RATES)
    assert not torch.equal(state[0][0], after[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_against_float64(form, dtype):
    grads = make(dtype)[2] + [torch.zeros(5, dtype=dtype), torch.full((100000,), 1e-3, dtype=dtype)]
    norms = adamw.gradient_norms(grads)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), reference.gradient_norms(grads), rtol=1e-6 if form == "cpu" else 1e-4, atol=0)
    grads[2].view(-1)[3] = float("nan")
    grads[3].view(-1)[3] = float("inf")
    assert adamw.gradient_norms(grads).isfinite().tolist() == [i not in (2, 3) for i in range(len(grads))]


def test_transposed_gradients_are_understood():
    grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    results = []
    for g in (grad.t(), grad.t().contiguous()):
        p, m, v, t = torch.ones(4, 6), torch.zeros(4, 6), torch.zeros(4, 6), torch.tensor(0.0)
        adamw.adamw_([p], [], [g], [m], [v], [t], None, None, **RATES)
        results.append(m)
    assert torch.equal(*results)


def test_the_same_bits_on_any_number_of_threads(form):
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        state = make(torch.bfloat16, narrow=True)
        norms = adamw.gradient_norms(state[2])
        adamw.adamw_(*state, None, None, **RATES)
        results.append([norms] * (form == "cpu") + state[0] + state[1] + state[3] + state[4])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_moments_that_fade_end_as_zeros(form):
    if form == "torch":
        pytest.skip("torch keeps denormal numbers")
    p, m, v, t = torch.ones(40), torch.full((40,), 1.18e-38), torch.full((40,), 1.18e-38), torch.tensor(3.0)
    adamw.adamw_([p], [], [torch.zeros(40)], [m], [v], [t], None, None, **RATES)  # the smallest normal number is 1.1755e-38
    assert not m.any() and not v.any() and p.isfinite().all()
    assert torch.tensor(1e-40) * 0.5 != 0, "denormal numbers are as before elsewhere"


@pytest.mark.parametrize("level", [0, 1, 2], ids=["plain", "avx2", "avx512"])
def test_every_instruction_set(form, level):
    if form == "torch":
        pytest.skip("C++ only")
    assert native.why_not() == ""
    used = torch.ops.rwkvlm.adamw_limit_isa(level)
    try:
        if used != level:
            pytest.skip("this processor has no such instructions")
        test_a_step_against_float64(torch.bfloat16, True, 0.3, False)
        test_norms_against_float64(form, torch.bfloat16)
        test_norms_against_float64(form, torch.float32)
    finally:
        torch.ops.rwkvlm.adamw_limit_isa(2)


def test_the_operators_are_well_formed(form):
    if form == "torch":
        pytest.skip("C++ only")
    tests = ("test_schema", "test_autograd_registration")
    torch.library.opcheck(torch.ops.rwkvlm.gradient_norms.default, (make()[2],), test_utils=tests)
    state = copies(make(torch.bfloat16, narrow=True))
    state[1] = [torch.zeros_like(t) for t in state[1]]
    torch.library.opcheck(torch.ops.rwkvlm.adamw_.default, (*state, None, None, *RATES.values()), test_utils=tests)
    with pytest.raises(ValueError, match="adamw: expected contiguous"):
        torch.ops.rwkvlm.adamw_(
            [torch.zeros(4)], [], [torch.zeros(3)], [torch.zeros(4)], [torch.zeros(4)], [torch.zeros(())], None, None, *RATES.values()
        )
    with pytest.raises(ValueError, match="adamw: expected contiguous"):  # what is rounded has 16 bits
        torch.ops.rwkvlm.adamw_(*([torch.zeros(4)] for _ in range(5)), [torch.zeros(())], None, None, *RATES.values())


@pytest.mark.parametrize(
    "place, tensor",
    [
        (0, torch.zeros(3, dtype=torch.bfloat16)),
        (1, torch.zeros(3)),
        (2, torch.zeros(4)),
        (2, torch.zeros(3, dtype=torch.float64)),
        (3, torch.zeros(6)[::2]),
        (5, torch.zeros(2)),
    ],
    ids=["a narrow master", "a wide rounded", "a size", "a gradient in float64", "a view with gaps", "a step that is two"],
)
def test_what_no_form_takes_is_a_value_error_and_changes_nothing(place, tensor):
    state = [[torch.zeros(3, dtype=torch.bfloat16 if i == 1 else torch.float32) for _ in range(2)] for i in range(5)] + [
        [torch.zeros(()) for _ in range(2)]
    ]
    state[place][1] = tensor
    before = [[t.clone() for t in tensors] for tensors in state]
    with pytest.raises(ValueError, match="adamw: expected contiguous tensors of the same sizes"):
        adamw.adamw_(*state, None, None, **RATES)
    assert all(torch.equal(a, b) for some, others in zip(before, state) for a, b in zip(some, others))
