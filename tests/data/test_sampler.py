"""The order of the samples: published values, exactness, independence of ranks and batches."""

import math
import random

import numpy as np
import pytest
import torch

from rwkvlm.config import UserError
from rwkvlm.data.ahead import Ahead
from rwkvlm.data.binidx import BinIdxWriter
from rwkvlm.data.dataset import HeldOutSamples, RankBatches, TrainingSamples
from rwkvlm.data.sampler import check_magic_prime, chunk_of, chunks_of, is_prime, magic_prime, order_hash

MINIPILE, PILE = 1498226207, 332115325534


def slow_prime(n):
    return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))


def test_published_primes():
    assert magic_prime(MINIPILE, 512) == 2926181
    assert magic_prime(MINIPILE, 4096) == 365759
    assert magic_prime(PILE, 4096) == 81082817


def test_primality():
    assert [n for n in range(10000) if is_prime(n)] == [n for n in range(10000) if slow_prime(n)]
    for strong_pseudoprime in (3215031751, 3474749660383, 341550071728321, 3825123056546413051):
        assert not is_prime(strong_pseudoprime)
    assert is_prime(2**61 - 1) and not is_prime((2**31 - 1) * (2**19 - 1))


def test_order_is_the_official_formula():
    """Against the official expression in Python integers, at the published primes and random ones."""
    rng = random.Random(0)
    for p in [2926181, 365759, 81082817, 2, 5] + [magic_prime(rng.randrange(10**4, 10**12), 512) for _ in range(20)]:
        factor = int(p * ((math.sqrt(5) - 1) / 2))
        ii = [1, 2, 3, 5688, 5689, 40320, p - 1, p, p + 1] + [rng.randrange(1, 10**10) for _ in range(200)]
        expected = [(factor * i * i * i) % p for i in ii]
        assert [chunk_of(i, p) for i in ii] == expected
        assert chunks_of(np.array(ii), p).tolist() == expected


def test_no_overflow_up_to_the_largest_prime():
    p = next(n for n in range(2**40, 0, -1) if n % 3 == 2 and is_prime(n))
    ii = np.random.default_rng(0).integers(1, 2**63 - 1, 2000)
    assert chunks_of(ii, p).tolist() == [chunk_of(int(i), p) for i in ii]
    assert chunks_of(ii.reshape(20, 100), p).shape == (20, 100)


@pytest.mark.parametrize("p", [2, 5, 11, 83, 227, 2273, 365759])
def test_one_pass_visits_every_chunk_once(p):
    assert is_prime(p) and p % 3 == 2
    assert sorted(chunks_of(np.arange(1, p + 1), p).tolist()) == list(range(p))


def test_every_small_size_has_a_prime_inside_the_file():
    for n_tokens in range(1, 4000):
        ctx_len = 13
        if n_tokens < 2 * ctx_len + 1:
            with pytest.raises(UserError, match=f"ctx_len 13 needs .* {n_tokens}"):
                magic_prime(n_tokens, ctx_len)
            continue
        p = magic_prime(n_tokens, ctx_len)
        slots = n_tokens // ctx_len
        assert slow_prime(p) and p % 3 == 2 and p * ctx_len + 1 <= n_tokens
        check_magic_prime(p, n_tokens, ctx_len)
        official = max((q for q in range(2, slots) if q % 3 == 2 and slow_prime(q)), default=0)
        assert p == official or (p > official and official <= 0.9 * slots) or slots < 3


def test_more_chunks_than_the_products_can_hold_are_refused():
    with pytest.raises(UserError, match=f"{1 << 43} tokens at --ctx_len 4 are more than {1 << 40} chunks; use a larger ctx_len"):
        magic_prime(1 << 43, 4)
    assert magic_prime(1 << 43, 16) < 1 << 40


def test_given_primes():
    check_magic_prime(2926181, MINIPILE, 512)
    smaller = next(n for n in range(2926180, 0, -1) if n % 3 == 2 and is_prime(n))
    check_magic_prime(smaller, MINIPILE, 512)  # legal
    for wrong, why in [
        (2926182, "is not a prime"),
        (2926177, "leaves 1 modulo 3"),
        (2335253, "leaves out more than a tenth of the 2926223 chunks"),
        (81082817, "past the end"),
        (0, "not a prime"),
        (-7, "not a prime"),
    ]:
        with pytest.raises(UserError, match=f"magic_prime {wrong} .*{why}.*--magic_prime 2926181"):
            check_magic_prime(wrong, MINIPILE, 512)


