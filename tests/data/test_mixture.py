"""Several files as one row of samples: shares, order, and what is refused."""

from collections import Counter
from fractions import Fraction
from math import floor

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkvlm.config import UserError
from rwkvlm.data.ahead import Ahead
from rwkvlm.data.binidx import BinIdx, BinIdxWriter
from rwkvlm.data.dataset import RankBatches
from rwkvlm.data.mixture import Turns, held_out, open_mixture, prefixes
from rwkvlm.data.sampler import chunk_of

CTX = 16


@pytest.fixture
def files(tmp_path):
    """a, b, c: 1000, 3000 and 500 tokens that say which file and where: 10000 * file + position."""
    for k, (name, n, dtype) in enumerate([("a", 1000, np.uint16), ("b", 3000, np.uint16), ("c", 500, np.int32)]):
        with BinIdxWriter(tmp_path / name, dtype) as out:
            out.add((np.arange(n) + 10000 * (k + 1)).astype(dtype))
    return tmp_path


def slowly(shares: list[Fraction], n: int) -> list[tuple[int, int]]:
    """Files and numbers of samples 1 to n: the first file's turn is where floor(n * share) rises, the rest goes to the others likewise."""
    if len(shares) == 1:
        return [(0, ii) for ii in range(1, n + 1)]
    turns, rest = [], iter(slowly([share / sum(shares[1:]) for share in shares[1:]], n))
    for ii in range(1, n + 1):
        taken = floor(ii * shares[0])
        if taken > floor((ii - 1) * shares[0]):
            turns.append((0, taken))
        else:
            file, number = next(rest)
            turns.append((file + 1, number))
    return turns


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 2000))
def test_turns_against_the_definition(weights, n):
    shares = [Fraction(w, sum(weights)) for w in weights]
    file, number = Turns(shares)(np.arange(1, n + 1))
    assert list(zip(file.tolist(), number.tolist())) == slowly(shares, n)
    for k, share in enumerate(shares):
        # every file from its first sample on, none left out
        assert number[file == k].tolist() == list(range(1, int((file == k).sum()) + 1))
        assert abs((file == k).sum() - n * share) < len(shares)


def test_turns_far_out_and_with_fine_shares():
    """Against Python integers where products of 64 bits would overflow."""
    shares = [Fraction(999_999_937, 2**31 - 1), 1 - Fraction(999_999_937, 2**31 - 1)]
    turns = Turns(shares)
    ii = np.random.default_rng(0).integers(1, 2**40, 500)
    file, number = turns(ii)
    for i, f, n in zip(ii.tolist(), file, number):
        taken = floor(i * shares[0])
        assert (f, n) == ((0, taken) if taken > floor((i - 1) * shares[0]) else (1, i - taken))
    assert turns(np.int64(7))[0].shape == () and turns(ii.reshape(50, 10))[1].shape == (50, 10)


