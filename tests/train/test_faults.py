"""Faults in real runs of two processes (bench/faults.py): only work since the last save is lost, the final weights are the same bytes."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OTHERS = {
    "SIGTERM",
    "SIGSTOP",
    "exception in one process",
    "file-size limit in one process",
    "newest state damaged: bytes flipped",
    "newest state damaged: file cut",
    "newest state damaged: file missing",
    "newest state damaged: manifest missing",
}


def inject(folder: Path, **flags) -> list[dict]:
    command = [sys.executable, str(ROOT / "bench" / "faults.py"), "--out", str(folder / "faults.json")]
    command += [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "faults.json").read_text())["faults"]


def check(faults: list[dict], kills: int, others: int) -> None:
    counts = Counter(fault["fault"] for fault in faults)
    assert counts["kill -9 of one"] + counts["kill -9 of all"] == kills
    assert all(counts[name] == others for name in OTHERS)
    # those that need the right to mount
    assert set(counts) - OTHERS <= {"kill -9 of one", "kill -9 of all", "disk full", "folder read-only"}
    ended = {fault["fault"]: fault["seconds"] for fault in faults if "seconds" in fault}
    assert max(ended.values()) < 60 and ended["SIGTERM"] < 30


def test_a_handful_of_every_kind(tmp_path):
    check(inject(tmp_path, kills=4, others=1, strategies="ddp", seed=2), 4, 1)


@pytest.mark.slow
def test_fifty_kills_under_every_strategy(tmp_path):
    faults = inject(tmp_path, kills=50, others=2, strategies="ddp,deepspeed_stage_2,deepspeed_stage_3", seed=1)
    check(faults, 50, 2)
    assert sum(fault.get("within_save", False) for fault in faults) >= 5
    assert {fault["strategy"] for fault in faults} == {"ddp", "deepspeed_stage_2", "deepspeed_stage_3"}
