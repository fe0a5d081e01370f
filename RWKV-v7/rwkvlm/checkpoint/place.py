"""Whether a file can be written where it is wanted, asked before the work that it shall hold."""

from __future__ import annotations

import os
from pathlib import Path

from ..config import UserError


def nearest(folder: Path) -> Path:
    """The folder, or the one above it that exists."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())


def try_folder(folder: Path) -> None:
    """OSError when nothing can be written there, or a folder that does not exist cannot be made. Leaves nothing."""
    probe = nearest(folder) / f".writable.{os.getpid()}"
    probe.touch()
    probe.unlink()


def check_file(path: Path, flag: str) -> None:
    """UserError, naming the flag that asks for it, when path cannot be written."""
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; give the name of a file")
    if path.exists() and not path.is_file():
        return  # /dev/stdout, a pipe: in its folder nothing is made
    try:
        try_folder(path.parent)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror or error}; choose another place") from None
