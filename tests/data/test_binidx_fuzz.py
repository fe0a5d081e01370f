"""Damaged pairs: an error of one line, or the tokens that stand in the .bin; never a crash, never others."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rwkvlm.config import UserError
from rwkvlm.data.binidx import CODES, HEADER, MAGIC, BinIdx
from rwkvlm.data.rewrite import merge
from rwkvlm.data.survey import survey

DTYPES = [np.dtype(name) for name in ("<u1", "<i1", "<i2", "<i4", "<i8", "<u2")]


def pair(prefix: Path, docs: list[list[list[int]]], dtype: np.dtype, listed: bool = True) -> None:
    """Documents of one or several items, written as the format's description says; listed False: doc_idx is [0]."""
    items = [np.array(item, dtype) for doc in docs for item in doc]
    sizes = np.array([len(item) for item in items], "<i4")
    pointers = np.concatenate(([0], np.cumsum(sizes.astype("<i8"))[:-1] * dtype.itemsize)).astype("<i8")
    doc_idx = np.concatenate(([0], np.cumsum([len(doc) for doc in docs]))).astype("<i8") if listed else np.zeros(1, "<i8")
    Path(f"{prefix}.bin").write_bytes(b"".join(item.tobytes() for item in items))
    header = HEADER.pack(MAGIC, 1, CODES[dtype], len(items), len(doc_idx))
    Path(f"{prefix}.idx").write_bytes(header + sizes.tobytes() + pointers.tobytes() + doc_idx.tobytes())


def opened(prefix: Path) -> BinIdx | None:
    """The pair, read through by everything that reads pairs; None when it is refused as a user should see it."""
    try:
        data = BinIdx(prefix)
    except UserError as error:
        assert "\n" not in str(error) and str(prefix) in str(error)
        return None
    raw = Path(f"{prefix}.bin").read_bytes()
    assert data.tokens.tobytes() == raw and data.index.n_bytes == len(raw)
    assert b"".join(data.doc(i).tobytes() for i in range(data.n_docs)) == raw  # the documents are the file, none twice, none missing
    seen = survey(data)
    assert (seen.documents, seen.tokens, sum(seen.lengths)) == (data.n_docs, data.n_tokens, data.n_docs)
    try:
        made = merge([(str(prefix), 1.0)], f"{prefix}-new")
        assert made.tokens.tolist() == data.tokens.tolist() and made.n_docs == data.n_docs
    except UserError as error:
        assert "do not fit into int32" in str(error)
    return data


SMALL = [[[1, 2, 3, 0]], [[4, 5], [0]], [[6, 0]]]


@pytest.mark.parametrize("dtype", [DTYPES[-1], *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES[:-1])], ids=str)
def test_every_single_bit_of_an_index(tmp_path, dtype):
    """No flipped bit gives other tokens; what passes are boundaries between documents that are possible too."""
    pair(tmp_path / "a", SMALL, dtype)
    good = (tmp_path / "a.idx").read_bytes()
    passed = 0
    for bit in range(8 * len(good)):
        raw = bytearray(good)
        raw[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.idx").write_bytes(raw)
        data = opened(tmp_path / "a")
        if data is not None:
            assert data.tokens.tolist() == [1, 2, 3, 0, 4, 5, 0, 6, 0]
            assert bit // 8 >= len(good) - 32, "only doc_idx has more than one right value"
            passed += 1
    assert passed < 10


def test_every_length_of_both_files(tmp_path):
    pair(tmp_path / "a", SMALL, np.dtype("<u2"))
    for name in ("a.idx", "a.bin"):
        good = (tmp_path / name).read_bytes()
        for length in range(len(good)):
            (tmp_path / name).write_bytes(good[:length])
            assert opened(tmp_path / "a") is None
        for more in (1, 2, 8, 20, 4096):
            (tmp_path / name).write_bytes(good + bytes(more))
            assert opened(tmp_path / "a") is None
        (tmp_path / name).write_bytes(good)
    assert opened(tmp_path / "a") is not None


COUNTS = st.one_of(st.integers(0, 12), st.sampled_from([2**31 - 1, 2**31, 2**32, 2**60, 2**61, 2**63 - 1, 2**63, 2**64 - 1]))
LIES = st.one_of(st.integers(-3, 40), st.sampled_from([-(2**31), 2**31 - 1, -(2**63), 2**62, 2**63 - 1, -(2**62)]))
FUZZ = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@FUZZ
@given(
    docs=st.lists(st.lists(st.lists(st.integers(0, 127), max_size=6), min_size=1, max_size=3), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    listed=st.booleans(),
    header=st.one_of(st.none(), st.tuples(st.sampled_from([MAGIC, b"MMIDIDX\0\1"]), COUNTS, st.integers(0, 255), COUNTS, COUNTS)),
    entries=st.lists(st.tuples(st.integers(0, 60), LIES), max_size=3),
    flips=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 7)), max_size=3),
    cut=st.one_of(st.none(), st.integers(0, 300)),
    bin_cut=st.one_of(st.none(), st.integers(0, 60)),
)
def test_lying_indices(docs, dtype, listed, header, entries, flips, cut, bin_cut):
    """Counts, sizes, pointers and doc_idx replaced by other numbers, bits flipped, both files cut: several of these together."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "a"
        pair(prefix, docs, dtype, listed)
        index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        raw, n = bytearray(index.read_bytes()), sum(map(len, docs))
        whole = bytes(raw)
        if header is not None:
            raw[: HEADER.size] = HEADER.pack(*header)
        for k, lie in entries:  # entry k of the three arrays as one row
            at, width = (HEADER.size + 4 * k, 4) if k < n else (HEADER.size + 4 * n + 8 * (k - n), 8)
            if at + width <= len(raw):
                raw[at : at + width] = (lie & (1 << 8 * width) - 1).to_bytes(width, "little")
        for at, bit in flips:
            raw[at % len(raw)] ^= 1 << bit
        index.write_bytes(raw[:cut])
        if bin_cut is not None:
            data.write_bytes(data.read_bytes()[:bin_cut])
        found = opened(prefix)
        if bytes(raw[:cut]) == whole and bin_cut is None and any(item for doc in docs for item in doc):
            assert found is not None and found.tokens.tolist() == [t for doc in docs for item in doc for t in item]


@FUZZ
@given(st.binary(max_size=200), st.binary(max_size=40))
def test_any_bytes_are_no_index(index, data):
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "a"
        Path(f"{prefix}.bin").write_bytes(data)
        for raw in (index, MAGIC + index, MAGIC + (1).to_bytes(8, "little") + index):
            Path(f"{prefix}.idx").write_bytes(raw)
            assert opened(prefix) is None or len(data)
