"""The chunked tensor-core kernels, emulated, against float64: outputs, all gradients, states, tails, packed documents, both schedules."""

from __future__ import annotations

import ctypes

import pytest
import torch

from oracles.emulated_wkv7 import WRONG_BOUNDS, Kernels, Shape, errors, make_case, separate, with_bounds

# Relative rms against float64 on the same bf16 inputs; measured values are a fifth below. Rounding the result to bf16 alone costs 1.7e-3.
LIMITS = {
    "y": 4.7e-3,
    "final_state": 3e-3,
    "dr": 3.8e-3,
    "dw": 4.6e-3,
    "dk": 3.8e-3,
    "dv": 4.2e-3,
    "da": 6.2e-3,
    "db": 6e-3,
    "d_initial_state": 3.2e-3,
}
# With keys that hardly differ each token's write is nearly undone by the next: what remains is 64 roundings of what was written.
REPEATED = 3e-2


def check(kernels: Kernels, **options) -> None:
    case = make_case(**options)
    got = errors(kernels.run("chunked", case), case.expected())
    limits = dict.fromkeys(LIMITS, REPEATED) if options.get("kind") == "repeated" else LIMITS
    assert all(got[name] < limits[name] for name in limits), got  # false for NaN, too


@pytest.mark.parametrize("N", [64, 128])  # their chunks have 64 and 32 tokens
@pytest.mark.parametrize("T", [1, 15, 16, 17, 64, 100, 130])
def test_any_length(kernels: Kernels, T: int, N: int) -> None:
    # Few tokens round in few places: the error of a single number says little, that of 8 rows does.
    check(kernels, T=T, N=N, B=8 if T < 16 else 1, H=1, seed=T)


@pytest.mark.parametrize("N", [16, 32])
def test_head_sizes(kernels: Kernels, N: int) -> None:
    check(kernels, T=90, N=N, B=2, seed=N)


@pytest.mark.parametrize("N", [64, 128])
@pytest.mark.parametrize("kind", ["clamp", "repeated"])
def test_fast_decay_and_repeated_keys(kernels: Kernels, kind: str, N: int) -> None:
    check(kernels, T=130, N=N, H=1, kind=kind)


@pytest.mark.parametrize("N", [64, 128])
def test_without_states(kernels: Kernels, N: int) -> None:
    check(kernels, T=70, N=N, H=1, states=False)


@pytest.mark.parametrize("options", [dict(T=131, documents=[1, 63, 64, 3]), dict(T=67, N=128, documents=[1, 31, 32, 3])], ids=str)
def test_packed_documents_equal_separate_runs(kernels: Kernels, options: dict) -> None:
    packed = make_case(H=1, **options)
    got = kernels.run("chunked", packed)
    for i, (one, tokens) in enumerate(separate(packed)):
        for name, x in kernels.run("chunked", one).items():
            assert torch.equal(x, got[name][i : i + 1] if "state" in name else got[name][:, tokens]), (name, i)


@pytest.mark.parametrize("options", [dict(T=70, B=2), dict(T=67, N=128, B=2), dict(T=140, documents=[70, 70], segment_chunks=1)], ids=str)
def test_a_sequence_does_not_see_what_is_not_a_number_in_the_next(kernels: Kernels, options: dict) -> None:
    """Behind the last token of a chunk that is not whole lie those of the next sequence: times zero, a NaN would still be one."""
    case = make_case(H=1, **options)
    clean = kernels.run("chunked", case)
    for x in (*case.inputs, case.dy):
        x.view(2, -1)[1] = torch.nan
    for name, x in kernels.run("chunked", case).items():
        mine, other = x.view(2, -1)
        assert torch.equal(mine, clean[name].view(2, -1)[0]) and other.isnan().any(), name


@pytest.mark.parametrize("kernel", ["chunked", "sequential"])
@pytest.mark.parametrize("bounds", WRONG_BOUNDS, ids=str)
def test_wrong_bounds_lead_to_no_other_memory(kernels: Kernels, kernel: str, bounds: list[int]) -> None:
    """Nobody has waited to look at them. What comes out is not said; nothing is written behind a tensor."""
    for segment_chunks in (0, 1):
        kernels.run(kernel, with_bounds(make_case(T=100, N=32, H=1, documents=[1, 99], segment_chunks=segment_chunks), bounds))


