"""Shuffling and drawing documents: right, fair, and the same whatever fits into memory."""

import numpy as np
import pytest

from rwkvlm.data import shuffle
from rwkvlm.data.shuffle import Documents, Long, Pile, draw, keys, shuffled


def make(path, sizes, memory=0, numbered=False):
    pile = Pile(path, "<u2", numbered, memory)
    rng = np.random.default_rng(0)
    for first in range(0, len(sizes), 7):
        part = np.array(sizes[first : first + 7], dtype=np.int32)
        tokens = rng.integers(1, 60000, int(part.sum())).astype(np.uint16)
        pile.append(Documents(tokens, part, np.arange(first, first + len(part))))
    return pile


def gathered(documents):
    parts = [
        Documents(np.concatenate([*p.parts()]), np.array([p.size], np.int32), p.numbers) if isinstance(p, Long) else p for p in documents
    ]
    return Documents(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("tokens", "sizes", "numbers")))


def everything(numbers):
    return np.ones(len(numbers), dtype=bool)


@pytest.mark.parametrize("memory", [0, 500, 1 << 20])
@pytest.mark.parametrize("long", [20, 200, 1 << 20])
@pytest.mark.parametrize("leaf, fan_bits, block", [(1 << 30, 6, 100), (300, 2, 64), (400, 1, 1 << 20), (200, 3, 10)])
def test_every_way_gives_the_order_of_the_keys(tmp_path, monkeypatch, leaf, fan_bits, block, memory, long):
    sizes = np.random.default_rng(1).integers(1, 40, 300).tolist()
    sizes[17] = 900  # larger than a leaf
    monkeypatch.setattr(shuffle, "BLOCK", long)
    pile = make(tmp_path / "all", sizes, memory)
    whole = make(tmp_path / "whole", sizes, 1 << 30).load().take(np.arange(300))
    monkeypatch.setattr(shuffle, "LEAF", leaf)
    monkeypatch.setattr(shuffle, "FAN_BITS", fan_bits)
    monkeypatch.setattr(shuffle, "PORTION", block)
    for keep in (everything, lambda numbers: numbers % 3 > 0):
        made = gathered(shuffled(pile, (5, 1), keep, tmp_path))
        order = np.argsort(keys(np.arange(300), 5, 1))
        expected = whole.take(order[keep(order)])
        assert all(np.array_equal(getattr(made, name), getattr(expected, name)) for name in ("tokens", "sizes", "numbers"))
    assert not [*tmp_path.glob("pile-*")]


def test_blocks_are_bounded_and_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "BLOCK", 200)
    sizes = np.random.default_rng(2).integers(1, 40, 500).tolist()
    sizes[100] = 700
    pile = make(tmp_path / "all", sizes)
    blocks = [*pile.blocks()]
    assert [(b.number, b.size) for b in blocks if isinstance(b, Long)] == [(100, 700)]
    assert all(b.tokens.nbytes <= 200 for b in blocks if not isinstance(b, Long))
    assert np.array_equal(gathered(blocks).tokens, pile.load().take(np.arange(500)).tokens) and gathered(blocks).numbers.tolist() == [
        *range(500)
    ]


@pytest.mark.parametrize("memory", [0, 100, 1 << 20])
def test_a_document_appended_in_parts_is_whole(tmp_path, memory):
    pile = make(tmp_path / "all", [3, 4], memory)
    for part in ([1, 2, 3], [], [4], [5, 6]):
        pile.append(Documents(np.array(part, np.uint16), np.zeros(0, np.int32), np.zeros(0, np.int64)))
    pile.append(Documents(np.array([7], np.uint16), np.array([7], np.int32), np.array([2])))
    pile.append(Documents(np.array([8, 9], np.uint16), np.array([2], np.int32), np.array([3])))
    made = pile.load().take(np.array([3, 2]))
    assert made.tokens.tolist() == [8, 9, 1, 2, 3, 4, 5, 6, 7] and made.sizes.tolist() == [2, 7] and made.numbers.tolist() == [3, 2]


def test_keys_are_distinct_and_fair():
    a, b, c = keys(np.arange(200_000), 0, 0), keys(np.arange(200_000), 0, 1), keys(np.arange(200_000), 1, 0)
    for k in (a, b, c):
        assert len(np.unique(k)) == 200_000
        cells = np.bincount((k >> np.uint64(56)).astype(np.int64), minlength=256)
        assert 150 < ((cells - 200_000 / 256) ** 2 / (200_000 / 256)).sum() < 370  # chi squared, 255 degrees of freedom, six sigma
    ranks = [np.argsort(np.argsort(k)) for k in (a, b, c)]
    for x, y in [(0, 1), (0, 2), (1, 2)]:
        assert abs(np.corrcoef(ranks[x], ranks[y])[0, 1]) < 0.012
    assert abs(np.corrcoef(ranks[0], np.arange(200_000))[0, 1]) < 0.012 and abs(np.corrcoef(ranks[0][1:], ranks[0][:-1])[0, 1]) < 0.012
    assert keys(np.arange(3), 7, 1).tolist() == [keys(np.array([k]), 7, 1)[0] for k in range(3)]


@pytest.mark.parametrize("documents", [300, 300_000])  # of so many, several have keys that begin alike
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.97, 1, 2, 77, 299])
def test_drawing(documents, share):
    sizes, numbers = np.random.default_rng(3).integers(1, 400, documents), np.arange(documents)
    limit, n = draw(lambda: zip(np.array_split(sizes, 3), np.array_split(numbers, 3)), share, 9)
    all_keys = keys(numbers, 9)
    drawn = all_keys <= limit
    assert drawn.sum() == n
    if share >= 1:
        assert n == share
    else:
        last = np.argmax(all_keys * drawn)
        assert sizes[drawn].sum() >= share * sizes.sum() > sizes[drawn].sum() - sizes[last]
