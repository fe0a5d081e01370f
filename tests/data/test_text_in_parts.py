"""A .txt of any size comes in parts, its tokens those of the whole text; documents too large for memory are shuffled where they lie."""

import gzip
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkvlm.cli import main as cli
from rwkvlm.data import documents, pack, shuffle, unfinished
from rwkvlm.data.binidx import BinIdx
from rwkvlm.data.documents import read_blocks
from rwkvlm.data.tokenizer import Texts, WorldTokenizer, load_tokenizer, vocabulary_path


@pytest.fixture(scope="module")
def plain():
    return WorldTokenizer(vocabulary_path())


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*argv):
    return cli(["make_data", *map(str, argv)])


def in_parts(tokenizer, text, cuts):
    """Ids of a text that comes in parts, as make_data puts them together."""
    ids, left = [], b""
    for begin, end in zip([0, *cuts], [*cuts, len(text)]):
        piece = left + text[begin:end]
        found = tokenizer.encode_batch(Texts.join([piece]))[0][:-1]
        n, n_bytes = tokenizer.settled(found, len(piece)) if end < len(text) else (len(found), len(piece))
        ids += found[:n].tolist()
        left = piece[n_bytes:]
        assert len(left) < 128
    return ids


def hostile(tokens, rng, size):
    """Text in which a cut anywhere may change the tokens before it.

    Long tokens, beginnings and ends of them, characters of many bytes, runs.
    """
    long = [t for t in tokens if len(t) > 20]
    parts, n = [], 0
    while n < size:
        token = rng.choice(rng.choice([tokens, long]))
        cut = rng.randrange(len(token) + 1)
        parts.append(
            rng.choice(
                [
                    token,
                    token[:cut],
                    token[cut:],
                    bytes([rng.choice(b" \n=-a0")]) * rng.randrange(300),
                    rng.choice("中é\U0001f600 \u3000").encode() * rng.randrange(9),
                ]
            )
        )
        n += len(parts[-1])
    return b"".join(parts)


def test_parts_give_the_tokens_of_the_whole(plain):
    world, rng = load_tokenizer(), random.Random(0)
    tokens = plain._tokens[1:]
    changed = 0
    for _ in range(400):
        text = hostile(tokens, rng, rng.choice([1, 130, 300, 3000]))
        whole = plain.encode(text)
        for tokenizer in (world, plain):
            cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.choice([1, 2, 9])))
            assert in_parts(tokenizer, text, cuts) == whole
        changed += sum(plain.encode(text[:cut]) + plain.encode(text[cut:]) != whole for cut in cuts)
    assert changed > 300  # a plain cut there would have given other tokens


def test_every_cut_of_the_longest_tokens(plain):
    """One byte more than the longest token decides about what comes before the cut; one less does not suffice."""
    longest = max(plain._tokens, key=len)
    assert len(longest) == plain._longest == 128
    for text in (longest, b"x" + longest + b"y", longest[:-1] + b"!" + longest, longest * 3):
        whole = plain.encode(text)
        for cut in range(len(text) + 1):
            assert in_parts(plain, text, [cut]) == whole
    ids = plain.encode(longest[:-1])
    assert plain.settled(ids, 127) == (0, 0) and plain.settled(plain.encode(b"x" + longest[:-1]), 128)[0] == 1
    assert plain.settled([], 0) == (0, 0)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text() | st.text(alphabet="= -\n"), st.integers(1, 40), st.integers(1, 20))
def test_the_reader_cuts_between_characters_only(tmp_path_factory, text, repeat, block):
    path = tmp_path_factory.getbasetemp() / "parts.txt"
    data = (text * repeat).encode()
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK", block + 1)
        blocks = [*read_blocks(path)]
    assert b"".join(b.data for b in blocks) == data and [b.goes_on for b in blocks] == [True] * (len(blocks) - 1) + [False]
    for block in blocks:
        block.data.decode()
        assert block.line == 1 + data[: block.after - len(block.data)].count(b"\n")


def made(prefix):
    return [Path(prefix + end).read_bytes() for end in (".bin", ".idx")]


@pytest.mark.parametrize("workers", [1, 4])
def test_files_in_parts_are_the_files_of_whole_texts(here, monkeypatch, plain, workers):
    rng = random.Random(1)
    texts = [hostile(plain._tokens[1:], rng, 30_000).decode("utf-8", "replace") for _ in range(3)]
    Path("a.txt").write_bytes(b"\xef\xbb\xbf" + texts[0].encode())
    Path("b.txt.gz").write_bytes(gzip.compress(texts[1].encode()))
    Path("c.txt").write_text(texts[2])
    Path("d.jsonl").write_text("".join(json.dumps({"text": f"{k} text"}) + "\n" for k in range(100)))
    call = ["a.txt", "d.jsonl", "b.txt.gz", "c.txt", 2, 4, "--workers", workers, "--report"]
    assert run(*call, "whole.json", "--out", "whole") == 0
    monkeypatch.setattr(documents, "BLOCK", 1000)
    assert run(*call, "parts.json", "--out", "parts") == 0
    assert made("parts") == made("whole") and Path("parts.json").read_text() == Path("whole.json").read_text()
    data = BinIdx("parts")
    found = [data.doc(i)[:-1].tolist() for i in range(data.n_docs)]
    for text in texts:
        assert found.count(plain.encode(text)) == 2


