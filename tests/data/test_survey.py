"""What a survey says about a pair, against counting by hand; in blocks of any size."""

import random

import numpy as np
import pytest

from rwkvlm.data import survey as module
from rwkvlm.data.binidx import BinIdx, BinIdxWriter
from rwkvlm.data.survey import bounds, guess_tokenizer, runs, same_again, survey
from rwkvlm.data.tokenizer import load_tokenizer


def write(prefix, documents, dtype=np.uint16):
    with BinIdxWriter(prefix, dtype) as out:
        for document in documents:
            out.add(np.array(document, dtype=dtype))
    return BinIdx(prefix)


def some(rng, n=200):
    return [[rng.randrange(1, 60000) for _ in range(rng.choice([0, 1, 3, 50, 1000]))] + [0] * rng.randrange(2) for _ in range(n)]


@pytest.mark.parametrize("documents, tokens", [(1 << 20, 1 << 22), (7, 100), (1, 1), (200, 5)])
def test_survey_counts(tmp_path, monkeypatch, documents, tokens):
    monkeypatch.setattr(module, "DOCUMENTS", documents)
    monkeypatch.setattr(module, "TOKENS", tokens)
    docs = some(random.Random(0)) + [[5, 0, 7, 0], [0], []]
    data = write(tmp_path / "a", docs)
    seen = survey(data)
    flat = [t for d in docs for t in d]
    assert seen.whole and (seen.documents, seen.tokens) == (len(docs), len(flat)) == (data.n_docs, data.n_tokens)
    assert (seen.smallest, seen.largest) == (0, max(flat))
    ended = sum(d[-1:] == [0] for d in docs)
    assert (seen.ended, seen.inside) == (ended, flat.count(0) - ended)
    assert seen.lengths == tuple(sum(len(d).bit_length() == bits for d in docs) for bits in range(1 + max(map(len, docs)).bit_length()))
    assert (seen.shortest, seen.longest) == (0, max(map(len, docs)))
    pieces = [(first, np.diff(ends).tolist()) for first, ends in runs(data)]
    assert [size for _, sizes in pieces for size in sizes] == [len(d) for d in docs]
    assert all(sum(sizes) <= max(tokens, sizes[0]) for _, sizes in pieces)


def test_a_large_file_is_looked_at_in_places(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOKENS", 1000)
    rng = random.Random(1)
    docs = [[rng.randrange(1, 60000) for _ in range(99)] + [0] for _ in range(1000)]
    seen = survey(write(tmp_path / "a", docs), limit=20000)
    assert not seen.whole and seen.tokens == 10 * 1000 and seen.documents == seen.ended == 100 and seen.inside == 0
    assert seen.lengths == (0,) * 7 + (1000,) and seen.shortest == seen.longest == 100  # sizes are all counted


def test_of_a_long_document_the_end_is_looked_at(tmp_path, monkeypatch):
    """A .txt is one document, of any size."""
    monkeypatch.setattr(module, "TOKENS", 1000)
    docs = [[7] * 49999 + [0], [5, 0], *([9] * 30000 for _ in range(3)), [3, 0], [7] * 999 + [0]]
    seen = survey(write(tmp_path / "a", docs), limit=20000)
    assert (seen.documents, seen.tokens, seen.ended, seen.inside) == (7, 5 * 1000 + 2 * 2, 4, 0)
    assert (seen.smallest, seen.largest, seen.longest) == (0, 9, 50000)


def test_documents_of_several_items(tmp_path):
    """As Megatron writes them; and the [0] of its older merge tool, where every item is a document."""
    data = write(tmp_path / "a", [[1, 2], [3, 0], [4], [], [5, 0]])
    raw = bytearray((tmp_path / "a.idx").read_bytes())
    raw[26:34] = (4).to_bytes(8, "little")
    entries = 34 + 12 * 5
    (tmp_path / "a.idx").write_bytes(raw[:entries] + np.array([0, 2, 3, 5], "<i8").tobytes())
    data = BinIdx(tmp_path / "a")
    assert bounds(data, 0, 3).tolist() == [0, 4, 5, 7] and bounds(data, 1, 2).tolist() == [4, 5]
    assert survey(data).ended == 2 and survey(data).documents == 3
    raw[26:34] = (1).to_bytes(8, "little")
    (tmp_path / "a.idx").write_bytes(raw[:entries] + bytes(8))
    assert bounds(BinIdx(tmp_path / "a"), 0, 5).tolist() == [0, 2, 4, 5, 5, 7]


def test_whose_tokens(tmp_path):
    world = load_tokenizer("world")
    rng = random.Random(2)
    words = "the cat größte → 漢字 def __init__(self): return 1234 \n\n    ".split(" ")
    texts = [" ".join(rng.choice(words) for _ in range(n)) for n in [0, 1, 5, 100, 5000] * 10]
    own = write(tmp_path / "own", [[*world.encode(text), 0] for text in texts])
    assert same_again(own, world)[0] == same_again(own, world)[1] >= 10
    assert guess_tokenizer(own, survey(own), world).startswith("World (rwkv_vocab_v20230424): ")
    other = write(tmp_path / "other", [[rng.randrange(1, 50000) for _ in range(300)] + [0] for _ in range(30)])
    guess = guess_tokenizer(other, survey(other), world)
    assert guess.startswith("not World: ") and "GPT-NeoX 20B" in guess
    raw = write(tmp_path / "bytes", [[*text.encode(), 0] for text in texts], np.uint8)
    assert guess_tokenizer(raw, survey(raw), world).startswith("bytes or characters: no id above ")
    empty = write(tmp_path / "empty", [[0], [0]])
    assert guess_tokenizer(empty, survey(empty), world).startswith("bytes or characters")
