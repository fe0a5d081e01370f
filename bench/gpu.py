"""What bench/gpu.sh runs: the steps, what has been done of them, and the time that is left.

It needs the standard library, torch for the chip's name, and the package's guarded processes.

A step is a list of items, each a process of its own with its own log. An item that succeeded is not run again, one that
failed is, the next time; an item that is still running when the minutes are over is stopped (SIGTERM first: training
saves), and one that hangs (MOST) has failed. results.json is written after every item. It belongs to one commit, one chip
and one torch: with another of them the file is set aside and a new one begun.

Exit codes: 0 all that was asked for is done, 1 something failed, 2 it cannot start, 3 time is over: the same command goes
on; 130 and 143 after Ctrl-C and SIGTERM, with which what is running is stopped too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import plot_loss
from rwkvlm.train.guarded import guarded

ROOT = Path(__file__).resolve().parents[1]
BENCH = Path(__file__).resolve().parent
STEPS = ("tests", "sanitize", "kernels", "step", "train", "others")
# files of tests/cuda that have a form for a GPU
ON_GPU = ("operator", "ttt_operator", "fused", "loss", "adamw", "wkv4", "rosa", "model", "graphs")
FIRST_TESTS = ("cuda", "ops", "layers", "models", "infer")  # those that touch the GPU most
WKV4 = "16x512x768,8x4096x768,8x4096x4096"  # B x T x C
ROSA = "8x512x768,8x4096x768"  # B x T x C, symbols of 4 bits
OPERATORS = ("norm_mix", "token_mix", "time_mix_inputs", "time_mix_output", "relu_square", "loss", "adamw")
MODELS = ("L12-D768x16x512", "L12-D768x2x4096", "L24-D2048x2x4096")  # layers, width, samples, tokens of a sample
PHANTOMS = ("P12-D768x16x512", "P12-D768x2x4096")  # the first two with test-time training
WITH_ROSA = ("X12-D768x16x512", "X12-D768x2x4096")
MODES = ("default", "reduce-overhead")  # of torch.compile, for the blocks: gpu_step.py --compile
# B x T x H x N of which wkv7 can scan segments: where that should gain most, where the rule begins
LONG = ("1x32768x32x64", "1x4096x32x64")
GRACE = 90.0  # seconds from SIGTERM to SIGKILL: training writes its state meanwhile
LEAST = 5.0  # seconds without which no item is begun
MOST = 600.0  # seconds after which an item hangs: a kernel that waits for ever would take the minutes of all others


@dataclass
class Item:
    """One process. read: what its log says beyond its exit code, for results.json."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    read: Callable[[str], dict] = lambda log: {}
    most: float = MOST


def last_json(log: str) -> dict:
    """The JSON object in the last line of a log that begins with {."""
    lines = [line for line in log.splitlines() if line.startswith("{")]
    return {"result": json.loads(lines[-1])} if lines else {}


