"""The environment in which demo-training-run.sh trains on a CPU: what users get, and so what is timed."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "demo-training-run.sh"


def variables() -> dict[str, str]:
    """Those that the script sets where they are not set: how threads wait, and that memory is kept between steps."""
    return dict(re.findall(r'export (GOMP_\w+|MALLOC_\w+)="\$\{\1:-(\w+)\}"', SCRIPT.read_text()))


def as_in_the_demo() -> None:
    """Starts the running script anew with them, where any is missing: glibc and libgomp read them before anything else runs."""
    missing = {name: value for name, value in variables().items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | missing)
