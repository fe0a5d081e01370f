"""`python -m rwkvlm data ...` as a user meets it."""

import json
import os

import numpy as np
import pytest

from rwkvlm.cli import main
from rwkvlm.data import download
from rwkvlm.data.binidx import BinIdx, BinIdxWriter
from rwkvlm.data.download import PILE, Remote
from rwkvlm.data.tokenizer import load_tokenizer

TEXTS = ["The first document.\n", "Größe, 漢字, 😀", "", "def f(x):\n    return x\n" * 40]


@pytest.fixture
def prefix(tmp_path):
    tokenizer = load_tokenizer("world")
    with BinIdxWriter(tmp_path / "a") as out:
        for text in TEXTS:
            out.add([*tokenizer.encode(text), 0])
    return str(tmp_path / "a")


def test_info(prefix, capsys):
    assert main(["data", "info", prefix, "--ctx_len", "16", "4096"]) == 0
    out = capsys.readouterr().out
    data = BinIdx(prefix)
    assert f"{prefix}.bin/idx: {data.n_tokens} tokens, 4 documents, uint16\ntoken ids 0 to " in out
    assert "token 0 ends 4 of 4 documents and stands 0 times inside\ntokenizer: World (rwkv_vocab_v20230424): 3 of 3 documents" in out
    assert (
        "ctx_len 16: --magic_prime 23, 0.001 mini-epochs of 40320 samples\n"
        "ctx_len 4096: too short: --ctx_len 4096 needs at least 8193 tokens" in out
    )
    assert main(["data", "info", prefix, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == data.n_tokens and told["survey"]["lengths"][1] == 1 and sum(told["survey"]["lengths"]) == 4


def test_verify_says_ok_or_the_first_thing_that_is_wrong(prefix, tmp_path, capsys):
    assert main(["data", "verify", prefix]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("ok: ")
    largest = int(BinIdx(prefix).tokens.max())
    assert main(["data", "verify", prefix, "--vocab_size", str(largest + 1)]) == 0
    assert main(["data", "verify", prefix, "--vocab_size", str(largest)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {prefix}.bin holds token {largest} at position ") and err.count("\n") == 1
    raw = bytearray((tmp_path / "a.idx").read_bytes())
    raw[40] ^= 4
    (tmp_path / "a.idx").write_bytes(raw)
    assert main(["data", "verify", prefix]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {prefix}.idx ") and err.count("\n") == 1
    os.truncate(tmp_path / "a.idx", 60)
    assert main(["data", "verify", prefix]) == 2 and "its header (4 items, 5 doc_idx entries) means 122" in capsys.readouterr().err


def test_verify_looks_at_every_token(tmp_path, capsys):
    with BinIdxWriter(tmp_path / "a", np.int32) as out:
        out.add(np.ones(5_000_000, np.int32))
        out.add(np.array([5, -1, 0], np.int32))
    assert main(["data", "verify", str(tmp_path / "a")]) == 2
    assert "a.bin holds token -1 at position 5000001" in capsys.readouterr().err


def test_a_known_data_set(prefix, monkeypatch, capsys):
    """The numbers of the Pile, and what is said of a pair that has others."""
    assert 42 + 20 * PILE.n_docs == 4212099722 and 2 * PILE.n_tokens == 664230651068 and PILE.vocab_size == 50304
    assert main(["data", "verify", prefix, "--expect", "pile"]) == 2
    assert "is another data set: the index counts" in capsys.readouterr().err
    data = BinIdx(prefix)
    for n_docs, n_tokens, vocab_size, said in (
        (4, data.n_tokens, 65530, ""),
        (5, data.n_tokens, 65530, "the index counts 4 documents, and small has 5"),
        (0, data.n_tokens + 1, 65530, f"the index counts {data.n_tokens} tokens, and small has {data.n_tokens + 1}"),
        (0, data.n_tokens, 300, "outside the vocabulary (--vocab_size 300)"),
    ):
        monkeypatch.setitem(download.KNOWN, "pile", Remote("small", "", n_tokens, vocab_size, n_docs))
        assert main(["data", "verify", prefix, "--expect", "pile"]) == (2 if said else 0)
        assert said in capsys.readouterr().err


def test_merge_split_and_sample(prefix, tmp_path, capsys):
    assert main(["data", "merge", prefix, f"{prefix}:2", "--out", f"{tmp_path}/b"]) == 0
    assert f"{tmp_path}/b.bin/idx: {3 * BinIdx(prefix).n_tokens} tokens, 12 documents, uint16" in capsys.readouterr().out
    assert main(["data", "split", f"{tmp_path}/b", "--val", "5", "--out", f"{tmp_path}/c"]) == 0
    told = capsys.readouterr()
    assert (
        "c.val.bin/idx: " in told.out
        and "held out are in" in told.err
        and (BinIdx(f"{tmp_path}/c").n_docs, BinIdx(f"{tmp_path}/c.val").n_docs) == (7, 5)
    )
    assert main(["data", "sample", f"{tmp_path}/b"]) == 0
    out = capsys.readouterr().out
    assert (
        f"--- {tmp_path}/b, document 0: " in out
        and TEXTS[0] in out
        and f"document 11: {len(BinIdx(prefix).doc(3))} tokens\n{TEXTS[3]}" in out
    )
    assert main(["data", "sample", prefix, "1", "-1", "--tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "Gr" in out and "document 3" in out and "the first 3 shown" in out and len(out) < 300
    with BinIdxWriter(tmp_path / "cut") as file:
        file.add(load_tokenizer("world").encode("abc"))
    assert main(["data", "sample", f"{tmp_path}/cut"]) == 0
    assert "tokens, not ended by token 0\nabc\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "the following arguments are required: info|verify|merge|split|sample; usage: "),
        (["look", "a"], "invalid choice: 'look'"),
        (["info", "{}/no"], "no.idx does not exist"),
        (["info", "{}/a", "--ctx_len", "0"], "--ctx_len 0 must be at least 1"),
        (["sample", "{}/a", "4"], "a has no document 4; it has 4, 0 to 3 (or -1, -2, ... from the end)"),
        (["sample", "{}/a", "-5"], "a has no document -5"),
        (["sample", "{}/a", "--tokenizer", "gpt"], "tokenizer 'gpt' is not known"),
        (["split", "{}/a", "--out", "{}/b"], "the following arguments are required: --val"),
        (["split", "{}/a", "--out", "{}/b", "--val", "9"], "--val 9 of 4 documents"),
        (["merge", "{}/a", "--out", "{}/b", "--seed", "-1"], "--seed -1 must lie in 0 to 2^32 - 1"),
        (["merge", "{}/a:x", "--out", "{}/b"], "a:x.idx does not exist"),
    ],
)
def test_what_is_wrong_is_one_line(prefix, tmp_path, capsys, words, said):
    assert main(["data", *(word.replace("{}", str(tmp_path)) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err and out == ""
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]
