"""The sampler against its definition."""

import pytest
import torch

from rwkvlm.config import UserError
from rwkvlm.infer.sampling import NEAR, check_sampling, sample

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -4.0]])


def frequencies(logits=LOGITS, draws=20000, **how):
    g = torch.Generator().manual_seed(0)
    drawn = sample(logits.expand(draws, -1), generator=g, **how)
    return torch.bincount(drawn, minlength=logits.shape[-1]) / draws


@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-46, 1e-38, 1e-30, 1e-29, 1e-4])
def test_zero_temperature_takes_the_likeliest_and_so_do_small_ones(temperature):
    assert sample(LOGITS, temperature=temperature).tolist() == [0]
    assert sample(LOGITS + 100, temperature=temperature, top_p=0.9).tolist() == [0]
    assert sample(LOGITS * 1e9, temperature=temperature).tolist() == [0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    assert torch.allclose(frequencies(temperature=temperature), (LOGITS[0] / temperature).softmax(-1), atol=0.015)


@pytest.mark.parametrize("temperature", [1e38, 1e39, 1e308])
def test_at_the_largest_temperatures_what_is_left_is_equally_likely(temperature):
    assert torch.allclose(frequencies(temperature=temperature, top_p=0.7), torch.tensor([0.5, 0.5, 0, 0, 0]), atol=0.015)


def test_top_k():
    want = LOGITS[0].clone()
    want[2:] = -torch.inf
    assert torch.allclose(frequencies(top_k=2), want.softmax(-1), atol=0.015)
    assert torch.equal(frequencies(top_k=9), frequencies()), "more than there are is all"
    assert frequencies(top_k=1).tolist() == [1, 0, 0, 0, 0] and (frequencies(top_k=4) > 0).tolist() == [True] * 4 + [False]


def test_top_p_of_what_top_k_leaves():
    """softmax of the first three is 0.67, 0.24, 0.09; of all of them 0.64, 0.24, 0.09."""
    assert (frequencies(top_k=3, top_p=0.65) > 0).tolist() == [True, False, False, False, False]
    assert (frequencies(top_k=3, top_p=0.92) > 0).tolist() == [True, True, True, False, False]


def test_a_set_that_reaches_top_p_exactly_is_enough():
    assert (frequencies(torch.zeros(1, 4), 1000, top_p=0.5) > 0).sum() == 2


@pytest.mark.parametrize("top_p,kept", [(0.5, 1), (0.7, 2), (0.9, 3), (1.0, 5)])
def test_top_p_keeps_the_smallest_sufficient_set(top_p, kept):
    """softmax of LOGITS is 0.64, 0.24, 0.09, 0.03, 0.002."""
    want = LOGITS[0].clone()
    want[kept:] = -torch.inf
    assert torch.allclose(frequencies(top_p=top_p), want.softmax(-1), atol=0.015)


@pytest.mark.parametrize("slope", [0.02, 2e-4], ids=["fewer than are looked at first", "more"])
def test_top_p_of_a_large_vocabulary(slope):
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(1))
    logits = torch.empty(1, 2000)
    logits[0, order] = -slope * torch.arange(2000.0)
    p = logits[0, order].double().softmax(-1)
    kept = int((p.cumsum(-1) < 0.6).sum()) + 1
    assert (kept < NEAR) == (slope == 0.02)
    found = frequencies(logits, 6000, top_p=0.6)[order]
    assert not found[kept:].any() and (found[:kept] > 0).float().mean() > 0.98
    assert torch.allclose(found[:kept].cumsum(-1), p[:kept].cumsum(-1).float() / p[:kept].sum(), atol=0.03)


def test_top_p_counts_what_lies_behind_the_first_tokens():
    """0.4, 0.2, and 0.4 over twice as many tokens as are looked at first, which so have 0.8; a row beside it has all in its first ones."""
    logits = torch.full((1, 2 + 2 * NEAR), 0.4 / (2 * NEAR)).log()
    logits[0, :2] = torch.tensor([0.4, 0.2]).log()
    assert (frequencies(logits, 100, top_p=0.45) > 0).nonzero()[:, 0].tolist() == [0, 1]
    rows = torch.cat([logits.expand(7000, -1), logits * 9])
    assert len(sample(rows, top_p=0.9, generator=torch.Generator().manual_seed(0))[:-1].unique()) > NEAR + 50


def test_top_p_ignores_the_temperature():
    """As in the official sampler: the set is chosen at temperature 1, then the temperature reshapes it."""
    want = LOGITS[0].clone() / 4
    want[2:] = -torch.inf
    assert torch.allclose(frequencies(top_p=0.7, temperature=4.0), want.softmax(-1), atol=0.015)


def test_rows_are_independent():
    both = torch.tensor([[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    assert sample(both, top_p=0.5).tolist() == [0, 2]


@pytest.mark.parametrize(
    "bad", [dict(temperature=-1.0), dict(temperature=float("nan")), dict(top_p=0.0), dict(top_p=1.5), dict(top_k=-1)], ids=str
)
def test_values_outside_their_range(bad):
    with pytest.raises(UserError, match="--" + next(iter(bad))):
        check_sampling(**{"temperature": 1.0, "top_p": 1.0, "top_k": 0, **bad})