def pytest_counts(log: str) -> dict:
    return {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", (log.splitlines() or [""])[-1])}


def sanitizer_errors(log: str) -> dict:
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", log)
    return {"errors": sum(int(a or b) for a, b in found)} if found else {}


def items_of(step: str, options: argparse.Namespace) -> list[Item]:
    python, cpu, small = sys.executable, options.device == "cpu", options.small
    device = ["--device", "cpu" if cpu else "cuda", *(["--small"] if small else [])]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if step == "tests" and not cpu:  # a process for each file: behind an illegal address nothing works any more in the process that had it
        files = [f"tests/cuda/test_{name}.py" for name in ON_GPU]
        return [Item(f"{name} on the GPU", [*pytest, name, "-k", "gpu"], read=pytest_counts) for name in files]
    if step in ("tests", "others"):
        files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda p: (*(p.parent.name != n for n in FIRST_TESTS), str(p)))
        files = [p for p in files if not (small or step == "tests") or p.name == "test_backend.py"]
        names = [str(p.relative_to(ROOT)) for p in files]
        return [Item(n, [*pytest, n], read=pytest_counts) for n in names]
    if step == "sanitize":
        work = [python, str(BENCH / "gpu_kernels.py"), "once", *device]
        if cpu:
            return [Item("once, without a sanitizer", work, read=last_json)]
        tool = shutil.which("compute-sanitizer") or str(
            Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "bin" / "compute-sanitizer"
        )
        freed = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation of its own: its end is seen
        kinds = ("memcheck", "racecheck", "synccheck")
        return [Item(k, [tool, "--tool", k, "--error-exitcode", "9", *work], freed, sanitizer_errors) for k in kinds]
    if step == "kernels":
        work = [python, str(BENCH / "gpu_kernels.py")]
        found = [Item("wkv7", [*work, "wkv7", *device], read=last_json)]
        found += [Item(f"wkv7 {shape}", [*work, "wkv7", "--shape", shape, *device], read=last_json) for shape in ([] if small else LONG)]
        found += [
            Item(f"wkv7 beside {peer.split('=')[0]}", [*work, "wkv7", "--peer", peer, *device], read=last_json) for peer in options.peer
        ]
        found += [Item(name, [*work, name, *device], read=last_json) for name in OPERATORS]
        wkv4 = [
            python,
            str(BENCH / "wkv4.py"),
            "--dtype",
            "bfloat16",
            *device[:2],
            *(["--rounds", "2", "--shapes", "1x40x32"] if small else ["--shapes", WKV4]),
        ]
        found.append(Item("wkv4", wkv4, read=last_json))
        rosa = [python, str(BENCH / "rosa.py"), *device[:2], "--bits", "4", "--shapes", "1x64x8" if small else ROSA]
        found.append(Item("rosa", rosa, read=last_json))
        large = [*work, "adamw", "--layers", "24", "--shape", "2x4096x32x64", *device]  # of the last of MODELS
        return found + [Item("adamw L24-D2048", large, read=last_json)] * (not small)
    if step == "step":
        models = options.models.split(",") if options.models else ["L2-D64x2x64"] if small else MODELS
        modes = ("default",) if small else MODES
        eager = [*models, *([] if options.models else ["P2-D64x2x128", "X2-D64x2x128"] if small else (*PHANTOMS, *WITH_ROSA))]
        runs = [(m, "", []) for m in eager] + [(m, " rosa_grad none", ["--rosa_grad", "none"]) for m in eager if m.startswith("X")]
        runs += [(m, " graphs", ["--graphs"]) for m in eager if not cpu]  # a rehearsal has no GPU to make graphs of
        runs += [(m, f" compile {mode}", ["--compile", mode]) for mode in modes for m in models]
        return [Item(f"{m}{how}", [python, str(BENCH / "gpu_step.py"), m, *device, *words], read=last_json) for m, how, words in runs]
    folder = options.out / "demo"
    knobs = {"DATA": "demo", "PROJ_DIR": str(folder), "PROMPT": "", "RANDOM_SEED": "1", "PYTHON": python}
    if cpu:
        knobs |= {"ACCELERATOR": "cpu"}
    else:
        knobs |= {"EPOCH_SAMPLES": "4000"}  # the demo's 500 are less than a second, and each mini-epoch writes its training state
    if small:
        knobs |= {"N_LAYER": "1", "N_EMBD": "64", "CTX_LEN": "64", "M_BSZ": "4", "EPOCH_SAMPLES": "40", "EXIT_TOKENS": "10000"}
    knobs = {name: os.environ.get(name) or value for name, value in knobs.items()}
    met = subprocess.run([python, "RWKV-v7/requirements_met.py", "requirements.txt"], cwd=ROOT, capture_output=True).returncode == 0
    command = [str(ROOT / "demo-training-run.sh")] if met else [python, str(BENCH / "gpu_train.py")]
    return [Item("demo", command, knobs, lambda log: loss_curve(Path(knobs["PROJ_DIR"])), math.inf)]


def chosen(step: str, options: argparse.Namespace) -> list[Item]:
    """The items of a step that --only leaves."""
    return [item for item in items_of(step, options) if any(part in item.name for part in options.only.split(","))]


