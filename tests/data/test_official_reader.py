"""The official trainer's own reader, writer and dataset against ours, byte for byte.

They are not part of this repository: RWKV_OFFICIAL_SRC names RWKV-v7/train_temp/src of a clone of RWKV-LM; without it these
tests are skipped.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rwkvlm.data.binidx import BinIdx, BinIdxWriter
from rwkvlm.data.dataset import RankBatches, TrainingSamples
from rwkvlm.data.sampler import magic_prime

SRC = os.environ.get("RWKV_OFFICIAL_SRC", "")
pytestmark = pytest.mark.skipif(not SRC, reason="RWKV_OFFICIAL_SRC does not name the folder of the official sources")

DTYPES = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]


@pytest.fixture(scope="module")
def official():
    """official("binidx"), official("dataset"): modules of that folder, in a package of their own."""
    package = types.ModuleType("official_src")
    package.__path__ = [SRC]
    sys.modules["official_src"] = package

    def load(name):
        spec = importlib.util.spec_from_file_location(f"official_src.{name}", Path(SRC) / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    yield load
    for name in [name for name in sys.modules if name.startswith("official_src")]:
        del sys.modules[name]


def documents(dtype, n=300):
    rng = np.random.default_rng(1)
    high = min(np.iinfo(dtype).max, 65529)
    return [np.append(rng.integers(1, high, rng.choice([0, 1, 30, 3000])), 0).astype(dtype) for _ in range(n)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_theirs_reads_ours(official, tmp_path, dtype):
    docs = documents(dtype)
    with BinIdxWriter(tmp_path / "a", dtype) as out:
        for doc in docs:
            out.add(doc)
    read = official("binidx").MMapIndexedDataset(str(tmp_path / "a"))
    assert len(read) == len(docs) and read._index.dtype == dtype and read.doc_idx.tolist() == list(range(len(docs) + 1))
    for i, doc in enumerate(docs):
        assert read[i].tobytes() == doc.tobytes() and read[i].dtype == dtype
    flat = np.concatenate(docs)
    assert (
        read.get(idx=0, offset=777, length=5000).tobytes() == flat[777:5777].tobytes() == BinIdx(tmp_path / "a").tokens[777:5777].tobytes()
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_ours_reads_theirs_and_would_have_written_the_same(official, tmp_path, dtype):
    docs = documents(dtype)
    with official("binidx").MMapIndexedDataset.Index.writer(str(tmp_path / "a.idx"), dtype) as index:
        index.write([len(doc) for doc in docs], list(range(len(docs) + 1)))
    (tmp_path / "a.bin").write_bytes(b"".join(doc.tobytes() for doc in docs))
    data = BinIdx(tmp_path / "a")
    assert data.n_docs == len(docs) and all(data.doc(i).tobytes() == doc.tobytes() for i, doc in enumerate(docs))
    with BinIdxWriter(tmp_path / "b", dtype) as out:
        for doc in docs:
            out.add(doc)
    for suffix in ("idx", "bin"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.parametrize("world, micro", [(1, 8), (4, 2)])
def test_the_same_samples_in_the_same_order(official, tmp_path, world, micro):
    """Their dataset and ours over two mini-epochs, every rank; 40320 samples each are what theirs insists on."""
    with BinIdxWriter(tmp_path / "a") as out:
        for doc in documents(np.uint16, 100):
            out.add(doc)
    ctx_len = 8
    n_tokens = BinIdx(tmp_path / "a").n_tokens
    prime = magic_prime(n_tokens, ctx_len)
    args = SimpleNamespace(
        data_file=str(tmp_path / "a"), vocab_size=65536, ctx_len=ctx_len, micro_bsz=micro, real_bsz=world * micro,
        epoch_steps=40320 // (world * micro), magic_prime=prime, train_stage=3,
    )  # fmt: skip
    theirs, ours = official("dataset").MyDataset(args), TrainingSamples(tmp_path / "a", ctx_len, prime, 65536)
    theirs.world_size = world
    for epoch in (0, 1):
        for rank in range(world):
            theirs.global_rank, theirs.real_epoch = rank, epoch
            for step, ii in zip(range(25), RankBatches(rank, world, micro, 25, start=epoch * 40320)):
                x, y = ours[ii]
                for k in range(micro):
                    their_x, their_y = theirs[step * micro + k]
                    assert their_x.equal(x[k]) and their_y.equal(y[k])
