"""Training samples a second: one at a time, as the official dataset reads them, and as ours does; from memory and from disk.

    python bench/dataset.py --folder /tmp/bench-dataset --out dataset.json

Writes a file of random tokens (--tokens, 2 bytes each) and reads samples of it in the training order. Correctness first:
every form must give the same samples. `one by one` slices a memory map and converts each sample, without collating;
`gathered` is dataset[array] in this process; `mixed` the same over two files; `ahead` is what training uses, a thread
that reads ahead; `2 workers` a DataLoader with two worker processes. Rounds of all forms alternate. `cold` rounds begin
with the file dropped from the page cache. Each figure is set against what a model consumes (--consumers, tokens/s).
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from environment import write_record
from rwkvlm.data.ahead import Ahead
from rwkvlm.data.binidx import BinIdx, BinIdxWriter
from rwkvlm.data.dataset import RankBatches, Samples
from rwkvlm.data.mixture import open_mixture
from rwkvlm.data.sampler import chunk_of

BATCH = 16
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def make_file(prefix: Path, n_tokens: int, seed: int) -> None:
    """Random tokens in documents of a million."""
    if not Path(f"{prefix}.idx").exists() or BinIdx(prefix).n_tokens != n_tokens:
        rng = np.random.default_rng(seed)
        with BinIdxWriter(prefix) as out:
            while out.n_tokens < n_tokens:
                out.add(rng.integers(1, 65530, min(1 << 20, n_tokens - out.n_tokens)).astype(np.uint16))


def one_by_one(data: BinIdx, ctx_len: int, prime: int) -> Batches:
    ii = 0
    while True:
        for _ in range(BATCH):
            ii += 1
            at = chunk_of(ii, prime) * ctx_len
            tokens = data.tokens[at : at + ctx_len + 1].astype(int)
            pair = torch.tensor(tokens[:-1], dtype=torch.long), torch.tensor(tokens[1:], dtype=torch.long)
        yield pair


def gathered(samples: Samples) -> Batches:
    for ii in RankBatches(0, 1, BATCH, 1 << 40):
        yield samples[ii]


def ahead(samples: Samples) -> Batches:
    return iter(Ahead(samples, RankBatches(0, 1, BATCH, 1 << 40)))


def worker_processes(samples: Samples) -> Batches:
    return iter(DataLoader(samples, sampler=RankBatches(0, 1, BATCH, 1 << 40), batch_size=None, num_workers=2, prefetch_factor=4))


def rate(batches: Batches, at_least: float, uncounted: int) -> float:
    """Samples a second, after some batches that are not counted: workers start, queues fill."""
    for _ in range(uncounted):
        next(batches)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < at_least:
        next(batches)
        count += BATCH
    return count / elapsed


def drop_from_cache(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def check(data: BinIdx, samples: Samples, ctx_len: int, prime: int) -> None:
    ii = np.arange(1, 1 + 4 * BATCH)
    x, y = samples[ii]
    for k, i in enumerate(ii.tolist()):
        at = chunk_of(i, prime) * ctx_len
        expected = torch.from_numpy(data.tokens[at : at + ctx_len + 1].astype(np.int64))
        assert torch.equal(x[k], expected[:-1]) and torch.equal(y[k], expected[1:])
    for _, *batches in zip(range(8), gathered(samples), ahead(samples), worker_processes(samples)):
        assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(batches, batches[1:]))


def measure(folder: Path, ctx_len: int, options: argparse.Namespace) -> dict[str, float]:
    first, second = folder / "first", folder / "second"
    one = open_mixture(str(first), ctx_len)
    two = open_mixture(f"{first}:0.7,{second}:0.3", ctx_len)
    data, prime, samples = one.parts[0].data, one.parts[0].prime, one.samples(65536)
    check(data, samples, ctx_len, prime)
    forms: dict[str, Callable[[], Batches]] = {
        "one by one": lambda: one_by_one(data, ctx_len, prime),
        "gathered": lambda: gathered(samples),
        "mixed": lambda: gathered(two.samples(65536)),
        "ahead": lambda: ahead(samples),
        "2 workers": lambda: worker_processes(samples),
    }
    rates: dict[str, list[float]] = {}
    data.check_token_range(65536), two.parts[1].data.check_token_range(65536)  # both files into the page cache
    for _ in range(options.rounds):
        for name, make in forms.items():
            rates.setdefault(name, []).append(rate(make(), options.seconds, 20))
    return {name: statistics.median(r) for name, r in rates.items()}


def measure_cold(folder: Path, ctx_len: int, options: argparse.Namespace) -> dict[str, float]:
    """Every round opens the file anew: pages that are mapped cannot be dropped.

    Counted from the first batch on: each miss reads 128 KiB around it, so that forms which do not say what they need soon
    have much of the file in memory, and the more, the smaller it is.
    """
    rates: dict[str, list[float]] = {}
    for _ in range(options.cold_rounds):
        for name, make in (("one by one", None), ("gathered", gathered), ("ahead", ahead)):
            drop_from_cache(folder / "first.bin")
            part = open_mixture(str(folder / "first"), ctx_len)
            batches = make(part.samples(65536)) if make else one_by_one(part.parts[0].data, ctx_len, part.parts[0].prime)
            rates.setdefault(f"{name}, cold", []).append(rate(batches, options.seconds, 0))
            del batches, part
            gc.collect()
    return {name: statistics.median(r) for name, r in rates.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the files of random tokens are made and kept")
    parser.add_argument("--tokens", type=int, default=500_000_000, help="in the first file; the second has a tenth")
    parser.add_argument("--ctx_len", type=int, nargs="+", default=[256, 512, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold-rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each round and form")
    parser.add_argument("--consumers", type=float, nargs="+", default=[4200, 415_000], help="tokens a second that models consume")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    make_file(options.folder / "first", options.tokens, 0)
    make_file(options.folder / "second", options.tokens // 10, 1)
    rows = []
    for ctx_len in options.ctx_len:
        found = measure(options.folder, ctx_len, options) | measure_cold(options.folder, ctx_len, options)
        row = {"ctx_len": ctx_len, "samples_per_s": {name: round(samples) for name, samples in found.items()}}
        rows.append(row)
        for name, samples in row["samples_per_s"].items():
            tokens = samples * ctx_len
            times = ", ".join(f"{tokens / consumer:,.0f}x of {consumer:,.0f}" for consumer in options.consumers)
            print(f"ctx_len {ctx_len:5}  {name:24} {samples:>10,} samples/s  {tokens / 1e6:>8,.0f} M tokens/s = {times}", flush=True)
    if options.out:
        write_record(options.out, batch=BATCH, tokens=options.tokens, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