@pytest.mark.parametrize(
    "options",
    [
        dict(T=100, more="rkv"),
        dict(T=67, N=128, H=1, documents=[1, 31, 32, 3], more="rkv"),
        dict(T=70, N=16, B=2, more="rk"),
        dict(T=70, N=32, segment_chunks=1, more="v"),
        dict(T=20, N=16, more="k"),
    ],
    ids=str,
)
def test_gradients_from_elsewhere_are_added_up(kernels: Kernels, options: dict) -> None:
    case, alone = make_case(**options), make_case(**options | dict(more=""))
    got, without, expected = kernels.run("chunked", case), kernels.run("chunked", alone), case.expected()
    worst = errors(got, expected)
    assert all(worst[name] < LIMITS[name] for name in LIMITS), worst
    for name, x in got.items():
        more = dict(zip(("dr", "dk", "dv"), case.more)).get(name)
        if more is None:
            assert torch.equal(x, without[name]), name
        else:  # rounded once instead of twice
            assert worst[name] < errors({name: without[name] + more}, expected)[name], name


@pytest.mark.parametrize("N", [64, 128])
def test_both_schedules_give_the_same_bits(kernels: Kernels, N: int) -> None:
    case = make_case(T=100, N=N, B=2, H=1)
    forwards, backwards = kernels.run("chunked", case), kernels.run("chunked", case, reverse=True)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


def test_a_smaller_card_divides_the_scans_less(kernels: Kernels) -> None:
    """Parts beyond what runs at once would come one after the other. The bits do not depend on it."""
    case, threads, results = make_case(T=70, H=3), [], []
    for limit in (227, 99):  # KB of a block on sm_90, and on sm_86, sm_89 and sm_120: four blocks of a scan on a multiprocessor, and two
        kernels.library.emulation_shared_limit(ctypes.c_size_t(limit * 1024))
        try:
            kernels.run("chunked", case, backward=False)
            threads.append(kernels.library.emulation_threads())
            results.append(kernels.run("chunked", case))
        finally:
            kernels.library.emulation_shared_limit(ctypes.c_size_t(227 * 1024))
    assert threads == [32, 64] and all(torch.equal(x, results[1][name]) for name, x in results[0].items())


# two chunks; more pairs than parts_of_scan (chunk.cuh) divides
@pytest.mark.parametrize("N, T, H", [(32, 70, 9), (64, 70, 3), (128, 33, 2)])
def test_many_heads_take_whole_blocks_in_the_scans(kernels: Kernels, N: int, T: int, H: int) -> None:
    kernels.run("chunked", make_case(T=T, N=N, B=3, H=H), backward=False)
    assert kernels.library.emulation_threads() == 2 * N
    check(kernels, T=T, N=N, B=3, H=H)


def test_both_schedules_give_the_same_bits_in_whole_blocks(kernels: Kernels) -> None:
    case = make_case(T=200, N=32, B=3, H=9)  # four chunks: the scans use their buffers again
    forwards, backwards = kernels.run("chunked", case), kernels.run("chunked", case, reverse=True)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


@pytest.mark.slow
def test_many_chunks_do_not_accumulate_error(kernels: Kernels) -> None:
    check(kernels, T=1500, H=1)


def test_what_it_cannot_do_is_refused(kernels: Kernels) -> None:
    bounds = ctypes.addressof((ctypes.c_int32 * 2)(0, 64))
    right = dict(B=1, T=64, H=2, N=64, documents=0, cu_seqlens=None, segment_chunks=0)
    for wrong in (
        dict(N=48),
        dict(B=0),
        dict(T=0),
        dict(H=0),
        dict(H=65536),
        dict(B=2, T=2**30),
        dict(segment_chunks=-1),
        dict(cu_seqlens=bounds),
        dict(B=2, documents=1, cu_seqlens=bounds),
    ):
        shape = Shape(**right | wrong)
        assert (
            kernels.library.wkv7_chunked_forward(shape, *[None] * 6) == kernels.library.wkv7_sequential_forward(shape, 0, *[None] * 5) == -1
        ), wrong
    case = make_case(T=10, H=1)
    kernels.library.emulation_shared_limit(ctypes.c_size_t(48 * 1024))
    try:
        with pytest.raises(AssertionError, match="returned 1.*shared memory"):
            kernels.run("chunked", case)
    finally:
        kernels.library.emulation_shared_limit(ctypes.c_size_t(227 * 1024))


def test_every_kernel_fits_the_smallest_card(kernels: Kernels) -> None:
    kernels.library.emulation_shared_limit(ctypes.c_size_t(99 * 1024))  # what a block may have on sm_86, sm_89 and sm_120
    try:
        for N in (64, 128):
            kernels.run("chunked", make_case(T=10, N=N, H=1))
        kernels.run("sequential", make_case(T=10, H=1, N=128))
    finally:
        kernels.library.emulation_shared_limit(ctypes.c_size_t(227 * 1024))