def test_the_token_after_the_last_chunk_must_exist():
    """p = tokens // ctx_len passes the official asserts, and then reads one token too many."""
    check_magic_prime(101, 101 * 64 + 1, 64)
    with pytest.raises(UserError, match="past the end"):
        check_magic_prime(101, 101 * 64, 64)


def test_the_order_of_minipile_stays_what_it_is():
    assert order_hash(magic_prime(MINIPILE, 512)) == "8e59fa5ead224d01" != order_hash(365759)


@pytest.fixture
def prefix(tmp_path):
    with BinIdxWriter(tmp_path / "a") as out:
        out.add(np.arange(60000) % 50021)
    return tmp_path / "a"


@pytest.mark.parametrize("world, micro", [(1, 8), (2, 4), (4, 2), (8, 1), (1, 1), (3, 5)])
def test_any_layout_consumes_the_same_samples(world, micro):
    start, steps = 1234, 6
    ranks = [list(RankBatches(r, world, micro, steps, start)) for r in range(world)]
    for step in range(steps):
        consumed = sorted(int(i) for r in range(world) for i in ranks[r][step])
        first = 1 + start + step * world * micro
        assert consumed == list(range(first, first + world * micro))
    for r in range(world):  # the official rule, sample by sample
        assert np.concatenate(ranks[r]).tolist() == [1 + start + idx * world + r for idx in range(steps * micro)]
    assert len(RankBatches(0, world, micro, steps, start)) == steps


def test_samples_are_the_chunks_of_the_file(prefix):
    p = magic_prime(60000, 64)
    samples = TrainingSamples(prefix, 64, p)
    tokens = [i % 50021 for i in range(60000)]
    assert len(samples) == p
    for ii in (1, 2, 77, p, p + 1, 10**9):
        x, y = samples[ii]
        at = chunk_of(ii, p) * 64
        assert x.dtype == y.dtype == torch.int64 and x.tolist() == tokens[at : at + 64] and y.tolist() == tokens[at + 1 : at + 65]
    x, y = samples[np.array([1, 2, 77])]
    assert x.shape == y.shape == (3, 64) and x.is_contiguous() and y.is_contiguous()
    assert all(torch.equal(x[k], samples[ii][0]) and torch.equal(y[k], samples[ii][1]) for k, ii in enumerate((1, 2, 77)))


def test_resuming_gives_the_rest(prefix):
    samples = TrainingSamples(prefix, 64, magic_prime(60000, 64))
    whole = [x for x, _ in Ahead(samples, RankBatches(1, 2, 4, 10))]
    rest = [x for x, _ in Ahead(samples, RankBatches(1, 2, 4, 7, start=3 * 8))]
    assert len(whole) == 10 and all(torch.equal(a, b) for a, b in zip(whole[3:], rest, strict=True))


def test_held_out_walks_in_order_and_starts_over(prefix):
    held = HeldOutSamples(prefix, 100)
    assert len(held) == 599
    x, y = held[np.array([1, 2, 599, 600])]
    assert x[:, 0].tolist() == [0, 100, 59800 - 50021, 0] and y[0].tolist() == list(range(1, 101))
    with pytest.raises(UserError, match="60000 tokens; --ctx_len 60000 needs at least 60001: hold out more .*--val_split"):
        HeldOutSamples(prefix, 60000)


def test_a_token_outside_the_vocabulary_stops_the_sample(prefix):
    p = magic_prime(60000, 64)
    samples = TrainingSamples(prefix, 64, p, vocab_size=50000)
    bad = next(ii for ii in range(1, p) if chunk_of(ii, p) == 50000 // 64)
    samples[np.arange(1, bad)]
    with pytest.raises(UserError, match="a.bin holds token 50000 at position 50000"):
        samples[np.array([1, bad])]
    with pytest.raises(UserError, match="magic_prime 7"):
        TrainingSamples(prefix, 64, 7)