def loss_curve(folder: Path) -> dict:
    """Of a run's metrics.jsonl: at most 200 points of the loss, the validation losses, the median speed, and whether it is finished."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    losses, held_out = plot_loss.read(path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    speeds = sorted(r["tokens_per_s"] for r in records if r.get("tokens_per_s"))
    shares = sorted(r["mfu"] for r in records if r.get("mfu"))
    every = max(1, len(losses) // 200)
    return {
        "finished": (folder / "rwkv-final.pth").exists(),
        "loss": losses[::every] + losses[-1:],
        "val_loss": held_out,
        "tokens_per_s_median": speeds[len(speeds) // 2] if speeds else None,
        "mfu_median": shares[len(shares) // 2] if shares else None,
    }


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def about(device: str, commit: str) -> dict:
    """The machine and the code."""
    import torch

    changed = " with changes" if output_of("git", "status", "--porcelain", "--untracked-files=no") else ""
    facts = {
        "commit": commit or output_of("git", "rev-parse", "HEAD") + changed,
        "torch": torch.__version__,
        "chip": "none: a rehearsal on the CPU",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {"chip": properties.name, "gpus": torch.cuda.device_count(), "memory_gib": round(properties.total_memory / 2**30, 1)}
        facts |= {
            "capability": f"{properties.major}.{properties.minor}",
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
        facts |= {"cuda_of_torch": torch.version.cuda, "nvcc": (output_of("nvcc", "--version").splitlines() or [""])[-1]}
    return facts | {
        "python": platform.python_version(),
        "system": platform.platform(),
        "begun": datetime.datetime.now().isoformat(timespec="seconds"),
    }


class Results:
    """results.json."""

    def __init__(self, path: Path, facts: dict) -> None:
        self.path = path
        old = json.loads(path.read_text()) if path.exists() else None
        if old and any(old["about"].get(key) != facts[key] for key in ("commit", "chip", "torch")):
            number = 1
            while (aside := path.with_name(f"results-{number}.json")).exists():
                number += 1
            path.rename(aside)
            print(f"{path} is of another commit, chip or torch: now {aside.name}, a new one is begun", flush=True)
            old = None
        self.data = old or {"about": facts, "steps": {}}

    def done(self, step: str, item: Item) -> bool:
        return self.data["steps"].get(step, {}).get(item.name, {}).get("ok", False)

    def put(self, step: str, item: Item, result: dict) -> None:
        self.data["steps"].setdefault(step, {})[item.name] = result
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".writing")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(beside, self.path)


def end(process: subprocess.Popen) -> None:
    """It has ended by itself, or is asked to, so that it can save, and is killed after GRACE seconds."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run(item: Item, log: Path, seconds: float) -> dict:
    """One item, for so many seconds at most. ok: it ended by itself, with exit code 0."""
    log.parent.mkdir(parents=True, exist_ok=True)
    begin, stopped = time.monotonic(), False
    with log.open("w") as file, tempfile.TemporaryDirectory() as empty:  # whatever ends this process, and when: the item does not go on
        with guarded(item.command, empty, cwd=ROOT, env=os.environ | item.environment, stdout=file, stderr=subprocess.STDOUT) as process:
            try:
                process.wait(min(seconds, item.most))
            except subprocess.TimeoutExpired:
                stopped = True
            finally:
                end(process)
    text = log.read_text(errors="replace")
    result = {"ok": process.returncode == 0 and not stopped, "seconds": round(time.monotonic() - begin, 1), "exit_code": process.returncode}
    try:
        result |= item.read(text)
    except Exception as error:  # a log that is not as expected is a failed item, and no reason to lose the others
        result |= {"ok": False, "error": f"its log cannot be read: {error!r}"}
    if stopped and seconds <= item.most:
        result["stopped"] = "time was over"
    elif stopped:
        result["error"] = f"it was still running after {item.most:g} s"
    if not result["ok"] and "stopped" not in result:
        result["last_lines"] = text.splitlines()[-15:]
    return result


def perform(steps: list[str], options: argparse.Namespace, results: Results) -> int:
    deadline = time.monotonic() + options.minutes * 60
    failed = 0
    for step in steps:
        items = chosen(step, options)
        for number, item in enumerate(items, 1):
            if results.done(step, item) and not options.again:
                continue
            left = deadline - time.monotonic()
            log = options.out / "logs" / (re.sub(r"[^\w.-]+", "-", f"{step}-{item.name}") + ".log")
            result = run(item, log, left) if left > LEAST else {"stopped": True}
            if "ok" in result:
                results.put(step, item, result)
            if "stopped" in result:
                print(
                    f"{step}: {number - 1} of {len(items)} items; {options.minutes:g} minutes are over: the same command goes on",
                    flush=True,
                )
                return 3
            failed += not result["ok"]
            said = f"ok, {result['seconds']} s" if result["ok"] else f"FAILED, see {log}"
            print(f"{step} {number}/{len(items)} {item.name}: {said}", flush=True)
    asked = {step: chosen(step, options) for step in steps}
    print(
        "; ".join(f"{step}: {sum(results.done(step, i) for i in items)} of {len(items)} done" for step, items in asked.items())
        + f"; {results.path}",
        flush=True,
    )
    return int(failed > 0)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[*STEPS, []], help="none: all, in this order")
    parser.add_argument("--minutes", type=float, default=25.0, help="after which what is running is stopped")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--small", action="store_true", help="tiny shapes, one test file, a short training")
    parser.add_argument("--again", action="store_true", help="also what has been done")
    parser.add_argument("--only", default="", help="items whose names contain this; several, with commas: --only 'on the GPU,tests/ops'")
    parser.add_argument("--commit", default="", help="what results.json says, where the checkout is a copy without .git")
    parser.add_argument(
        "--models", default="", help=f"of the step `step`: layers, width x samples x tokens, comma-separated; default {','.join(MODELS)}"
    )
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PATH", help="a public wkv7 beside which ours is timed; see bench/gpu_peers.py"
    )
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    if bad := [peer for peer in options.peer if not re.fullmatch(r"\w+=.+", peer)]:
        parser.error(f"--peer {bad[0]}: expected NAME=PATH")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            why = "was built without CUDA" if torch.version.cuda is None else "sees no GPU"
            print(f"error: torch {torch.__version__} {why} here; --device cpu --small rehearses every step without one", file=sys.stderr)
            return 2
    results = Results(options.out / "results.json", about(options.device, options.commit))
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return perform(options.steps or list(STEPS), options, results)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
