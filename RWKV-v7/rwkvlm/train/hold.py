"""A run has its folder to itself: a file that is locked while it writes there, and that says who it is."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO

from ..checkpoint.ranks import rank, together
from ..config import UserError
from ..config.locks import try_lock

HELD = ".holder"  # in proj_dir; stays there, so that nobody locks one that has just been removed


class Hold:
    """The lock of a run's first process on proj_dir. Two runs at once would take each other's files for their own.

    The lock goes with the process, however that ends. Where the file system has none, or one for each node as Lustre may have, nobody is
    refused: then the run that began last has the folder, and `check` ends the one before.
    """

    def __init__(self, proj_dir: Path) -> None:
        self.proj_dir = proj_dir
        self._file: IO | None = None
        self._own: set[str] = set()

    def take(self, planned_after: str | None = None) -> None:
        """From now on no other run writes there. Collective. UserError while one does.

        planned_after: what `last_holder` said before this run was planned. UserError too where another one has begun
        since then, even if it has ended: the files that the plan was made from may be others now.
        """
        together(lambda: self._take(planned_after))

    def check(self) -> None:
        """UserError when another run has begun there since. Collective."""
        together(self._check)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _take(self, planned_after: str | None) -> None:
        if rank() == 0 and self._file is None:
            self.proj_dir.mkdir(parents=True, exist_ok=True)
            self._file = _locked(self.proj_dir)
            now = last_holder(self.proj_dir)
            if planned_after is not None and planned_after != now:
                raise UserError(
                    f"another run has been in {self.proj_dir} ({now}) since this one looked there; "
                    "start this one again: it goes on from what is there now"
                )
            who = f"process {os.getpid()} on {os.uname().nodename}, since {datetime.now():%Y-%m-%d %H:%M:%S}"
            with suppress(OSError):  # a full disk: the lock needs no room
                self._file.truncate(0)
                self._file.write(f"{who}\n".encode())
            self._own = {who, last_holder(self.proj_dir)}  # what is there where the disk was full; it may also be unreadable for a moment

    def _check(self) -> None:
        if self._file is not None and (now := last_holder(self.proj_dir)) and now not in self._own:
            raise UserError(
                f"another run has begun in {self.proj_dir} ({now}) and goes on from what was saved there; this one has ended without saving"
            )


def refuse_if_held(proj_dir: Path) -> None:
    """UserError while another run writes to proj_dir. Makes nothing."""
    if (proj_dir / HELD).exists():
        _locked(proj_dir).close()


def _locked(proj_dir: Path) -> IO:
    file = open(proj_dir / HELD, "ab", buffering=0)
    if not try_lock(file):
        file.close()
        raise UserError(
            f"another run is writing to {proj_dir} ({last_holder(proj_dir) or 'it does not say which'}); "
            "wait for its end or stop it, or choose another --proj_dir"
        )
    return file


def last_holder(proj_dir: Path) -> str:
    """What the run that took proj_dir last has written; "" when that cannot be read."""
    with suppress(OSError, ValueError):
        return (proj_dir / HELD).read_text().strip()
    return ""
