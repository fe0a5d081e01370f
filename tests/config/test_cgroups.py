"""Quotas of containers and schedulers: CPUs, threads and memory, in control groups of version 1 and 2"""

import os
from types import SimpleNamespace

import pytest

from rwkvlm.cli import main
from rwkvlm.config import cgroups, env


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 8 CPUs without groups: group(file, text) makes one a file, own(text) says which this process is in."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")
    monkeypatch.setattr(cgroups, "ALL", tmp_path / "all")
    monkeypatch.setattr(env, "_threads", 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "")  # so that it is put back afterwards
    monkeypatch.delenv("OMP_NUM_THREADS")

    def group(file: str, text: object) -> None:
        (tmp_path / "all" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / file).write_text(f"{text}\n")

    return group, (tmp_path / "own").write_text


def test_a_quota_of_version_2(machine):
    group, own = machine
    assert cgroups.cpus() == 8
    own("0::/pods/one\n")
    group("pods/one/cpu.max", "max 100000")
    assert cgroups.cpus() == 8
    group("pods/cpu.max", "350000 100000")
    assert cgroups.cpus() == 3, "the group around it"
    group("pods/one/cpu.max", "50000 100000")
    assert cgroups.cpus() == 1
    group("pods/one/cpu.max", "1600000 100000")
    group("pods/cpu.max", "what is this")
    assert cgroups.cpus() == 8
    group("cpu.max", "200000 100000")  # a container that sees its own group as the topmost one
    assert cgroups.cpus() == 2


def test_a_quota_of_version_1(machine):
    group, own = machine
    own("11:cpuset:/elsewhere\n4:cpu,cpuacct:/docker/abc\n0::/\n")
    group("cpu/docker/abc/cpu.cfs_quota_us", -1)
    group("cpu/docker/abc/cpu.cfs_period_us", 100000)
    group("cpuset/elsewhere/cpu.cfs_quota_us", 100000)
    group("cpuset/elsewhere/cpu.cfs_period_us", 100000)
    assert cgroups.cpus() == 8
    group("cpu/docker/abc/cpu.cfs_quota_us", 250000)
    assert cgroups.cpus() == 2


def test_memory_of_version_1(machine):
    group, own = machine
    own("9:memory:/docker/abc\n4:cpu:/\n0::/\n")
    assert cgroups.memory_left() == []
    for name, text in (
        ("limit_in_bytes", 1000),
        ("usage_in_bytes", 700),
        ("stat", "cache 5\ntotal_active_file 40\ntotal_inactive_file 60"),
    ):
        group(f"memory/memory.{name}", text)  # what a container sees, whose own path is the machine's
    assert cgroups.memory_left() == [400]


def test_a_system_without_proc_and_affinity(tmp_path, monkeypatch):
    """As macOS."""
    psutil = pytest.importorskip("psutil")
    assert cgroups.memory_free() == pytest.approx(psutil.virtual_memory().available, rel=0.1)
    if cgroups.MEMORY.exists():
        assert cgroups.swap_free() == pytest.approx(psutil.swap_memory().free, rel=0.1)
    monkeypatch.setattr(cgroups, "MEMORY", tmp_path / "none")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=6000))
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert (cgroups.cpus_allowed(), cgroups.memory_free()) == (12, 6000) and cgroups.swap_free() > 1 << 50


def test_threads_are_no_more_than_a_quota_has_time_for(machine, capsys):
    group, own = machine
    own("0::/\n")
    assert main(["no-command"]) == 2
    assert "OMP_NUM_THREADS" not in os.environ and env.share_threads(2) == 0
    group("cpu.max", "500000 100000")
    assert main(["no-command"]) == 2
    assert os.environ["OMP_NUM_THREADS"] == "5"
    assert (env.share_threads(2), os.environ["OMP_NUM_THREADS"]) == (2, "2")
    assert (env.share_threads(8), os.environ["OMP_NUM_THREADS"]) == (1, "1")


def test_a_number_of_threads_that_was_asked_for_stays(machine, monkeypatch, capsys):
    group, own = machine
    own("0::/\n")
    group("cpu.max", "500000 100000")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert main(["no-command"]) == 2
    assert os.environ["OMP_NUM_THREADS"] == "7" and env.share_threads(2) == 0
