"""The chunked kernels with test-time training in their scans, emulated, against float64: outputs, states, all gradients, all head sizes."""

from __future__ import annotations

import ctypes

import pytest
import torch

from oracles.emulated_ttt import StepsOfTtt, make_ttt_case, run
from oracles.emulated_wkv7 import Kernels, Shape, errors

# Relative rms against float64: those of test_chunked.py, where there are no steps. da is rounded once more, when the steps' share is added.
LIMITS = {
    "y": 4.7e-3,
    "final_state": 3e-3,
    "dr": 3.8e-3,
    "dw": 4.6e-3,
    "dk": 3.8e-3,
    "dv": 4.2e-3,
    "da": 6.8e-3,
    "db": 6e-3,
    "d_initial_state": 3.2e-3,
}
LIMITS |= {"d_rate": 1e-2, "d_head": 6e-3}  # few numbers, each a sum of many that cancel


def check(kernels: Kernels, **options) -> None:
    given = make_ttt_case(**options)
    got = run(kernels, given)
    masks = got.pop("masks", None)
    worst = errors(got, given.expected(masks))
    assert LIMITS.keys() - worst.keys() == ({"d_head"} if masks is None else set())
    assert all(x < LIMITS[name] for name, x in worst.items()), worst


@pytest.mark.parametrize(
    "options",
    [
        dict(T=130),
        dict(T=256, segment=128),  # a segment of two chunks; no step follows the last one, though it is whole
        dict(T=200, head=False),
        dict(T=150, target="value"),
        dict(T=150, head=False, target="value", states=False),
        dict(T=140, rows=8, B=2, H=1),
        dict(T=140, rows=24),
        dict(T=140, rows=64, H=1),  # works behind the stages of the scan, not in one of them
        dict(T=100, N=16, rows=16, B=2),
        dict(T=200, N=16, rows=8, segment=128),
        dict(T=150, N=32, rows=8, B=2, H=1),
        dict(T=150, N=32, rows=32),
        dict(T=100, N=128, rows=32, segment=32, H=1),
        dict(T=150, N=128, rows=16, H=1),
        dict(T=70, N=128, rows=128, segment=32, H=1),
        dict(T=140, kind="clamp", H=1),
    ],
    ids=str,
)
def test_outputs_and_all_gradients(kernels: Kernels, options: dict) -> None:
    check(kernels, **options)


@pytest.mark.parametrize("options", [dict(T=300), dict(T=100, N=128, rows=128, segment=32)], ids=str)
def test_hidden_units_are_those_above_zero(kernels: Kernels, options: dict) -> None:
    """The masks that the check above takes from the kernels: as float64 has them, but for units at zero; and both kinds occur."""
    given = make_ttt_case(H=1, **options)
    masks, right = run(kernels, given, backward=False)["masks"], []
    given.expected(watch=right)
    right = torch.cat(right, 1)
    hidden = right.shape[-1]
    ours = (masks[:, : right.shape[1], :, None] >> torch.arange(hidden) & 1).bool()
    assert 0.3 < right.double().mean() < 0.7 and (ours != right).double().mean() < 0.01


def test_the_steps_matter(kernels: Kernels) -> None:
    """So that a kernel without them would fail above."""
    given = make_ttt_case(T=130, H=1)
    got, plain = run(kernels, given, backward=False), kernels.run("chunked", given.case, backward=False)
    assert torch.equal(got["y"][:, :64], plain["y"][:, :64])
    assert (got["y"][:, 64:].float() - plain["y"][:, 64:].float()).norm() > 10 * LIMITS["y"] * plain["y"][:, 64:].float().norm()


@pytest.mark.parametrize("options", [dict(N=64), dict(N=128, rows=64, segment=64), dict(N=32, rows=8, segment=128, head=False)], ids=str)
def test_the_steps_are_as_exact_as_fp32(kernels: Kernels, options: dict) -> None:
    """Tokens that change nothing leave the steps alone with a state and its gradient; a factor rounded to bf16 would be off by 1e-3."""
    given = make_ttt_case(T=300, **options)
    r, w, k, v, a, b = given.case.inputs
    for x in (k, v, b, given.case.dy):
        x.zero_()
    w.fill_(-40.0)
    got = run(kernels, given)
    expected = given.expected(got["masks"] if given.ttt.has_head else None)
    for name, before in (("final_state", given.case.initial_state), ("d_initial_state", given.case.d_final_state)):
        change = (expected[name] - before)[:, :, : given.ttt.rows]
        assert change.norm() > 0.02 * before.norm() and (got[name] - expected[name]).norm() < 3e-5 * change.norm(), name


def test_without_a_whole_segment_it_is_the_plain_kernel(kernels: Kernels) -> None:
    given = make_ttt_case(T=64, H=1)
    got, plain = run(kernels, given), kernels.run("chunked", given.case)
    assert all(torch.equal(got[name], plain[name]) for name in plain) and got["d_rate"].shape[0] == 0 and not got["d_head"].any()


@pytest.mark.parametrize(
    "options",
    [dict(T=300), dict(T=140, rows=64, H=1), dict(T=200, N=32, rows=16, segment=128), dict(T=100, N=128, rows=32, segment=32, H=1)],
    ids=str,
)
def test_both_schedules_give_the_same_bits(kernels: Kernels, options: dict) -> None:
    given = make_ttt_case(**options)
    forwards, backwards = run(kernels, given), run(kernels, given, reverse=True)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


def test_every_size_fits_the_smallest_card(kernels: Kernels) -> None:
    kernels.library.emulation_shared_limit(ctypes.c_size_t(99 * 1024))  # what a block may have on sm_86, sm_89 and sm_120
    try:
        for N in (16, 32, 64, 128):
            for rows in {8, N // 2, N}:
                run(kernels, make_ttt_case(T=70, N=N, rows=rows, H=1))
    finally:
        kernels.library.emulation_shared_limit(ctypes.c_size_t(227 * 1024))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(rows=12),
        dict(rows=72),
        dict(rows=0),
        dict(hidden=33),
        dict(segment=96),
        dict(segment=0),
        dict(head=None),
        dict(segment_chunks=1),
        dict(documents=1),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(kernels: Kernels, wrong: dict) -> None:
    numbers = torch.zeros(2 * 4 * 16)
    bounds = torch.tensor([0, 100], dtype=torch.int32)
    settings = dict(rows=16, hidden=4, segment=64, stored=1, rate=numbers.data_ptr(), head=numbers.data_ptr())
    sizes = dict(documents=0, segment_chunks=0) | {name: x for name, x in wrong.items() if name in ("documents", "segment_chunks")}
    steps = StepsOfTtt(**settings | {name: x for name, x in wrong.items() if name in settings})
    shape = Shape(1, 100, 1, 64, sizes["documents"], bounds.data_ptr() if sizes["documents"] else None, sizes["segment_chunks"])
    assert kernels.library.wkv7_ttt_forward(shape, None, steps, *[None] * 5) == -1
    assert kernels.library.wkv7_ttt_backward(shape, None, steps, *[None] * 3, None, *[None] * 3) == -1
