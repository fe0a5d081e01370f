"""What training states cost: a save, the training's stall, slower steps beside it, the time to resume; two processes on the CPU.

    python bench/saving.py --out saving.json            # 38.8 M parameters: 6 layers of width 256, vocabulary 65536

One run saves at every fifth step in turn in three ways: beside the training, as it does; with the training waiting for the
files; not at all. So all three meet the same machine. A block is the five steps from one turn to the next; a second start
then resumes from the last state.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

from forked import World, measured_run, measuring  # first: it settles the environment
from rwkvlm.checkpoint.state import load_state
from rwkvlm.train import conductor
from rwkvlm.train.plan import checked
from rwkvlm.train.saver import Saver

RANKS, BLOCK = 2, 5
WAYS = ("beside", "waiting", "none")


def measured(notes: Path, rank: int) -> None:
    """Replaces, in this process, what is to be measured by the same with a clock around it; rank 0 writes a line of JSON for each."""
    save, write = Saver.save, Saver._write

    def note(**facts) -> None:
        if rank == 0:
            with open(notes, "a") as file:
                file.write(json.dumps(facts) + "\n")

    def timed_save(saver: Saver, weights: list[str], state: bool, last: bool) -> None:
        step = saver.position.step
        way = WAYS[step // BLOCK % len(WAYS)]
        if last or way != "none":
            saver.wait()  # what is still under way belongs to the block before
            began = time.perf_counter()
            save(saver, weights, state, last or way == "waiting")
            note(what="stall", way="waiting" if last else way, step=step, seconds=time.perf_counter() - began)

    def timed_write(saver: Saver, *arguments) -> None:
        began = time.perf_counter()
        write(saver, *arguments)
        note(what="write", step=arguments[3], seconds=time.perf_counter() - began)

    def clocked(name: str, function):
        def run(*arguments):
            began = time.perf_counter()
            result = function(*arguments)
            note(what=name, seconds=time.perf_counter() - began)
            return result

        return run

    Saver.save, Saver._write = timed_save, timed_write
    conductor.load_state, conductor.checked = clocked("load", load_state), clocked("check", checked)


def measure(args: argparse.Namespace, place: Path) -> dict:
    steps = (args.rounds * len(WAYS) + 1) * BLOCK
    flags = measured_run(args, place, save_steps=BLOCK, max_steps=steps, enable_progress_bar=False)
    notes = place / "notes"

    def start() -> float:
        world = World(flags, RANKS, place / "log", lambda rank: measured(notes, rank))
        seconds = world.wait(600)
        assert set(world.codes.values()) == {0}, world.said()
        return seconds

    start()
    records = [json.loads(line) for line in (place / "out" / "metrics.jsonl").read_text().splitlines()]
    ends = {record["step"]: record["seconds"] for record in records if "loss" in record}
    blocks = {way: [] for way in WAYS}
    for first in range(BLOCK, steps - BLOCK + 1, BLOCK):
        blocks[WAYS[first // BLOCK % len(WAYS)]].append(ends[first + BLOCK] - ends[first])
    lines = [json.loads(line) for line in notes.read_text().splitlines()]
    stalls = {
        way: [line["seconds"] for line in lines if line["what"] == "stall" and line.get("way") == way and line["step"] < steps]
        for way in WAYS[:2]
    }
    during = {line["step"]: line["seconds"] for line in lines if line["what"] == "write"}
    beside = [during[line["step"]] for line in lines if line["what"] == "stall" and line["way"] == "beside"]
    state = place / "out" / "state" / f"step{steps}"
    size = sum(file.stat().st_size for file in state.iterdir())
    notes.unlink()
    flags["max_steps"] = 1
    start()
    resumed = [json.loads(line) for line in notes.read_text().splitlines()]
    plain = statistics.median(blocks["none"])
    return dict(
        state_mb=round(size / 2**20, 1),
        step_s=round(plain / BLOCK, 3),
        save_s=rounded(beside),
        stall_s={way: rounded(seconds) for way, seconds in stalls.items()},
        block_s={way: rounded(seconds) for way, seconds in blocks.items()},
        overhead_of_a_save_s={way: round(statistics.median(blocks[way]) - plain, 3) for way in WAYS[:2]},
        resume_s={name: rounded([line["seconds"] for line in resumed if line["what"] == name]) for name in ("check", "load")},
    )


def rounded(seconds: list[float]) -> list[float]:
    return [round(s, 3) for s in seconds]


if __name__ == "__main__":
    sys.exit(measuring(measure, "Measure what saving costs.", rounds=(3, "turns of all three ways")))
