"""The probe of matrix products: what it says, what it leaves alone, and what it would choose on other machines."""

from __future__ import annotations

import pytest
import torch

from rwkvlm.ops import precision


@pytest.fixture(autouse=True)
def restored():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_choice_is_fp32_and_says_so():
    state, setting = torch.get_rng_state(), torch.get_float32_matmul_precision()
    choice, line = precision.fp32_matmul_choice()
    assert line.startswith(f"fp32 matrix products: {choice} (") and "\n" not in line
    assert torch.equal(state, torch.get_rng_state()) and torch.get_float32_matmul_precision() == setting
    torch.set_float32_matmul_precision(choice)
    rate, error = precision._fp32_rate_and_error()
    assert rate > 0 and error <= precision.FP32_ERROR


@pytest.mark.parametrize(
    "medium_rate, medium_error, expected",
    [(2.0, 5e-7, "medium"), (1.0, 5e-7, "highest"), (2.0, 2e-3, "highest")],
    ids=["AMD, MKL slow", "nothing to gain", "Intel AMX: fast, but bf16"],
)
def test_only_a_faster_and_exact_path_is_taken(monkeypatch, medium_rate, medium_error, expected):
    """Other machines, by standing in for the probe."""

    def probe():
        return (medium_rate, medium_error) if torch.get_float32_matmul_precision() == "medium" else (1.0, 4e-7)

    monkeypatch.setattr(precision, "_fp32_rate_and_error", probe)
    assert precision.fp32_matmul_choice()[0] == expected


@pytest.mark.parametrize("bf16, expected", [(400.0, True), (100.0, False), (105.0, False)])
def test_bf16_needs_a_real_gain(monkeypatch, bf16, expected):
    monkeypatch.setattr(precision, "_gflops", lambda x, w: bf16 if x.dtype == torch.bfloat16 else 100.0)
    assert precision.bf16_is_faster() is expected


def test_bf16_probe_runs():
    assert precision.bf16_is_faster() in (True, False)
