"""The sequential CUDA kernels, emulated, against float64: outputs, all gradients, states, any T and N, packed documents, both schedules."""

from __future__ import annotations

import pytest
import torch

from oracles.emulated_wkv7 import Kernels, errors, make_case, separate

FP32, BF16 = torch.float32, torch.bfloat16
LIMITS = {FP32: 2e-6, BF16: 2.2e-3}  # relative rms; rounding a result to bf16 alone costs 1.7e-3


def check(kernels: Kernels, limit: float, **options) -> None:
    case = make_case(**options)
    worst = errors(kernels.run("sequential", case), case.expected())
    assert max(worst.values()) < limit, worst


@pytest.mark.parametrize("T", [1, 15, 16, 17, 64, 100, 130])
def test_any_length(kernels: Kernels, T: int) -> None:
    check(kernels, LIMITS[FP32], T=T, dtype=FP32, seed=T)


@pytest.mark.parametrize("N", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_head_sizes_and_dtypes(kernels: Kernels, N: int, dtype: torch.dtype) -> None:
    check(kernels, LIMITS[dtype], T=35, N=N, B=2, dtype=dtype, seed=N)


@pytest.mark.parametrize("kind", ["clamp", "repeated"])
def test_fast_decay_and_repeated_keys(kernels: Kernels, kind: str) -> None:
    check(kernels, LIMITS[FP32], T=130, dtype=FP32, kind=kind)


def test_without_states(kernels: Kernels) -> None:
    check(kernels, LIMITS[FP32], T=40, dtype=FP32, states=False)


@pytest.mark.parametrize(
    "options",
    [dict(T=35, more="rkv"), dict(T=35, N=16, dtype=BF16, documents=[16, 1, 18], more="rkv"), dict(T=20, N=32, B=2, more="k")],
    ids=str,
)
def test_gradients_from_elsewhere_are_added_up(kernels: Kernels, options: dict) -> None:
    options = dict(dtype=FP32) | options
    check(kernels, LIMITS[options["dtype"]], **options)
    case = make_case(**options)
    got, without = kernels.run("sequential", case), kernels.run("sequential", make_case(**options | dict(more="")))
    for name, x in got.items():
        more = dict(zip(("dr", "dk", "dv"), case.more)).get(name)
        assert torch.equal(x, without[name]) if more is None else case.inputs[0].dtype == BF16 or torch.equal(x, without[name] + more), name


def test_packed_documents_equal_separate_runs(kernels: Kernels) -> None:
    documents = [1, 31, 16, 17, 5]
    packed = make_case(T=sum(documents), dtype=FP32, documents=documents)
    got = kernels.run("sequential", packed)
    for i, (one, tokens) in enumerate(separate(packed)):
        for name, x in kernels.run("sequential", one).items():
            assert torch.equal(x, got[name][i : i + 1] if "state" in name else got[name][:, tokens]), (name, i)


def test_both_schedules_give_the_same_bits(kernels: Kernels) -> None:
    case = make_case(T=50)
    forwards, backwards = kernels.run("sequential", case), kernels.run("sequential", case, reverse=True)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


def test_inference_saves_nothing_and_gives_the_same(kernels: Kernels) -> None:
    case = make_case(T=33)
    assert torch.equal(kernels.run("sequential", case, backward=False)["y"], kernels.run("sequential", case)["y"])


def test_another_head_size_is_refused(kernels: Kernels) -> None:
    case = make_case(T=4, N=48)
    with pytest.raises(AssertionError, match="returned -1"):
        kernels.run("sequential", case, backward=False)
