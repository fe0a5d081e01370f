"""Training runs of several processes that begin within a second: forked from one that has imported everything and computed nothing.

They are processes as a launcher makes them, with ranks in their environment and signals of their own; only the imports are
shared. For bench/faults.py, and bench/saving.py and bench/logging_cost.py, which measure one run of two processes; to be
imported before anything else that matters.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "SLURM_JOB_ID"):
    os.environ.pop(name, None)
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "RWKV-v7"))

import deepspeed.ops
import deepspeed.runtime.zero.muon.muon_optimizer
import numpy as np

import rwkvlm.train.run  # noqa: F401
from environment import write_record
from rwkvlm.cli import main
from rwkvlm.data.binidx import BinIdxWriter

deepspeed.ops.__compatible_ops__  # asked for at the first optimizer, and made by running compilers

# of a measured run
SIZES = dict(n_layer=6, n_embd=256, vocab_size=65536, ctx_len=256, micro_bsz=2, strategy="ddp", precision="bf16", kernel="cpu")


def write_tokens(prefix: Path, n: int, vocab_size: int) -> str:
    """A .bin/.idx pair of tokens with some structure to learn; returns its prefix."""
    walk = np.cumsum(np.random.default_rng(1).integers(0, 7, n)) % vocab_size
    with BinIdxWriter(prefix, np.uint16) as writer:
        for document in np.array_split(walk.astype(np.uint16), 20):
            writer.add(document)
    return str(prefix)


def measuring(measure: Callable[[argparse.Namespace, Path], dict], description: str, **own: tuple[float, str]) -> int:
    """The command of a benchmark: measure(arguments, an empty folder) -> what is printed, and written to --out, as JSON.

    own: default and help of its arguments.
    """
    parser = argparse.ArgumentParser(description=description)
    for name, (default, help) in ({name: (default, None) for name, default in SIZES.items()} | own).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=help)
    parser.add_argument("--folder", default="", help="where the run is written (its disk counts); default: a temporary folder")
    parser.add_argument("--out", default="", help="JSON file for the results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder or None) as place:
        result = measure(args, Path(place))
    if args.out:
        write_record(Path(args.out), cpus=os.cpu_count(), **result)
    print(json.dumps(result, indent=1))
    return 0


def measured_run(args: argparse.Namespace, place: Path, **more) -> dict[str, object]:
    """Flags of a run of the sizes of `measuring` on the CPU, with its data in the folder."""
    return {name: getattr(args, name) for name in SIZES} | dict(
        data_file=write_tokens(place / "data", 400_000, args.vocab_size), proj_dir=place / "out", accelerator="cpu", random_seed=1,
        train_stage=3, epoch_save=0, lr_init=1e-4, lr_final=1e-4,
    ) | more  # fmt: skip


class Finished(Exception):
    """All processes have ended with 0."""


class World:
    """The processes of one start of train.py. before(rank) is called in each of them before training."""

    def __init__(self, flags: dict[str, object], size: int, log: Path, before: Callable[[int], None] = lambda rank: None) -> None:
        assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        argv = ["train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
        self.log = log
        log.write_bytes(b"")
        self.codes: dict[int, int] = {}
        self.began = time.monotonic()
        self.pids = [self._fork(rank, size, port, argv, before) for rank in range(size)]

    def _fork(self, rank: int, size: int, port: int, argv: list[str], before: Callable[[int], None]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            atexit._clear()  # what the first process has to clean up
            descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            places = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ.update({name: str(value) for name, value in places.items()})
            before(rank)
            code = main(argv)
            atexit._run_exitfuncs()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def said(self) -> str:
        return self.log.read_text()

    def living(self) -> list[int]:
        """Ranks that have not ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return [rank for rank in range(len(self.pids)) if rank not in self.codes]

    def kill(self, victims: list[int], signum: int = signal.SIGKILL) -> None:
        for rank in victims:
            if rank in self.living():
                os.kill(self.pids[rank], signum)

    def wait(self, seconds: float, ranks: list[int] | None = None) -> float:
        """Until these ranks (default: all) have ended; returns how long it took. Kills all and raises TimeoutError when they do not."""
        began = time.monotonic()
        while set(self.living()) & set(range(len(self.pids)) if ranks is None else ranks):
            if time.monotonic() - began > seconds:
                self.kill(self.living())
                raise TimeoutError(f"rank {self.living()} still there after {seconds:g} s\n{self.said()[-3000:]}")
            time.sleep(0.002)
        return time.monotonic() - began

    def until(self, true: Callable[[], object], seconds: float = 180.0) -> None:
        """Waits for something while all processes live; TimeoutError, Finished, or ChildProcessError when one has ended otherwise."""
        deadline = time.monotonic() + seconds
        while not true():
            if len(self.living()) < len(self.pids):
                self.wait(60)
                if set(self.codes.values()) == {0}:
                    raise Finished
                raise ChildProcessError(f"exit codes {self.codes}\n{self.said()[-3000:]}")
            if time.monotonic() > deadline:
                self.kill(self.living())
                raise TimeoutError(self.said()[-3000:])
            time.sleep(0.01)  # what is asked reads files: more often it would take a core from the processes
