"""Reading ahead: the same batches in the same order, errors where they belong, threads that end, a disk that is told the right places."""

import mmap
import os
import threading
import time

import numpy as np
import pytest
import torch

from rwkvlm.config import UserError
from rwkvlm.data import ahead as module
from rwkvlm.data.ahead import Ahead
from rwkvlm.data.binidx import BinIdx, BinIdxWriter
from rwkvlm.data.dataset import RankBatches, TrainingSamples
from rwkvlm.data.formats import NumpyTokens, TextTokens
from rwkvlm.data.reset import ResetSamples
from rwkvlm.data.sampler import chunk_of, magic_prime

CTX = 64


@pytest.fixture
def samples(tmp_path):
    with BinIdxWriter(tmp_path / "a") as out:
        out.add(np.arange(60000) % 50021)
    return TrainingSamples(tmp_path / "a", CTX, magic_prime(60000, CTX), vocab_size=50000)


def threads():
    return [t for t in threading.enumerate() if t.name.startswith(("asker", "reader"))]


def all_ended():
    for _ in range(6000):
        if not threads():
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize("n", [0, 1, module.BATCHES, module.BATCHES + 1, 30])
def test_the_same_batches_in_the_same_order(samples, n):
    batches = RankBatches(1, 2, 4, n)
    loader = Ahead(samples, batches)
    assert len(loader) == n
    for _ in range(2):  # it can be iterated anew
        got = list(loader)
        assert len(got) == n and all(torch.equal(a, b) for pair, ii in zip(got, batches) for a, b in zip(pair, samples[ii]))
    assert all_ended()


def test_an_error_comes_with_its_batch(samples):
    """A token outside the vocabulary, batches later: those before it are delivered, and the threads end."""
    bad = next(ii for ii in range(1, 937) if chunk_of(ii, samples.prime) == 50000 // CTX)
    batches = RankBatches(0, 1, 4, 1000, start=bad - 1 - 4 * 5)
    loader = iter(Ahead(samples, batches))
    assert len([next(loader) for _ in range(5)]) == 5
    with pytest.raises(UserError, match="a.bin holds token 50000 at position 50000"):
        next(loader)
    assert all_ended()


@pytest.mark.parametrize("size", [4096, 200000])
def test_a_file_that_is_overwritten_while_it_is_read_ends_in_an_error(samples, size, monkeypatch):
    """As by `cp other.bin data.bin`. What was cut off cannot be read.

    The kernel would kill the process, as it does in the microseconds in which a batch is copied.
    """
    read, done = Ahead._read, []
    monkeypatch.setattr(Ahead, "_read", lambda self, ii: (read(self, ii), done.append(ii))[0])
    path = samples.data.bin_path
    before = path.stat().st_size
    batches = iter(Ahead(samples, RankBatches(0, 1, 4, 100)))
    next(batches)
    for _ in range(6000):  # between two batches
        if len(done) == 1 + module.BATCHES:
            break
        time.sleep(0.01)
    os.truncate(path, size)
    with pytest.raises(
        UserError, match=f"^{path} has {size} bytes, and had {before} when this began; put the whole file back, then start again$"
    ):
        list(batches)
    assert all_ended()


def test_a_file_that_is_cut_before_the_first_batch_is_one_too(samples):
    os.truncate(samples.data.bin_path, 4096)
    with pytest.raises(UserError, match="has 4096 bytes, and had 120000 when this began"):
        next(iter(Ahead(samples, RankBatches(0, 1, 4, 100))))


def test_an_index_that_is_cut_is_one_where_documents_are_asked_for(samples):
    """As by `cp other.idx data.idx`: --doc_reset reads it all the time."""
    reset = ResetSamples(samples)
    path = samples.data.idx_path
    os.truncate(path, 0)
    with pytest.raises(UserError, match=f"^{path} has 0 bytes, and had 62 when this began; put the whole file back, then start again$"):
        next(iter(Ahead(reset, RankBatches(0, 1, 4, 100))))
    next(iter(Ahead(samples, RankBatches(0, 1, 4, 100))))


def test_a_file_that_is_replaced_while_it_is_read_is_whole_until_the_end(samples, tmp_path):
    expected = [x for x, _ in Ahead(samples, RankBatches(0, 1, 4, 50))]
    batches = iter(Ahead(samples, RankBatches(0, 1, 4, 50)))
    got = [next(batches)[0]]
    with BinIdxWriter(tmp_path / "a") as out:
        out.add(np.zeros(100))
    got += [x for x, _ in batches]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_an_abandoned_loader_ends_its_threads(samples):
    loader = iter(Ahead(samples, RankBatches(0, 1, 4, 1000)))
    next(loader)
    assert len(threads()) == 2
    del loader
    assert all_ended()


def test_it_reads_ahead_and_not_too_far(samples, monkeypatch):
    read = []
    monkeypatch.setattr(TrainingSamples, "__getitem__", lambda self, ii: (read.append(int(ii[0])), torch.zeros(1))[1:] * 2)
    loader = iter(Ahead(samples, RankBatches(0, 1, 4, 1000)))
    for k in range(3):
        next(loader)
    for _ in range(6000):
        if len(read) == 3 + module.BATCHES:
            break
        time.sleep(0.01)
    assert read == [1 + 4 * k for k in range(3 + module.BATCHES)]


def test_the_disk_is_asked_for_the_right_pages(samples, tmp_path, monkeypatch):
    """Every byte that a batch reads lies in what was asked for, and little else; also behind the header of a .npy."""
    np.save(tmp_path / "a.npy", BinIdx(tmp_path / "a").tokens.astype(np.int32))
    for data in (BinIdx(tmp_path / "a"), NumpyTokens(tmp_path / "a.npy")):
        mapping, begin = data._mapping
        raw, asked = bytes(mapping), []
        data.__dict__["_mapping"] = type("Mapping", (), {"madvise": lambda self, *what: asked.append(what)})(), begin
        starts = np.array([[0, 1], [30000, 60000 - CTX - 1]])
        data.ask_for(starts, CTX + 1)
        assert len(asked) == 4
        for start, (advice, at, length) in zip(starts.reshape(-1), asked):
            assert advice == mmap.MADV_WILLNEED and at % mmap.PAGESIZE == 0
            assert raw[at : at + length].endswith(data.tokens[start : start + CTX + 1].tobytes())
            assert length < mmap.PAGESIZE + (CTX + 1) * data.tokens.itemsize
    (tmp_path / "a.txt").write_text("abc" * 100)
    TextTokens(tmp_path / "a.txt").ask_for(starts, CTX)  # in memory: nobody to ask
    samples.ask_for(np.arange(1, 1000))
