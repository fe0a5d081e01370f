"""Data that are not binidx: .npy, text by characters, anything by bytes."""

import random
import time

import numpy as np
import pytest

from rwkvlm.config import UserError
from rwkvlm.data import formats
from rwkvlm.data.binidx import BinIdx, BinIdxWriter
from rwkvlm.data.formats import ByteTokens, NumpyTokens, TextTokens
from rwkvlm.data.mixture import open_mixture
from rwkvlm.data.tokenizer import load_tokenizer

CHARACTERS = "abcdefg \n\t\r\0→é漢😀\u2028"


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    text = CHARACTERS + "".join(rng.choice(CHARACTERS) for _ in range(100))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return text


@pytest.mark.parametrize("block", [1, 2, 3, 1 << 22])
def test_characters(tmp_path, text, block, monkeypatch):
    """Also when every character is cut by the blocks in which the file is read."""
    monkeypatch.setattr(formats, "READ", block)
    data = TextTokens(tmp_path / "a.txt")
    ids = {character: k for k, character in enumerate(sorted(CHARACTERS), 1)}
    assert data.tokens.tolist() == [ids[c] for c in text] and data.vocab_size == 1 + len(CHARACTERS)


def test_the_tokenizer_file_says_the_same(tmp_path, text):
    for data in (TextTokens(tmp_path / "a.txt"), ByteTokens(tmp_path / "a.txt")):
        (tmp_path / f"{data.vocab_size}.json").write_text(data.tokenizer_json())
        tokenizer = load_tokenizer(str(tmp_path / f"{data.vocab_size}.json"))
        tokens = data.tokens if data.vocab_size != 256 else data.tokens[3:]  # bytes keep the byte order mark
        assert tokenizer.encode(text) == tokens.tolist() and tokenizer.decode(tokens) == text and tokenizer.vocab_size == data.vocab_size
    assert load_tokenizer(str(tmp_path / f"{1 + len(CHARACTERS)}.json")).encode("aZb")[1] == 0  # unknown, no crash


def test_another_text_with_the_same_characters(tmp_path, text):
    (tmp_path / "b.txt").write_text("bad→")
    (tmp_path / "c.txt").write_text("abz")
    data = TextTokens(tmp_path / "a.txt")
    (tmp_path / "d.txt").write_text("gfe" * 20)
    mixture = open_mixture(f"{tmp_path}/a.txt,{tmp_path}/d.txt", 16, form=TextTokens)
    assert mixture.parts[1].data.tokens[:3].tolist() == [data.tokens[text.index(c)] for c in "gfe"], (
        "one vocabulary for all files of a mixture"
    )
    assert data.like(tmp_path / "b.txt").tokens.tolist() == TextTokens(tmp_path / "a.txt").tokens[[text.index(c) for c in "bad→"]].tolist()
    with pytest.raises(UserError, match=r"c.txt has the character 'z' \(U\+007A\), which the first text lacks"):
        data.like(tmp_path / "c.txt")


@pytest.mark.parametrize("count", [65535, 65536])
def test_as_many_characters_as_16_bits_hold_and_one_more(tmp_path, count):
    points = [*range(0xD800), *range(0xE000, 0xE000 + count - 0xD800)]
    (tmp_path / "a.txt").write_text("".join(map(chr, points)), encoding="utf-8", newline="")
    data = TextTokens(tmp_path / "a.txt")
    assert data.tokens.dtype == (np.uint16 if count == 65535 else np.int32) and np.array_equal(data.tokens, np.arange(1, count + 1))


def test_invalid_utf8_is_located(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes("ééé".encode() + b"\xff" + b"a" * 20)
    for block in (1, 4, 5, 1000):
        monkeypatch.setattr(formats, "READ", block)
        with pytest.raises(UserError, match="a.txt: invalid UTF-8 at byte 6; "):
            TextTokens(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("aé".encode()[:-1])
    with pytest.raises(UserError, match="invalid UTF-8 at byte 1; "):
        TextTokens(tmp_path / "a.txt")


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "i4", "i8"])
def test_numpy(tmp_path, dtype):
    tokens = np.random.default_rng(0).integers(0, 200, 4000).astype(dtype)
    np.save(tmp_path / "a.npy", tokens)
    mixture = open_mixture(str(tmp_path / "a.npy"), 16, form=NumpyTokens)
    x, y = mixture.samples(200)[np.arange(1, mixture.chunks + 1)]
    assert sorted(x[:, 0].tolist()) == sorted(tokens[: 16 * mixture.chunks : 16].tolist()) and (x[:, 1:] == y[:, :-1]).all()
    with pytest.raises(UserError, match="a.npy holds token"):
        mixture.check_token_range(100)


