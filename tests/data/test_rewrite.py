"""Merging and dividing pairs: which documents, in which order, and that nothing half-made is left."""

import os
import random
import resource
import shutil
import tracemalloc

import numpy as np
import pytest

from rwkvlm.config import UserError
from rwkvlm.config.volume import volume
from rwkvlm.data import rewrite, shuffle, survey
from rwkvlm.data.binidx import BinIdxWriter
from rwkvlm.data.rewrite import merge, split


@pytest.fixture(params=[1 << 22, 300], autouse=True)
def tokens_a_run(request, monkeypatch):
    monkeypatch.setattr(survey, "TOKENS", request.param)


def documents(seed, n=400, dtype=np.uint16):
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(1, 120 if dtype == np.int8 else 65000, rng.integers(0, 40)), 0).astype(dtype) for _ in range(n)]


def write(prefix, docs):
    with BinIdxWriter(prefix, docs[0].dtype) as out:
        for doc in docs:
            out.add(doc)
    return str(prefix)


def listed(data):
    return [data.doc(i).tolist() for i in range(data.n_docs)]


def test_whole_pairs_one_after_the_other(tmp_path):
    a, b = documents(1), documents(2, 77, np.int32)
    made = merge([(write(tmp_path / "a", a), 1.0), (write(tmp_path / "b", b), 2.0)], str(tmp_path / "new" / "c"))
    assert listed(made) == [d.tolist() for d in a + b + b] and made.dtype == np.uint16
    assert sorted(os.listdir(tmp_path / "new")) == ["c.bin", "c.idx"]
    wide = [np.array([70000, 5, 0], np.int64)]
    made = merge([(write(tmp_path / "w", wide), 1.0), (str(tmp_path / "a"), 1.0)], str(tmp_path / "d"))
    assert made.dtype == np.int32 and listed(made) == [d.tolist() for d in wide + a]
    signed = [np.array([-1, 5, 0], np.int32)]
    made = merge([(write(tmp_path / "s", signed), 1.0)], str(tmp_path / "e"))
    assert made.dtype == np.int32 and listed(made) == [d.tolist() for d in signed]


def test_parts_of_pairs_are_drawn_by_the_seed(tmp_path):
    a = documents(3, 2000)
    prefix = write(tmp_path / "a", a)

    def drawn(copies, seed):
        return listed(merge([(prefix, copies)], str(tmp_path / "c"), seed))

    half = drawn(0.5, 7)
    assert 900 < len(half) < 1100 and half == drawn(0.5, 7) != drawn(0.5, 8)
    at = iter(d.tolist() for d in a)
    assert all(doc in at for doc in half)  # in their order
    assert drawn(2.5, 7)[:4000] == [d.tolist() for d in a] * 2 and 900 < len(drawn(2.5, 7)) - 4000 < 1100
    shorter = write(tmp_path / "shorter", a[:1000])
    assert listed(merge([(shorter, 0.5)], str(tmp_path / "c"), 7)) == half[: merge([(shorter, 0.5)], str(tmp_path / "c"), 7).n_docs]
    both = listed(merge([(prefix, 0.5), (shorter, 0.5)], str(tmp_path / "c"), 7))
    assert both[: len(half)] == half and both[len(half) :] != half[: len(both) - len(half)]  # each input draws its own


@pytest.mark.parametrize("val", [0.25, 1, 100, 399])
def test_split_divides(tmp_path, val):
    a = documents(4)
    prefix = write(tmp_path / "a", a)
    train, held = split(prefix, str(tmp_path / "out"), val, 5)
    assert train.n_docs + held.n_docs == 400 and (held.n_docs == val if val >= 1 else 70 < held.n_docs < 130)
    at_train, at_held = iter(listed(train)), iter(listed(held))
    nexts = [next(at_train), next(at_held, None)]
    for doc in map(np.ndarray.tolist, a):  # every document is the next one of one of the two
        k = nexts.index(doc)
        nexts[k] = next((at_train, at_held)[k], None)
    assert nexts == [None, None]
    again = split(prefix, str(tmp_path / "again"), val, 5)
    assert [listed(data) for data in again] == [listed(train), listed(held)]
    assert listed(split(prefix, str(tmp_path / "again"), val, 6)[1]) != listed(held)


