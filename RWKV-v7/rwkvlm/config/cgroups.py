"""CPUs and memory of the machine, and what control groups (versions 1 and 2; of containers or schedulers) leave of them to this process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

OWN, ALL = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
MEMORY = Path("/proc/meminfo")


def cpus_allowed() -> int:
    """How many CPUs this process may run on; macOS has them all run it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpus() -> int:
    """How many CPUs have time for this process: those that it may run on, or fewer where a group has a quota."""
    counts = [cpus_allowed()]
    for folder in _folders("cpu"):
        for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            with suppress(OSError, ValueError):  # "max" is no quota
                quota, period = (int(word) for file in files for word in (folder / file).read_text().split())
                if quota > 0:
                    counts.append(quota // period)
    return max(1, min(counts))


def memory_free() -> int:
    """Bytes that the machine has for programs."""
    try:
        return _meminfo("MemAvailable")
    except OSError:  # macOS
        import psutil  # DeepSpeed brings it

        return psutil.virtual_memory().available


def swap_free() -> int:
    """Bytes that the machine has beside it, on disk; macOS makes as much as is asked for."""
    try:
        return _meminfo("SwapFree")
    except OSError:
        return 1 << 60


def _meminfo(name: str) -> int:
    found = dict(line.split(":") for line in MEMORY.read_text().splitlines())
    return int(found[name].split()[0]) * 1024


def memory_left() -> list[int]:
    """Bytes that each group still allows; files in the cache make room."""
    left = []
    for folder in _folders("memory"):
        for most, now, prefix in (("memory.max", "memory.current", ""), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")):
            with suppress(OSError, ValueError, KeyError):  # the topmost has no limit; "max" is none
                limit, used = int((folder / most).read_text()), int((folder / now).read_text())
                kinds = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left.append(max(0, limit - used + int(kinds[f"{prefix}active_file"]) + int(kinds[f"{prefix}inactive_file"])))
    return left


def _folders(controller: str) -> Iterator[Path]:
    """The process's groups, from its own to the topmost that is to be seen: version 2's, and version 1's of the controller."""
    try:
        groups = [line.split(":", 2) for line in OWN.read_text().splitlines() if line.count(":") > 1]
    except OSError:
        return
    for _, controllers, path in groups:
        if controllers and controller not in controllers.split(","):
            continue
        top = ALL / controller if controllers else ALL
        own = top / path.lstrip("/")
        yield from [own, *own.parents][: len(own.relative_to(top).parts) + 1]
