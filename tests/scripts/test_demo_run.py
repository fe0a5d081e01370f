"""The demo itself, through its shell scripts, in a copy of this checkout: interrupted twice, it ends at its last token."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KNOBS = dict(
    N_LAYER="2", N_EMBD="64", CTX_LEN="64", M_BSZ="8", EPOCH_SAMPLES="128", EXIT_TOKENS="51200", RANDOM_SEED="1", PRECISION="fp32",
    DATA="demo", PROJ_DIR="out/run", ACCELERATOR="cpu", PYTHON=sys.executable,
)  # fmt: skip
STEPS = 51200 // (8 * 64)


@pytest.fixture
def checkout(tmp_path):
    for name in (
        "RWKV-v7",
        "cuda",
        "train.py",
        "make_data.py",
        "requirements.txt",
        "constraints.txt",
        "pyproject.toml",
        *(p.name for p in ROOT.glob("demo-*.sh")),
    ):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def start(checkout):
    log = open(checkout / "log", "a")
    return subprocess.Popen(
        ["sh", "demo-training-run.sh"],
        cwd=checkout,
        env={**os.environ, **KNOBS},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def steps_done(checkout):
    metrics = checkout / "out/run/metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")] if metrics.exists() else []
    return max((line["step"] for line in lines if "loss" in line), default=0)


def wait_for_step(checkout, process, step, seconds=240):
    end = time.monotonic() + seconds
    while steps_done(checkout) < step:
        assert process.poll() is None and time.monotonic() < end, (checkout / "log").read_text()[-2000:]
        time.sleep(0.05)


@pytest.mark.slow
def test_interrupted_and_resumed_demo_ends_at_its_last_token(checkout):
    for step, number, status in ((20, signal.SIGTERM, 143), (50, signal.SIGINT, 130)):
        process = start(checkout)
        wait_for_step(checkout, process, step)
        process.send_signal(number)  # to the shell alone, as `kill` and a container do
        assert process.wait(60) == status, (checkout / "log").read_text()[-2000:]
        assert step <= steps_done(checkout) < STEPS
        assert not (checkout / "out/run/rwkv-final.pth").exists()
    process = start(checkout)
    assert process.wait(300) == 0, (checkout / "log").read_text()[-2000:]
    log = (checkout / "log").read_text()
    assert steps_done(checkout) == STEPS
    assert (checkout / "out/run/rwkv-final.pth").exists()
    epochs = [
        int(line.split()[0])
        for line in (checkout / "out/run/train_log.txt").read_text().splitlines()
        if line.split()[0].isdecimal() and len(line.split()) == 7
    ]
    assert epochs == list(range(len(epochs))) and len(epochs) == -(-51200 // (128 * 64))
    assert "\ndef " in log and log.count("wrote out/run/rwkv-init.pth") == 1

    files = {path: path.stat().st_mtime_ns for path in (checkout / "out/run").glob("*.pth")}
    begin = time.monotonic()
    assert start(checkout).wait(60) == 0
    assert time.monotonic() - begin < 60 and "finished" in (checkout / "log").read_text()[len(log) :]
    assert {path: path.stat().st_mtime_ns for path in (checkout / "out/run").glob("*.pth")} == files