def test_weights_are_shares_of_the_samples(files):
    mixture = open_mixture(f"{files}/a:0.7,{files}/b:0.2,{files}/c:0.1", CTX)
    assert [float(part.share) for part in mixture.parts] == [0.7, 0.2, 0.1]
    x, y = mixture.samples(1 << 16)[np.arange(1, 101)]
    counts = Counter((x[:, 0] // 10000).tolist())
    assert counts == {1: 70, 2: 20, 3: 10}
    for row, target in zip(x.tolist(), y.tolist()):
        assert row == list(range(row[0], row[0] + CTX)) and target == list(range(row[0] + 1, row[0] + CTX + 1))
    from_a = [row for row in x.tolist() if row[0] < 20000]
    prime = mixture.parts[0].prime
    assert [row[0] - 10000 for row in from_a] == [CTX * chunk_of(ii, prime) for ii in range(1, 71)]  # its own order, from its first sample


def test_files_of_different_dtypes_keep_their_tokens(tmp_path):
    for name, dtype, first in (("a", np.uint16, 0), ("b", np.int32, 70000)):
        with BinIdxWriter(tmp_path / name, dtype) as out:
            out.add((np.arange(1000) + first).astype(dtype))
    x, y = open_mixture(f"{tmp_path}/a:1,{tmp_path}/b:1", CTX).samples(1 << 17)[np.arange(1, 21)]
    assert sorted((x // 70000).unique().tolist()) == [0, 1] and (y == x + 1).all()


def test_its_identity_is_what_is_read_of_each_file(files):
    mixture = open_mixture(f"{files}/a,{files}/c", CTX)
    found = mixture.identity()
    assert [one["file"] for one in found] == [f"{files}/a", f"{files}/c"] and [one["documents"] for one in found] == [1, 1]
    tokens = BinIdx(files / "c").tokens.copy()
    last = mixture.parts[1].prime * CTX  # the last target
    for at, same in ((last + 1, True), (last, False), (0, False)):
        changed = tokens.copy()
        changed[at] += 1
        with BinIdxWriter(files / "c", np.int32) as out:
            out.add(changed)
        assert [one == other for one, other in zip(open_mixture(f"{files}/a,{files}/c", CTX).identity(), found)] == [True, same]


def test_without_weights_one_pass_reads_every_chunk_once(files):
    mixture = open_mixture(f"{files}/a,{files}/b,{files}/c", CTX)
    samples = mixture.samples(1 << 16)
    assert len(samples) == mixture.chunks == sum(part.prime for part in mixture.parts)
    x, _ = samples[np.arange(1, mixture.chunks + 1)]
    expected = {10000 * (k + 1) + CTX * c for k, part in enumerate(mixture.parts) for c in range(part.prime)}
    assert sorted(x[:, 0].tolist()) == sorted(expected)


def test_one_by_one_or_together_or_resumed(files):
    samples = open_mixture(f"{files}/a:3,{files}/c:2", CTX).samples(1 << 16)
    x, y = samples[np.array([1, 2, 3, 50, 10**9])]
    assert x.dtype == torch.int64
    for k, ii in enumerate((1, 2, 3, 50, 10**9)):
        assert torch.equal(samples[ii][0], x[k]) and torch.equal(samples[ii][1], y[k])
    whole = [x for x, _ in Ahead(samples, RankBatches(1, 2, 4, 10))]
    rest = Ahead(samples, RankBatches(1, 2, 4, 7, start=3 * 8))
    assert all(torch.equal(a, b) for a, (b, _) in zip(whole[3:], rest, strict=True))
    asked = []
    for k, part in enumerate(samples.parts):
        part.ask_for = lambda ii, k=k: asked.append((k, ii.tolist()))
    samples.ask_for(np.arange(1, 6))
    assert asked == [(0, [1, 2, 3]), (1, [1, 2])]  # what is read is what was asked for
    assert (
        samples.where(3) == samples.parts[1].where(2)
        and str(files / "c.bin") in samples.where(3)
        and samples.where(5) == samples.parts[0].where(3)
    )


def test_the_smallest_share_is_a_millionth(files):
    assert [part.share for part in open_mixture(f"{files}/a:1,{files}/b:999999", CTX).parts] == [
        Fraction(1, 10**6),
        Fraction(999999, 10**6),
    ]
    with pytest.raises(UserError, match="gives a file 1.0e-06 of the samples; below 1e-06 leave it out"):
        open_mixture(f"{files}/a:1,{files}/b:1000000", CTX)


def test_order_names_what_decides_the_order(files):
    assert open_mixture(f"{files}/a", CTX).order == 59 == open_mixture(f"{files}/a:0.3", CTX).order
    assert (
        open_mixture(f"{files}/a:0.70,{files}/b:0.3", CTX).order
        == open_mixture(f"{files}/a:7,{files}/b:3", CTX).order
        == "59 chunks x 7/10, 179 chunks x 3/10"
    )


def test_a_token_outside_the_vocabulary(files):
    mixture = open_mixture(f"{files}/a,{files}/b", CTX)
    with pytest.raises(UserError, match="b.bin holds token 20000 at position 0"):
        mixture.check_token_range(20000)
    assert [str(seen) for seen in mixture.check_token_range(30000)] == [
        "token ids 10000 to 10999 (all checked)",
        "token ids 20000 to 22999 (all checked)",
    ]
    with pytest.raises(UserError, match="b.bin holds token"):
        mixture.samples(20000)[np.arange(1, 50)]


def test_the_files_share_the_bytes_that_are_looked_through(files, monkeypatch):
    monkeypatch.setattr("rwkvlm.data.tokens.BLOCK", 100)
    seen = open_mixture(f"{files}/a,{files}/b", CTX).check_token_range(30000, limit=2000)
    assert [one.checked for one in seen] == [500, 500], "1000 tokens of 16 bits in all"


def test_held_out_files_one_after_the_other(files):
    samples = held_out([BinIdx(files / "c"), BinIdx(files / "b")], CTX, 1 << 16)
    assert len(samples) == 31 + 187
    x, _ = samples[np.array([1, 31, 32, 218, 219])]
    assert x[:, 0].tolist() == [30000, 30000 + 30 * CTX, 20000, 20000 + 186 * CTX, 30000]
    assert samples.name == f"{files}/c, {files}/b" and len(held_out([BinIdx(files / "c")], CTX, 1 << 16)) == 31
    with pytest.raises(
        UserError,
        match="c.bin holds token 30001 at position 1, outside the vocabulary .*; set the vocab_size of the tokenizer that made the file$",
    ):
        held_out([BinIdx(files / "c")], CTX, 30001)[np.array([1])]


@pytest.mark.parametrize(
    "given, said",
    [
        ("{}/a:0.7,{}/b", "gives {}/b no weight, and others one"),
        ("{}/a,{}/a", "names {}/a twice"),
        ("{}/a:0,{}/b:1", "gives {}/a the weight 0; a weight must be above 0"),
        ("{}/a:-0.5,{}/b:1", "the weight -0.5"),
        ("{}/a,,{}/b", "has an empty name"),
        (":0.5,{}/b:0.5", "has an empty name"),
        ("{}/a:1e-9,{}/b:1", "gives a file 1.0e-09 of the samples; below 1e-06 leave it out"),
        ("{}/a:0.5,{}/no:0.5", "no.idx does not exist"),
        ("{}/a:x,{}/b:0.5", "gives {}/a:x no weight"),
    ],
)
def test_what_cannot_be_meant_is_one_line(files, given, said):
    with pytest.raises(UserError) as caught:
        open_mixture(given.replace("{}", str(files)), CTX)
    assert said.replace("{}", str(files)) in str(caught.value) and "\n" not in str(caught.value)


def test_magic_prime_is_for_one_file(files):
    assert open_mixture(f"{files}/a", 4, 227).parts[0].prime == 227 != open_mixture(f"{files}/a", 4).parts[0].prime
    with pytest.raises(UserError, match="--magic_prime 59 orders one file, and --data_file names 2; leave it out"):
        open_mixture(f"{files}/a,{files}/b", CTX, 59)


def test_a_name_with_signs_in_it_is_a_name(tmp_path):
    with BinIdxWriter(tmp_path / "a,b:0.5") as out:
        out.add(np.arange(100))
    assert prefixes(f"{tmp_path}/a,b:0.5") == {f"{tmp_path}/a,b:0.5": None}
    assert prefixes("a:1/3,b:c:2") == {"a": Fraction(1, 3), "b:c": Fraction(2)}
    assert prefixes("a, b") == prefixes(" a ,b") == {"a": None, "b": None} and prefixes("a: 1, b :2") == {
        "a": Fraction(1),
        "b": Fraction(2),
    }


def test_a_list_may_be_longer_than_a_name(tmp_path):
    """A name has 255 bytes at most, a path 4096."""
    for names, longest in (([f"shard_{k:03}" for k in range(60)], 255), ([f"{tmp_path}/shard_{k:03}" for k in range(400)], 4096)):
        assert len(given := ",".join(names)) > longest and list(prefixes(given)) == names
    with pytest.raises(UserError, match="xx.idx does not exist; give the path without .bin/.idx"):
        open_mixture("x" * 300, CTX)
