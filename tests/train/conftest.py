"""A tiny corpus and a tiny run: what the tests of training share."""

import contextlib
import json
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkvlm.cli import main
from rwkvlm.data.binidx import BinIdx, BinIdxWriter
from rwkvlm.data.dataset import TrainingSamples
from rwkvlm.data.sampler import magic_prime
from rwkvlm.ops import backend

VOCAB, CTX, BATCH, STEPS = 256, 32, 4, 30
FLAGS = {
    "vocab_size": VOCAB, "n_layer": 2, "n_embd": 64, "head_size": 32, "ctx_len": CTX, "micro_bsz": BATCH,
    "my_exit_tokens": STEPS * BATCH * CTX, "lr_init": 2e-3, "lr_final": 2e-4, "warmup_steps": 5, "weight_decay": 0.1,
    "epoch_samples": 40, "epoch_save": 2, "random_seed": 1, "accelerator": "cpu", "devices": 1, "precision": "fp32",
    "kernel": "torch", "train_stage": 3, "val_batches": 2, "enable_progress_bar": False,
}  # fmt: skip


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="write tests/assets/golden_x070.json anew instead of comparing with it")


def tokens(n: int, seed: int) -> np.ndarray:
    """Text-like numbers that are the same on every machine and in every version of every library: a walk driven by a linear congruence."""
    state, at, out = seed, 0, np.empty(n, dtype=np.uint16)
    for i in range(n):
        state = (1103515245 * state + 12345) % 2**31
        at = (at + (state >> 16) % 7) % VOCAB
        out[i] = at
    return out


def write_data(prefix: Path, n: int = 20000, seed: int = 1, dtype=np.uint16) -> str:
    with BinIdxWriter(prefix, dtype) as writer:
        for document in np.array_split(tokens(n, seed).astype(dtype), 20):
            writer.add(document)
    return str(prefix)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> str:
    """Prefix of a tiny corpus with held-out data beside it."""
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "tiny.val", 2000, seed=2)
    return write_data(folder / "tiny")


class TinyRun:
    """Runs `train.py` in this process: run(proj_dir, flag=value, ...) -> exit code; argv() for subprocesses."""

    def __init__(self, data: str) -> None:
        self.data = data

    def argv(self, proj_dir: Path, **flags) -> list[str]:
        flags = {"data_file": self.data, "proj_dir": proj_dir} | FLAGS | flags
        return [str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value)]

    def __call__(self, proj_dir: Path, **flags) -> int:
        return main(["train", *self.argv(proj_dir, **flags)])


@pytest.fixture(scope="session")
def tiny(data) -> TinyRun:
    """For fixtures that run in a process of their own: tiny.argv(proj_dir, ...)."""
    return TinyRun(data)


@pytest.fixture
def run(data):
    """A TinyRun on one thread."""
    torch.set_num_threads(1)
    return TinyRun(data)


@pytest.fixture(scope="session")
def records():
    """records(proj_dir, key="loss") -> {step: record} of metrics.jsonl, of two records of a step the later one."""

    def read(proj_dir: Path, key: str = "loss") -> dict[int, dict]:
        lines = (json.loads(line) for line in (Path(proj_dir) / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line for line in lines if key in line}

    return read


@pytest.fixture(scope="session")
def losses(records):
    """losses(proj_dir) -> the loss of every step in order."""

    def read(proj_dir: Path) -> list[float]:
        found = records(proj_dir)
        assert sorted(found) == list(range(1, len(found) + 1))
        return [found[step]["loss"] for step in sorted(found)]

    return read


@pytest.fixture(scope="session")
def whole(data, losses, tmp_path_factory):
    """The folder of an undisturbed run of 30 steps, 3 mini-epochs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert TinyRun(data)(folder) == 0
    torch.set_num_threads(threads)
    backend._requested = ""
    return folder


@pytest.fixture(scope="session")
def same_state():
    """same_state(a, b) -> whether masters, moments and steps of both processes are the same; a and b are stepN folders."""

    def compare(a: Path, b: Path) -> bool:
        pairs = [[torch.load(file)["tensors"] for file in (folder / "rank00000.pt", folder / "rank00001.pt")] for folder in (a, b)]
        return all(
            one.keys() == other.keys()
            and all(torch.equal(torch.as_tensor(one[name][key]), torch.as_tensor(other[name][key])) for name in one for key in one[name])
            for one, other in zip(*pairs)
        )

    return compare


@pytest.fixture
def spoilt(tmp_path, data) -> str:
    """The tiny corpus with the chunks of samples 281 to 284, those of step 71, replaced by noise.

    The loss, which still falls there, is then four standard deviations above its mean.
    """
    tokens = np.array(BinIdx(data).tokens)
    samples = TrainingSamples(data, 32, magic_prime(len(tokens), 32))
    for ii in range(281, 285):
        at = int(re.search(r"tokens ([\d,]+) to", samples.where(ii))[1].replace(",", ""))
        tokens[at : at + 32] = np.random.default_rng(ii).integers(256, size=32)
    with BinIdxWriter(tmp_path / "spoilt", np.uint16) as writer:
        writer.add(tokens)
    return str(tmp_path / "spoilt")


@pytest.fixture
def free_port():
    """A port to meet at: below those of outgoing connections, one of which might take it before the run listens there."""
    while True:
        port = random.SystemRandom().randrange(20000, 32768)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return str(port)


@pytest.fixture
def forked(run, tmp_path):
    """forked((flags, more of forked_runs.py), ...) -> {"codes", "said"} of each: runs of two processes, one after another."""

    def train(*jobs: tuple[dict, dict]) -> list[dict]:
        words = [run.argv(**flags) for flags, _ in jobs]
        flags = [dict(zip((word.removeprefix("--") for word in argv[::2]), argv[1::2])) for argv in words]
        (tmp_path / "jobs.json").write_text(json.dumps([{"flags": own} | more for own, (_, more) in zip(flags, jobs)]))
        script = Path(__file__).with_name("forked_runs.py")
        done = subprocess.run([sys.executable, str(script), str(tmp_path / "jobs.json")], capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((tmp_path / "results.json").read_text())

    return train