def test_few_of_many_documents(tmp_path, monkeypatch):
    """The exact number also where all keys lie close together."""
    for module in (rewrite, shuffle):
        monkeypatch.setattr(module, "keys", lambda numbers, *seeds: numbers.astype(np.uint64) + np.uint64(1 << 63))
    train, held = split(write(tmp_path / "a", documents(5)), str(tmp_path / "out"), 3)
    assert held.n_docs == 3 and listed(held) == [d.tolist() for d in documents(5)[:3]]


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda p, t: merge([(p, 1.0)], p), "is one of the inputs; choose another name"),
        (lambda p, t: merge([(p, 0.0)], f"{t}/c"), "is to be written 0 times; give a number above 0"),
        (lambda p, t: merge([(p, float("nan"))], f"{t}/c"), "is to be written nan times"),
        (lambda p, t: merge([(p, 1e-9)], f"{t}/c"), "no document was drawn"),
        (lambda p, t: merge([(p, 1.0), (f"{t}/no", 1.0)], f"{t}/c"), "no.idx does not exist"),
        (
            lambda p, t: merge([(write(f"{t}/neg", [np.array([-5, 1 << 40], np.int64)]), 1.0)], f"{t}/c"),
            "do not fit into int32: -5 to 1099511627776",
        ),
        (lambda p, t: merge([(p, 1.0)], f"{t}/a.bin/c"), "cannot write"),
        (lambda p, t: merge([(p, 1.0)], f"{t}/c/"), "c/ is a folder; add a name, for example "),
        (lambda p, t: merge([(p, 1.0)], f"{t}/c/.."), "c/.. is a folder; add a name, for example "),
        (lambda p, t: split(p, f"{t}/c.idx", 0.1), "c.idx is to be without .idx"),
        (lambda p, t: split(p, p, 0.1), "is one of the inputs"),
        (lambda p, t: split(write(f"{t}/neg.val", documents(6)), f"{t}/neg", 0.1), "neg.val is one of the inputs"),
        (lambda p, t: split(p, f"{t}/c", 400), "--val 400 of 400 documents cannot be held out"),
        (lambda p, t: split(p, f"{t}/c", 0), "--val 0 of 400 documents"),
        *(
            (lambda p, t, val=val: split(p, f"{t}/c", val), f"--val {val:g} must be a share of the documents")
            for val in (float("nan"), float("inf"), 1.5, -0.5, -3)
        ),
        (lambda p, t: split(p, f"{t}/c", 1e-9), "--val 1e-09 holds nothing out of the 400 documents"),
        (lambda p, t: split(p, f"{t}/c", 0.9999999), "leaves nothing to train on"),
    ],
)
def test_what_cannot_be_done_leaves_nothing(tmp_path, make, said):
    prefix = write(tmp_path / "a", documents(6))
    before = (tmp_path / "a.bin").read_bytes()
    with pytest.raises(UserError) as caught:
        make(prefix, tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert (
        not [name for name in os.listdir(tmp_path) if not name.startswith(("a.", "neg."))] and (tmp_path / "a.bin").read_bytes() == before
    )


def test_a_disk_that_is_too_small_is_seen_before(tmp_path, monkeypatch):
    """One that has room for the tokens and not for the index, too."""
    prefix = write(tmp_path / "a", documents(7))
    for free in (100, os.path.getsize(f"{prefix}.bin") + 100):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": free}))
        for make in (lambda: merge([(prefix, 1.0)], f"{tmp_path}/new/c"), lambda: split(prefix, f"{tmp_path}/c", 0.1)):
            with pytest.raises(UserError, match=rf"needs \d+\.\d\d KiB and .* has {volume(free)} free; free some space"):
                make()


def test_bytes_are_told_in_the_unit_that_suits_them():
    told = {0: "0 B", 1023: "1,023 B", 1024: "1.00 KiB", 1.5e6: "1.43 MiB", 680e9: "633.30 GiB", 2**40: "1.00 TiB", 5e15: "4,547.47 TiB"}
    assert {n: volume(n) for n in told} == told


@pytest.mark.parametrize("limit", [2000, 12000])
def test_a_disk_that_is_full_at_the_end_is_one_line_and_leaves_nothing(tmp_path, limit):
    """The last tokens and the index are written when the pair is complete.

    Of the two parts of a split the smaller one has room, and is not left alone.
    """
    prefix = write(tmp_path / "a", documents(8))
    assert (tmp_path / "a.bin").stat().st_size > 14000
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))  # any larger file fails as on a full disk
    try:
        for make in (lambda: merge([(prefix, 1.0)], f"{tmp_path}/c"), lambda: split(prefix, f"{tmp_path}/c", 0.1)):
            with pytest.raises(UserError, match=rf"cannot write {tmp_path}/c.bin: File too large; free some space") as caught:
                make()
            assert "\n" not in str(caught.value) and sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    """The largest pieces that are held are runs of documents, not files."""
    monkeypatch.setattr(survey, "TOKENS", 1 << 20)
    rng = random.Random(0)
    sizes = [rng.randrange(1, 2000) for _ in range(20000)]  # 20 million tokens, 40 MB
    with BinIdxWriter(tmp_path / "a") as out:
        for size in sizes:
            out.add(np.ones(size, np.uint16))
    tracemalloc.start()
    merge([(str(tmp_path / "a"), 1.5)], str(tmp_path / "b"))
    split(str(tmp_path / "a"), str(tmp_path / "c"), 0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_a_document_too_large_for_memory_is_copied_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "TOKENS", 100), monkeypatch.setattr(rewrite, "TOKENS", 100)
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 60000, n).astype(np.int32) for n in (5, 1000, 3, 101, 100, 0, 7, 350)]
    prefix = str(tmp_path / "a")
    with BinIdxWriter(prefix, np.int32) as writer:
        for document in documents:
            writer.add(document)
    made = merge([(prefix, 2)], str(tmp_path / "twice"))
    assert made.dtype == np.uint16 and [made.doc(i).tolist() for i in range(made.n_docs)] == [d.tolist() for d in documents * 2]
    parts = split(prefix, str(tmp_path / "s"), 4, seed=1)
    found = [[part.doc(i).tolist() for i in range(part.n_docs)] for part in parts]
    assert [len(part) for part in found] == [4, 4] and sorted(found[0] + found[1]) == sorted(d.tolist() for d in documents)


