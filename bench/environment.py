"""The environment of a measurement: that in which demo-training-run.sh trains on a CPU; a clock; and what is recorded."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "demo-training-run.sh"


def variables() -> dict[str, str]:
    """Those that the script sets where they are not set: how threads wait, and that memory is kept between steps."""
    return dict(re.findall(r'export (GOMP_\w+|MALLOC_\w+)="\$\{\1:-(\w+)\}"', SCRIPT.read_text()))


def as_in_the_demo() -> None:
    """Starts the running script anew with them, where any is missing: glibc and libgomp read them before anything else runs."""
    missing = {name: value for name, value in variables().items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | missing)


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def memory_mib(key: str) -> float:
    """Of this process: VmRSS, what it has now, or VmHWM, the most that it had. OSError where this is not Linux."""
    return int(re.search(rf"^{key}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)[1]) / 1024


def write_record(path: Path, **results: Any) -> None:
    """Results as JSON, behind what they were measured on and with; makes the folder."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    about = {"date": datetime.date.today().isoformat(), "commit": commit, "cpu": cpu, "torch": importlib.metadata.version("torch")}
    about |= {"python": platform.python_version(), "system": platform.platform(), "command": sys.argv}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | results, indent=1) + "\n")
