"""The binidx reader and writer: against a second reader and writer made of struct alone, and against damaged files."""

import mmap
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest

from rwkvlm.config import UserError
from rwkvlm.data.binidx import BinIdx, BinIdxWriter

FORMATS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}
CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write_by_hand(prefix, docs, code=8, doc_idx=None):
    """An index and data file as the format's description says, with nothing but struct."""
    size = struct.calcsize(FORMATS[code])
    sizes = [len(d) for d in docs]
    pointers = [sum(sizes[:i]) * size for i in range(len(docs))]
    doc_idx = list(range(len(docs) + 1)) if doc_idx is None else doc_idx
    with open(f"{prefix}.bin", "wb") as f:
        for d in docs:
            f.write(struct.pack(f"<{len(d)}{FORMATS[code]}", *d))
    with open(f"{prefix}.idx", "wb") as f:
        f.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(docs), len(doc_idx)))
        f.write(struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(pointers)}q", *pointers))
        f.write(struct.pack(f"<{len(doc_idx)}q", *doc_idx))


def read_by_hand(prefix):
    with open(f"{prefix}.idx", "rb") as f:
        raw = f.read()
    magic, (version, code, n, entries) = raw[:9], struct.unpack_from("<QBQQ", raw, 9)
    assert magic == b"MMIDIDX\0\0" and version == 1 and len(raw) == 42 + 20 * n and entries == n + 1
    sizes = struct.unpack_from(f"<{n}i", raw, 34)
    pointers = struct.unpack_from(f"<{n}q", raw, 34 + 4 * n)
    assert list(struct.unpack_from(f"<{n + 1}q", raw, 34 + 12 * n)) == list(range(n + 1))
    with open(f"{prefix}.bin", "rb") as f:
        data = f.read()
    return code, [list(struct.unpack_from(f"<{s}{FORMATS[code]}", data, p)) for s, p in zip(sizes, pointers)]


def some_docs(rng, high, n=50):
    return [[rng.randrange(1, high) for _ in range(rng.randrange(200))] + [0] for _ in range(n)]


@pytest.mark.parametrize("dtype", CODES)
def test_writer_read_by_hand(tmp_path, dtype):
    docs = some_docs(random.Random(1), 65530 if dtype == "uint16" else 127)
    with BinIdxWriter(tmp_path / "a", dtype) as out:
        for k, d in enumerate(docs):
            out.add(np.array(d, dtype=dtype) if k % 2 else d)
        assert (out.n_docs, out.n_tokens) == (50, sum(map(len, docs)))
    assert read_by_hand(tmp_path / "a") == (CODES[dtype], docs)
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("code", FORMATS)
def test_reader_of_files_by_hand(tmp_path, code):
    docs = some_docs(random.Random(2), 100) + [[]] + some_docs(random.Random(3), 100, 1)
    write_by_hand(tmp_path / "a", docs, code)
    data = BinIdx(tmp_path / "a")
    assert data.n_docs == 52 and data.n_tokens == sum(map(len, docs))
    assert [data.doc(i).tolist() for i in range(52)] == docs and data.doc(-1).tolist() == docs[-1]
    assert data.tokens.tolist() == [t for d in docs for t in d] and data.index.sizes.tolist() == [len(d) for d in docs]
    assert not data.tokens.flags.writeable
    with pytest.raises(IndexError):
        data.doc(52)


def test_megatron_documents_of_several_items(tmp_path):
    write_by_hand(tmp_path / "a", [[1, 2], [3, 0], [4, 0]], 4, doc_idx=[0, 2, 3])
    data = BinIdx(tmp_path / "a")
    assert [data.doc(i).tolist() for i in range(data.n_docs)] == [[1, 2, 3, 0], [4, 0]]
    write_by_hand(tmp_path / "b", [[1, 0], [3, 0]], doc_idx=[0])  # merged by an older Megatron tool
    data = BinIdx(tmp_path / "b")
    assert [data.doc(i).tolist() for i in range(data.n_docs)] == [[1, 0], [3, 0]]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    write_by_hand(tmp_path / "a", [[1, 0]])
    with pytest.raises(RuntimeError), BinIdxWriter(tmp_path / "a") as out:
        out.add([7, 8, 9])
        raise RuntimeError
    assert BinIdx(tmp_path / "a").tokens.tolist() == [1, 0] and sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]


