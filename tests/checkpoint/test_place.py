"""Files of results: an older one is lost only to a whole new one."""

import errno
import json
import os
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest

from rwkvlm.checkpoint.place import try_folder, write_atomically, write_json
from rwkvlm.config import UserError


def test_written_with_its_folder_and_over_an_older_one(tmp_path):
    path = tmp_path / "new" / "results.json"
    for content in ({"loss": 1.5}, {"loss": 1.25}):
        write_json(path, content, "--out", "")
        assert json.loads(path.read_text()) == content
    assert os.listdir(path.parent) == ["results.json"]


def test_an_older_file_outlives_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"loss": 1.5}, "--out", "")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"--out .*results.json cannot be written: No space left on device; free some space"):
        write_json(path, {"loss": 1.25}, "--out", "free some space")
    assert json.loads(path.read_text()) == {"loss": 1.5} and os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize("code, written", [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_flush_folders(tmp_path, monkeypatch, code, written):
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with nullcontext() if written else pytest.raises(OSError):
        write_atomically(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reading = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_json(tmp_path / "pipe", [1], "--out", "")
    assert json.loads(os.read(reading, 100)) == [1]
    os.close(reading)


def test_a_link_that_leads_nowhere(tmp_path):
    """As to a disk that is not mounted: not the folder around it is asked."""
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "runs")
    for folder in (tmp_path / "out", tmp_path / "out" / "a"):
        with pytest.raises(OSError, match="out is a link to .*/disk/runs, which is not there"):
            try_folder(folder)
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    try_folder(tmp_path / "out" / "a")


def test_processes_of_the_same_number_may_try_a_folder_at_the_same_time(tmp_path, monkeypatch):
    """Two containers on one file system: the other one has removed the file that both have made."""
    touch = Path.touch
    monkeypatch.setattr(Path, "touch", lambda path: (touch(path), path.unlink()))
    try_folder(tmp_path)