def test_large_documents_are_shuffled_where_they_lie(here, monkeypatch):
    """The order and the bytes are those of a run in which everything fits into memory."""
    rng = random.Random(2)
    for k in range(6):
        Path(f"{k}.txt").write_text(" ".join(rng.choice(["sun", "moon", "中文"]) for _ in range(10_000)))
    Path("x.jsonl").write_text("".join(json.dumps({"text": "word " * rng.randrange(50)}) + "\n" for _ in range(1000)))
    call = ["[0-2].txt", "x.jsonl", "[3-5].txt", 3, 4, "--val_split", 300, "--report"]
    assert run(*call, "memory.json", "--out", "memory") == 0
    monkeypatch.setattr(documents, "BLOCK", 5000)
    for name, value in [("LEAF", 20_000), ("BLOCK", 3000), ("PORTION", 1000)]:
        monkeypatch.setattr(shuffle, name, value)
    monkeypatch.setattr(unfinished, "LEAF", 3000)
    seen = []
    parts = shuffle.Long.parts
    monkeypatch.setattr(shuffle.Long, "parts", lambda self: seen.append(self.number) or parts(self))
    assert run(*call, "disk.json", "--out", "disk") == 0
    assert made("disk") == made("memory") and made("disk.val") == made("memory.val")
    assert Path("disk.json").read_text() == Path("memory.json").read_text()
    assert set(seen) == {0, 1, 2, 1003, 1004, 1005} and 6 <= len(seen) <= 18


def test_a_bad_text_is_named_and_dropped_with_what_has_been_read_of_it(here, monkeypatch, capsys):
    monkeypatch.setattr(documents, "BLOCK", 100)
    monkeypatch.setattr(unfinished, "SAVE_EVERY", 0)
    good, rare = "sun moon\n" * 100, "\U0001f47d"  # a token that no good text has
    Path("good.txt").write_text(good)
    Path("late.txt").write_bytes((rare + good).encode() + "é".encode()[:1])
    Path("early.txt").write_bytes(b"\xff" + good.encode())
    Path("cut.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(1000).hex().encode())[:-20])
    Path("blank.txt").write_bytes(b" \n" * 400)
    Path("last.jsonl").write_text('{"text": "last"}\n')
    size = len(rare.encode()) + len(good)
    for name, words in [
        ("late.txt", f"late.txt, line 101: invalid UTF-8 at byte {size} of the file"),
        ("early.txt", "early.txt, line 1: invalid UTF-8 at byte 0 of the file"),
        ("cut.txt.gz", "cut.txt.gz: the .gz file is damaged: "),
        ("blank.txt", "blank.txt: the file is empty"),
    ]:
        assert run("good.txt", name, 1, 4, "--out", "z") == 2
        err = capsys.readouterr().err
        assert err.startswith("error: " + words) and err.count("\n") == 1, err
        assert [*Path().glob("z.*")] == [Path("z.unfinished")]
        assert run("good.txt", name, "last.jsonl", 1, 4, "--out", "x", "--skip_bad", "--report", "x.json") == 0
        assert "skipped 1 bad inputs:\n  " + words in capsys.readouterr().out
        assert run("good.txt", "last.jsonl", 1, 4, "--out", "y", "--report", "y.json") == 0
        assert made("x") == made("y")
        x, y = (json.loads(Path(f"{one}.json").read_text()) for one in "xy")
        assert x | {"skipped": 0, "first_skipped": []} == y


def test_more_tokens_than_an_index_counts(here, monkeypatch, capsys):
    monkeypatch.setattr(documents, "BLOCK", 100)
    monkeypatch.setattr(pack, "MOST_TOKENS", 500)
    Path("a.txt").write_text("sun moon\n" * 400)
    assert run("a.txt", 1, 4) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith(
            "error: a.txt: a .txt is one document, and this one has more than 500 tokens, the most that an index can count; split it"
        )
        and err.count("\n") == 1
    )
    assert os.listdir() == ["a.txt"]


def test_a_tokenizer_that_takes_whole_texts_has_a_limit(here, monkeypatch, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.train_from_iterator(
        ["sun moon"] * 9,
        tokenizers.trainers.BpeTrainer(
            vocab_size=270, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    engine.save("tok.json")
    monkeypatch.setattr(documents, "BLOCK", 100)
    Path("a.txt").write_text("sun moon 中文\n" * 100)
    assert run("a.txt", 1, 4, "--tokenizer", "tok.json") == 0
    tokenizer, data = load_tokenizer("tok.json"), BinIdx("a")
    assert data.doc(0)[:-1].tolist() == tokenizer.encode(Path("a.txt").read_text())
    monkeypatch.setattr(type(tokenizer), "largest_text", 1500)
    capsys.readouterr()
    assert run("a.txt", 1, 4, "--tokenizer", "tok.json") == 2
    assert (
        "error: a.txt: a .txt is one document, and this one is larger than 0 MiB, the most that this tokenizer takes at once; "
        "split it, or use --tokenizer world" in capsys.readouterr().err
    )


def test_round_trips_of_parts(here, monkeypatch, capsys):
    monkeypatch.setattr(documents, "BLOCK", 100)
    Path("a.txt").write_text("sun moon 中文\n" * 3000)
    decode, calls = WorldTokenizer.decode_bytes, []

    def wrong_at_the_second(self, ids):
        calls.append(len(ids))
        return decode(self, ids) + (b"x" if len(calls) == 2 else b"")

    monkeypatch.setattr(WorldTokenizer, "decode_bytes", wrong_at_the_second)
    assert run("a.txt", 1, 4) == 2 and "a.txt, line 1: the text does not come back from its tokens" in capsys.readouterr().err
    assert np.sum(calls) < 200  # parts 200 and 400; the first has no settled token