def test_no_moment_shows_a_mixed_pair(tmp_path, monkeypatch):
    """Stopped between the two renames, the new .bin stands without an index, not with the old one."""
    write_by_hand(tmp_path / "a", [[1, 0]])
    rename, calls = os.replace, []

    def stop_at_the_second(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "replace", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt), BinIdxWriter(tmp_path / "a") as out:
        out.add([2, 0])
    assert os.listdir(tmp_path) == ["a.bin"]
    with pytest.raises(UserError, match="a.idx does not exist"):
        BinIdx(tmp_path / "a")


def test_two_processes_never_write_the_same_pair(tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(bytes(100))  # a killed one's is in nobody's way
    with BinIdxWriter(tmp_path / "a") as out:
        out.add([1, 0])
        with pytest.raises(UserError, match="another process is writing .*a.bin; wait for it, or choose another --out"):
            BinIdxWriter(tmp_path / "a")
        out.add([2, 0])
        out.seal()  # until it is in its place
        with pytest.raises(UserError, match="another process is writing .*a.bin"):
            BinIdxWriter(tmp_path / "a")
    assert BinIdx(tmp_path / "a").tokens.tolist() == [1, 0, 2, 0] and sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]
    with BinIdxWriter(tmp_path / "a") as out:
        out.add([3, 0])
    assert BinIdx(tmp_path / "a").tokens.tolist() == [3, 0]


@pytest.mark.parametrize("token", [-1, 65536])
def test_writer_never_wraps_a_token(tmp_path, token):
    with pytest.raises(ValueError, match=str(token)), BinIdxWriter(tmp_path / "a") as out:
        out.add([1, token, 0])
    assert os.listdir(tmp_path) == []


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        BinIdxWriter(tmp_path / "file" / "a")
    (tmp_path / "a.idx.partial").mkdir()  # the second file cannot be opened: the first goes too
    with pytest.raises(UserError, match="cannot write"):
        BinIdxWriter(tmp_path / "a")
    assert not (tmp_path / "a.bin.partial").exists()


def patched(tmp_path, at, data, name="a.idx"):
    path = tmp_path / name
    raw = bytearray(path.read_bytes())
    raw[at : at + len(data)] = data
    path.write_bytes(raw)


# 3 documents of 4, 3 and 2 tokens: sizes at byte 34, pointers at 46, doc_idx at 70, 102 bytes in all; .bin 18 bytes
@pytest.mark.parametrize(
    "at, data, words",
    [
        (0, b"X", "a.idx is not a binidx index: at byte 0 .*; copy or make it again$"),
        (9, struct.pack("<Q", 2), "version 2 at byte 9; .*; make it again$"),
        (17, b"\6", "dtype code 6 at byte 17"),
        (17, b"\7", "dtype code 7 at byte 17"),
        (17, b"\0", "dtype code 0 at byte 17"),
        (18, struct.pack("<Q", 4), "102 bytes long, but its header .4 items"),
        (18, struct.pack("<Q", 2**60), "102 bytes long, but its header"),
        (26, struct.pack("<Q", 3), "102 bytes long, but its header"),
        (34, struct.pack("<i", 5), "item 1 at 8 .byte 54., but the item before it ends at 10"),
        (38, struct.pack("<i", -3), "item 1 .byte 38. the size -3"),
        (42, struct.pack("<i", 3), "a.bin is truncated: 18 bytes, but .*a.idx points up to byte 20"),
        (42, struct.pack("<i", 1), "a.bin is 18 bytes long, but .*a.idx ends at byte 16.*; copy or make both again$"),
        (46, struct.pack("<q", 2), "item 0 at 2 .byte 46., but the item before it ends at 0"),
        (54, struct.pack("<q", 6), "item 1 at 6 .byte 54., but the item before it ends at 8"),
        (62, struct.pack("<q", 2**62), "item 2 at 4611686018427387904 .byte 62."),
        (70, struct.pack("<q", 1), r"doc_idx\[0\] = 1 .byte 70."),
        (86, struct.pack("<q", 0), r"doc_idx\[2\] = 0 .byte 86."),
        (86, struct.pack("<q", 2**63 - 1), r"doc_idx\[3\] = 3"),
        (94, struct.pack("<q", 2), "ends its doc_idx with 2, but lists 3 items"),
    ],
)
def test_damaged_index_is_named(tmp_path, at, data, words):
    write_by_hand(tmp_path / "a", [[1, 2, 3, 0], [4, 5, 0], [6, 0]])
    BinIdx(tmp_path / "a")
    patched(tmp_path, at, data)
    with pytest.raises(UserError, match=words) as caught:
        BinIdx(tmp_path / "a")
    assert "\n" not in str(caught.value)