def test_what_is_no_row_of_tokens(tmp_path):
    path = tmp_path / "a.npy"
    for array, said in (
        (np.zeros(5), "float64 .5."),
        (np.zeros((2, 3), np.int32), r"int32 \[2, 3\]"),
        (np.zeros(0, np.uint16), r"\[0\]"),
        (np.int32(5), r"\[\]"),
        (np.array([1, None]), "is not a .npy file that can be read: .*[Oo]bject"),
    ):
        np.save(path, array, allow_pickle=True)
        with pytest.raises(UserError, match=said) as caught:
            NumpyTokens(path)
        assert "\n" not in str(caught.value)
    np.save(path, np.arange(1000))
    whole = path.read_bytes()
    np.savez(tmp_path / "b.npz", a=np.arange(5))
    spoilt = (b"1000,)", b"1000,("), (b"1000", b"0100"), (b" 'fortran", b"b'fortran"), (b"1000,), }" + b" " * 20, b"%d,), }" % (1 << 63))
    headers = [whole.replace(right, wrong.ljust(len(right))) for right, wrong in spoilt]
    for damaged in (*headers, whole[:20], whole[:-8], b"\x93NUMPY", b"text", (tmp_path / "b.npz").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="a.npy") as caught:
            NumpyTokens(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", [NumpyTokens, TextTokens, ByteTokens])
def test_missing_and_empty_files(tmp_path, form):
    with pytest.raises(UserError, match="none cannot be read: No such file"):
        form(tmp_path / "none")
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read: Is a directory; "):
        form(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="a is empty"):
        form(tmp_path / "a")


def test_a_fingerprint_is_of_the_tokens_alone(tmp_path):
    """The same in every dtype and format; another one when a token is another, or two have changed places.

    Only tokens that are read count.
    """
    tokens = np.random.default_rng(0).integers(1, 250, size=5000)
    (tmp_path / "bytes").write_bytes(tokens.astype(np.uint8).tobytes())
    found = {ByteTokens(tmp_path / "bytes").fingerprint(4000)}
    for dtype in (np.uint8, np.uint16, np.int32, np.int64):
        with BinIdxWriter(tmp_path / "pair", dtype) as out:
            out.add(tokens)
        np.save(tmp_path / "x.npy", tokens.astype(dtype))
        found |= {BinIdx(tmp_path / "pair").fingerprint(4000), NumpyTokens(tmp_path / "x.npy").fingerprint(4000)}
    assert len(found) == 1
    for at in (0, 1, 2046, 2048, 3999, 4000):
        another, swapped = tokens.copy(), tokens.copy()
        another[at] += 1
        swapped[[at, at + 1]] = tokens[[at + 1, at]]
        assert (swapped != tokens).any()
        for changed in (another, swapped):
            np.save(tmp_path / "x.npy", changed)
            assert (NumpyTokens(tmp_path / "x.npy").fingerprint(4000) in found) == (at == 4000)


def test_a_fingerprint_of_a_large_file_reads_little_and_all_over_it(tmp_path):
    n = 20 << 30  # tokens: a file of 40 GiB, most of it a hole
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(2 * n)
    data = ByteTokens(tmp_path / "hole")
    before, begun = data.fingerprint(2 * n), time.process_time()
    assert data.fingerprint(2 * n) == before and time.process_time() - begun < 5
    for at in (0, n, 2 * n - 1):  # a block is at either end, and within n / 256 of every place
        with open(tmp_path / "hole", "r+b") as file:
            file.seek(min(at, 2 * n - 1))
            file.write(b"x")
        if at == n:
            assert data.fingerprint(2 * n) == before  # between two blocks
        else:
            assert data.fingerprint(2 * n) != before
            before = data.fingerprint(2 * n)
