"""The native World tokenizer: the ids of the plain one on everything that is hard for a greedy match, and no crash on any bytes."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from rwkvlm import native
from rwkvlm.data import tokenizer as module
from rwkvlm.data.documents import Block, parse
from rwkvlm.data.tokenizer import NativeWorldTokenizer, Texts, WorldTokenizer, load_tokenizer

VOCABULARY = module.vocabulary_path()
PLAIN = WorldTokenizer(VOCABULARY)
try:
    NATIVE = NativeWorldTokenizer(VOCABULARY)
except native.NativeBuildError as error:
    pytest.skip(str(error), allow_module_level=True)

TOKENS = [PLAIN.decode_bytes([i]) for i in range(1, 65530)]


def equal(texts, reference=PLAIN.encode):
    ids, ends = NATIVE.encode_batch(Texts.join(texts))
    assert ids.dtype == np.uint16 and len(ends) == len(texts) and ends[-1] == len(ids)
    for text, first, last in zip(texts, [0, *ends], ends):
        assert ids[last - 1] == 0 and ids[first : last - 1].tolist() == reference(text), text


def random_strings(seed, n):
    rng = random.Random(seed)
    for _ in range(n):
        kind, size = rng.randrange(4), rng.choice([rng.randrange(4), rng.randrange(60), rng.randrange(300)])
        if kind == 0:
            yield "".join(
                chr(
                    rng.choice(
                        [rng.randrange(32, 127), rng.randrange(0x3000), rng.randrange(0x3000, 0xD800), rng.randrange(0xE000, 0x110000)]
                    )
                )
                for _ in range(size)
            ).encode()
        elif kind == 1:
            yield "".join(rng.choice(" etaoinshrdlu,.ETA\n") for _ in range(size)).encode()
        else:
            yield b"".join(rng.choice(TOKENS)[: rng.choice([None, rng.randrange(8)])] for _ in range(size // 4))


def test_the_default_is_native():
    assert isinstance(load_tokenizer("world"), NativeWorldTokenizer)


def test_every_code_point_token_and_prefix():
    points = [*range(0xD800), *range(0xE000, 0x110000)]
    equal([chr(c).encode() for c in points])
    equal(["".join(map(chr, points)).encode(), b"".join(TOKENS)])
    prefixes = [token[:k] for token in TOKENS for k in range(1, len(token) + 1)]
    equal(prefixes[::3])
    equal([b"".join(prefixes[k : k + 50]) for k in range(0, len(prefixes), 50)])


def test_random_bytes_and_long_runs():
    rng = random.Random(0)
    equal([rng.randbytes(rng.randrange(600)) for _ in range(3000)])
    equal([bytes([b]) * n for b in range(256) for n in (1, 2, 127, 128, 129, 130, 257, 1000)])
    equal([token * 40 for token in TOKENS[::37]])


@pytest.mark.slow
def test_a_hundred_thousand_random_strings():
    strings = [*random_strings(1, 100_000)]
    for k in range(0, len(strings), 9973):
        equal(strings[k : k + 9973])


def test_the_second_opinion():
    """A tokenizer in Rust by other authors; its ids are the official ones."""
    other = pytest.importorskip("pyrwkv_tokenizer").RWKVTokenizer()
    texts = [text for text in random_strings(2, 20_000) if text.decode("utf-8", "ignore").encode() == text]
    assert len(texts) > 10_000
    equal(texts, lambda text: other.encode(text.decode()))


def test_batches_of_all_shapes():
    """The lanes that encode texts in turns are filled, passed over and emptied in every way."""
    rng = random.Random(3)
    for n in range(1, 12):
        for _ in range(30):
            equal(
                [
                    rng.choice([b"", b"a", "é".encode() * rng.randrange(400), b" " * rng.randrange(300), rng.randbytes(300)])
                    for _ in range(n)
                ]
            )
    ids, ends = NATIVE.encode_batch(Texts.join([]))
    assert len(ids) == len(ends) == 0
    assert NATIVE.encode("") == [] and NATIVE.encode_batch(Texts.join([b"", b""]))[0].tolist() == [0, 0]


def test_a_vocabulary_without_all_bytes_is_refused():
    library = native.library("tokenizer")
    for tokens in ([], [bytes([b]) for b in range(255)], [b"ab"]):
        lengths = np.array([len(t) for t in tokens], dtype=np.int64)
        assert library.rwkvlm_world(b"".join(tokens), lengths.ctypes.data, len(tokens)) is None


def test_any_bytes_are_taken():
    """Run with the sanitizers too: tests/ops/test_sanitizers.py."""
    rng = random.Random(0)
    for _ in range(1500):
        texts = []
        for _ in range(rng.randrange(9)):
            n = rng.choice([0, 1, 2, 130, rng.randrange(2000)])
            texts.append(rng.choice([rng.randbytes(n), bytes([rng.randrange(256)]) * n, b"".join(rng.choices(TOKENS, k=n // 9))]))
        ids, _ = NATIVE.encode_batch(Texts.join(texts))
        assert NATIVE.decode_bytes(ids).replace(b"\xef\xbf\xbd", b"") == b"".join(texts).replace(b"\xef\xbf\xbd", b"")
        NATIVE.decode([rng.randrange(-(10**12), 10**12) for _ in range(20)])
    for behind in (b"", b"x"):  # where all three lanes are busy and the longest match ends with the memory, or one byte before
        texts = Texts.join([max(TOKENS, key=len) * 4 + behind] * 3)
        NATIVE.encode_batch(Texts(texts.data.copy(), texts.ends))


def test_any_lines_are_taken():
    rng = random.Random(0)
    line = (
        json.dumps({"a": [1.5, {"b": None}], "text": "\ud83d\ude00 \\ a\u00e9中" * 3}).encode()
        + b"\n"
        + '{"text": "é中😀 abcdefghij"}'.encode()
    )
    for _ in range(20000):
        data = bytearray(line)
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randrange(3)] = rng.choice([b'"', b"\\", b"\n", b"\xf0\x9f", b"\\u", b"{", b"[", rng.randbytes(1)])
        data = bytes(data[: rng.choice([None, rng.randrange(len(data) + 1)])])
        parse(Block(Path("x.jsonl"), 1, data, 0, data.count(b"\n") + 1))


def test_which_ids_occur_is_what_the_plain_one_counts():
    rng = np.random.default_rng(0)
    for ids in (
        np.zeros(0, np.uint16),
        np.array([0, 65535, 7], np.uint16),
        rng.integers(0, 65536, 200_000).astype(np.uint16)[::3],
        rng.integers(0, 50, 100).astype(np.int32),
    ):
        seen = NATIVE.occurring(ids)
        assert (
            seen.dtype == bool and np.array_equal(seen, PLAIN.occurring(ids)) and np.flatnonzero(seen).tolist() == sorted(set(ids.tolist()))
        )