def test_missing_empty_and_cut_files(tmp_path):
    def error():
        with pytest.raises(UserError) as caught:
            BinIdx(tmp_path / "a")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "a.idx does not exist" in error()
    (tmp_path / "a.bin").touch()
    assert error().endswith("a.bin is there: copy a.idx from where that is from, or make both again")
    (tmp_path / "a.bin").rename(tmp_path / "a.idx")
    assert error().endswith("a.idx is there: copy a.bin from where that is from, or make both again") and "a.bin does not exist" in error()
    (tmp_path / "a.bin").touch()
    assert "shorter than its 34-byte header" in error()
    write_by_hand(tmp_path / "a", [])
    assert "no document" in error()
    write_by_hand(tmp_path / "a", [[]])
    assert "a.bin is empty" in error()
    write_by_hand(tmp_path / "a", [[1, 2, 3]])
    os.truncate(tmp_path / "a.bin", 5)
    assert "a.bin is truncated: 5 bytes" in error()


def test_fuzzed_index_gives_an_error_or_the_same_tokens(tmp_path):
    rng = random.Random(4)
    docs = some_docs(rng, 60000, 6)
    write_by_hand(tmp_path / "a", docs)
    good = (tmp_path / "a.idx").read_bytes()
    refused = 0
    for _ in range(800):
        raw = bytearray(good)
        for _ in range(rng.randrange(1, 4)):
            raw[rng.randrange(len(raw))] = rng.choice([0, 1, 2, 4, 8, 127, 128, 255, rng.randrange(256)])
        if rng.random() < 0.2:
            raw = raw[: rng.randrange(len(raw))]
        (tmp_path / "a.idx").write_bytes(raw)
        try:
            data = BinIdx(tmp_path / "a")
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
            continue
        assert len(data.tokens) * data.dtype.itemsize == (tmp_path / "a.bin").stat().st_size
        for i in range(data.n_docs):
            data.doc(i)
        if data.dtype == np.uint16:
            assert data.tokens.tolist() == [t for d in docs for t in d]
    assert refused > 500


def test_token_range(tmp_path):
    with BinIdxWriter(tmp_path / "a", np.int32) as out:
        out.add(np.arange(100))
        out.add([5, -3])
    with BinIdxWriter(tmp_path / "b") as out:
        out.add(np.arange(5_000_000) % 50000)
    with pytest.raises(UserError, match="a.bin holds token -3 at position 101, .*vocab_size 200"):
        BinIdx(tmp_path / "a").check_token_range(200)
    with pytest.raises(UserError, match="a.bin holds token 90 at position 90"):
        BinIdx(tmp_path / "a").check_token_range(90)
    data = BinIdx(tmp_path / "b")
    whole = data.check_token_range(50000)
    assert (whole.smallest, whole.largest, whole.checked) == (0, 49999, 5_000_000)
    assert str(whole) == "token ids 0 to 49999 (all checked)"
    with pytest.raises(UserError, match="token 49999 at position 49999"):
        data.check_token_range(49999)
    sampled = data.check_token_range(50000, limit=6 << 20)
    assert sampled.checked == 3 << 20 and "evenly spread" in str(sampled)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_what_was_checked_is_no_memory_of_the_process(tmp_path):
    """The planner takes what a process has before there is a model for its libraries."""
    n, size = 1 << 20, 32
    with open(tmp_path / "a.idx", "wb") as file:
        file.write(struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, 8, n, n + 1))
        for array in (np.full(n, size, "<i4"), np.arange(0, 2 * n * size, 2 * size, "<i8"), np.arange(n + 1, dtype="<i8")):
            array.tofile(file)
    np.ones(n * size, "<u2").tofile(tmp_path / "a.bin")

    def mapped() -> int:  # bytes of files in the memory of this process
        return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE

    before = mapped()
    data = BinIdx(tmp_path / "a")
    opened = mapped()
    assert str(data.check_token_range(256)) == "token ids 1 to 1 (all checked)"
    assert opened - before < 10 << 20 and mapped() - opened < 10 << 20  # of 20 and 64; the figure is off by some
    assert data.doc(n - 1).tolist() == [1] * size
