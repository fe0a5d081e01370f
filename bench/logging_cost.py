"""What the logs cost: steps of one run of two processes on the CPU with all logs, with their numbers only, and with nothing, in turn.

    python bench/logging_cost.py --seconds 200 --out logging.json          # 38.8 M parameters: 6 layers of width 256, vocabulary 65536

Five steps in turn "logs": as a run is, with train_log.txt, metrics.jsonl, report.html (its thread too), the line of progress,
and TensorBoard where it is installed; "numbers": loss, norms and speed are collected from both processes and judged, and
nobody is told; "nothing": not even that. So all three meet the same machine. An overhead is that of the mean step, its error
the standard error over the rounds. Beside it, by the clock of the first process: what the training thread spends there in a
step (of "numbers" much is waiting for the other process), and a page of report.html.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import statistics
import sys
import time
from pathlib import Path

from forked import World, measured_run, measuring  # first: it settles the environment
from rwkvlm.train.logs.report import Follower
from rwkvlm.train.meter import Meter

RANKS, BLOCK = 2, 5
WAYS = ("logs", "numbers", "nothing")


def in_turns(moments: Path, rank: int) -> None:
    """Replaces, in this process, what is to be measured by the same that is silent in its turn.

    Rank 0 writes when each step ended, and times spent.
    """
    step, page, close = Meter.step, Follower.write, Meter.close
    ended: list[float] = []
    spent: dict[str, list[float]] = {name: [] for name in (*WAYS, "page")}

    def way() -> str:
        return WAYS[len(ended) // BLOCK % len(WAYS)]

    def step_in_turn(meter: Meter, *arguments) -> None:
        ended.append(time.perf_counter())
        now, logs = way(), meter.logs
        if now != "logs":
            meter.logs = []
        if now != "nothing":
            step(meter, *arguments)
        meter.logs = logs
        spent[now].append(time.perf_counter() - ended[-1])

    def page_in_turn(follower: Follower, *arguments, **more) -> None:
        if way() == "logs":
            began = time.thread_time()
            page(follower, *arguments, **more)
            spent["page"].append(time.thread_time() - began)

    def close_and_tell(meter: Meter) -> None:
        if rank == 0:
            moments.write_text(json.dumps(dict(ended=ended, spent=spent)))
        close(meter)

    Meter.step, Follower.write, Meter.close = step_in_turn, page_in_turn, close_and_tell


def measure(args: argparse.Namespace, place: Path) -> dict:
    flags = measured_run(args, place, my_exit_tokens=10**12, tensorboard=int(importlib.util.find_spec("tensorboard") is not None))
    moments = place / "moments"
    world = World(flags, RANKS, place / "log", lambda rank: in_turns(moments, rank))
    deadline = time.monotonic() + args.seconds
    while time.monotonic() < deadline and len(world.living()) == RANKS:
        time.sleep(0.1)
    world.kill([0], signal.SIGTERM)
    world.wait(120)
    assert set(world.codes.values()) == {128 + signal.SIGTERM}, world.said()
    told = json.loads(moments.read_text())
    ended = told["ended"][BLOCK - 1 :]  # of the last step before each turn, and of those within it
    rounds = []
    for first in range((len(WAYS) - 1) * BLOCK, len(ended) - len(WAYS) * BLOCK, len(WAYS) * BLOCK):
        marks = [ended[first + turn * BLOCK] for turn in range(len(WAYS) + 1)]
        rounds.append(dict(zip(WAYS, ((b - a) / BLOCK for a, b in zip(marks, marks[1:])))))
    return dict(
        logs=sorted(path.name for path in (place / "out").iterdir() if path.name != "state" and path.suffix != ".pth"),
        **summary(rounds),
        spent_ms={name: round(1000 * statistics.median(seconds), 3) for name, seconds in told["spent"].items() if seconds},
        pages=len(told["spent"]["page"]),
        rounds=[{way: round(seconds, 4) for way, seconds in r.items()} for r in rounds],
    )


def summary(rounds: list[dict[str, float]]) -> dict:
    """Of all rounds, and of those in which the machine had nothing else to do: every turn within 10% of the median one."""
    usual = statistics.median(seconds for r in rounds for seconds in r.values())
    quiet = [r for r in rounds if all(abs(seconds / usual - 1) < 0.1 for seconds in r.values())]
    return {
        name: dict(
            rounds=len(some),
            step_s={way: round(statistics.mean(r[way] for r in some), 4) for way in WAYS},
            overhead_percent={
                f"{way} over {base}": overhead(some, way, base)
                for way, base in (("logs", "nothing"), ("logs", "numbers"), ("numbers", "nothing"))
            },
        )
        for name, some in (("all", rounds), ("quiet", quiet))
        if len(some) > 1
    }


def overhead(rounds: list[dict[str, float]], way: str, base: str) -> dict[str, float]:
    """In percent of a step: the mean of the differences within a round, their median, and the standard error of the mean."""
    whole = statistics.mean(r[base] for r in rounds)
    differences = [100 * (r[way] - r[base]) / whole for r in rounds]
    return dict(
        mean=round(statistics.mean(differences), 2),
        median=round(statistics.median(differences), 2),
        standard_error=round(statistics.stdev(differences) / len(differences) ** 0.5, 2),
    )


if __name__ == "__main__":
    sys.exit(
        measuring(
            measure, "Measure what the logs cost.", seconds=(200.0, "how long the run may take; its first turns of all three ways warm up")
        )
    )
