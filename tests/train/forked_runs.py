"""Run by the tests: train.py in two processes under one set of flags after another, forked from one that has imported everything

argv[1]: a JSON file, a list of jobs: flags; and if wanted nan_in (numbers of samples whose loss shall be NaN), terminate (the
rank that gets SIGTERM just before training begins), validating (as many batches of validation later rank 1 gets SIGTERM), tape
(of how many blocks: in the place of CUDA graphs) or forget (instead of training: the newest state is to count as one that is
so many steps further on, so that the samples in between are never read).

Writes beside it results.json: exit codes and what was said, job by job.
"""

import json
import os
import signal
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests")]

from forked import World  # first: it settles the environment

# isort: split
import torch

from oracles.tape import Tape
from rwkvlm.train import graphs
from rwkvlm.train.module import TrainModule
from rwkvlm.train.run import PlannedModule


def forget(proj_dir: Path, steps: int, batch: int) -> None:
    manifest = proj_dir / "state" / (proj_dir / "state" / "latest").read_text() / "manifest.json"
    sealed = json.loads(manifest.read_text())
    for key, more in (("step", steps), ("samples", steps * batch), ("warmup_step", steps)):
        sealed["content"]["meta"]["position"][key] += more
    sealed["crc32"] = zlib.crc32(json.dumps(sealed["content"], sort_keys=True).encode())
    manifest.write_text(json.dumps(sealed))


def tape_in_place_of_graphs(blocks: int, told: Path) -> None:
    """In this process; told: how many recordings its steps have run, for the first process."""
    tape = Tape(blocks)
    graphs.check_graphs = lambda *_: None
    graphs.Recorder = lambda: tape
    ended = TrainModule.on_train_end
    TrainModule.on_train_end = lambda module: (told.write_text(str(len(tape.ran))), ended(module))[1]


def nan_in_the_loss_of(samples: list[int]) -> None:
    """In this process: of every batch that one of these samples is in."""
    loss_of = TrainModule.loss

    def loss(self: TrainModule, batch: tuple) -> tuple:
        hit = any((batch[0] == self.plan.samples[ii][0]).all(-1).any() for ii in samples)
        cross_entropy, terms = loss_of(self, batch)
        return cross_entropy * (torch.nan if hit and self.training else 1.0), terms

    TrainModule.loss = loss


def terminate_validating(batches: int) -> None:
    """This process, in its batch of this number."""
    step, left = TrainModule.validation_step, iter(range(batches - 1, -1, -1))
    TrainModule.validation_step = lambda *given: (next(left, 1) or os.kill(os.getpid(), signal.SIGTERM), step(*given))[1]


def train(flags: dict, log: Path, nan_in: list[int], terminate: int | None, validating: int, tape: int) -> dict:
    def before(rank: int) -> None:
        if tape:
            tape_in_place_of_graphs(tape, Path(flags["proj_dir"]) / "taped")
        if nan_in:
            nan_in_the_loss_of(nan_in)
        if validating and rank == 1:
            terminate_validating(validating)
        if rank == terminate:
            loader = PlannedModule.train_dataloader
            PlannedModule.train_dataloader = lambda module: (os.kill(os.getpid(), signal.SIGTERM), loader(module))[1]

    world = World(flags, 2, log, before)
    world.wait(120)
    return {"codes": [world.codes[rank] for rank in range(2)], "said": world.said()}


if __name__ == "__main__":
    file = Path(sys.argv[1])
    results = []
    for job in json.loads(file.read_text()):
        if "forget" in job:
            forget(Path(job["flags"]["proj_dir"]), job["forget"], batch=4)
            results.append({"codes": [0, 0], "said": ""})
        else:
            results.append(
                train(
                    job["flags"],
                    file.with_name("log"),
                    job.get("nan_in", []),
                    job.get("terminate"),
                    job.get("validating", 0),
                    job.get("tape", 0),
                )
            )
    file.with_name("results.json").write_text(json.dumps(results))