@pytest.mark.parametrize("make", [lambda p, out: merge([(p, 1)], out), lambda p, out: split(p, out, 2)])
def test_a_document_of_more_tokens_than_an_index_counts(tmp_path, monkeypatch, make):
    """Megatron's tools make documents of several items, of which each is counted by itself."""
    for module, name, value in (survey, "TOKENS", 100), (rewrite, "TOKENS", 100), (rewrite, "MOST_TOKENS", 500):
        monkeypatch.setattr(module, name, value)
    prefix = write(tmp_path / "a", [np.ones(n, np.uint16) for n in (5, 501, 3, 500)])
    with pytest.raises(UserError, match="a has a document of 501 tokens, and an index counts 500 of one at most; make the pair again"):
        make(prefix, str(tmp_path / "c"))
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]


@pytest.mark.parametrize("compared", [1 << 20, 40])
def test_copies_on_both_sides_are_told(tmp_path, monkeypatch, compared):
    """Held out of a pair that make_data.py has copied, a document is trained on all the same."""
    monkeypatch.setattr(rewrite, "COMPARED", compared)
    once = [doc for doc in documents(8) if len(doc) > 3] + [np.zeros(1, np.uint16)] * 5  # some texts come again of themselves
    told: list[str] = []
    split(write(tmp_path / "once", once), str(tmp_path / "c"), 0.3, warn=told.append)
    assert not told
    split(write(tmp_path / "copied", once * 3), str(tmp_path / "d"), 0.3, warn=told.append)
    assert len(told) == 1 and 80 < int(told[0].partition("%")[0]) <= 100 and f"are in {tmp_path}/d too, as copies" in told[0]


def test_what_is_a_copy(tmp_path):
    """Not what begins alike, nor what has the same tokens in another number.

    A few that come again are no matter, and where they lie does not count.
    """
    rng, told = np.random.default_rng(3), []
    begins_alike = [np.append(np.arange(60), last).astype(np.uint16) for last in range(100, 200)]
    alike = [np.full(n, 7, np.uint16) for n in range(1, 200)]
    others = [rng.integers(1, 60000, 30).astype(np.uint16) for _ in range(200)]
    for name, docs in (("alike", begins_alike + alike), ("few", [*others, *others[:12], others[0][:0]])):
        split(write(tmp_path / name, docs), str(tmp_path / f"{name}-s"), 0.4, warn=told.append)
        assert not told, name
    twice = others[:120] * 2 + others[120:] + begins_alike
    split(write(tmp_path / "some", [twice[i] for i in rng.permutation(len(twice))]), str(tmp_path / "e"), 0.4, warn=told.append)
    assert len(told) == 1 and 15 < int(told[0].partition("%")[0]) < 60, told  # 240 of 420 have a copy, 0.6 of these in the other part
