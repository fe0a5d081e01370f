"""Output files: whether they can be written is checked before the work that they shall hold, and they are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..config import UserError


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists. OSError at a link that leads nowhere, as to a disk that is not mounted."""
    for place in (folder, *folder.absolute().parents):
        if place.exists():
            return place
        if place.is_symlink():
            raise FileNotFoundError(errno.ENOENT, f"{place} is a link to {os.readlink(place)}, which is not there")
    raise FileNotFoundError(errno.ENOENT, f"{folder} is nowhere")  # "/" exists


def try_folder(folder: Path) -> None:
    """OSError when nothing can be written there, or a folder that does not exist cannot be made. Leaves nothing."""
    probe = nearest(folder) / f".writable.{os.getpid()}"
    probe.touch()
    probe.unlink(missing_ok=True)  # a process of another node, or container, with the same number has been faster


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


def write_json(path: Path, content: object, flag: str, cure: str) -> None:
    """Writes JSON, whole or not at all. UserError, naming the flag that asks for it and the cure, when it cannot be written."""
    text = json.dumps(content, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_text(text)  # /dev/stdout, a pipe
        else:
            write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}; {cure}") from None


def write_atomically(file: Path, text: str) -> None:
    prepare_file(file, text)()


def prepare_file(file: Path, text: str) -> Callable[[], None]:
    """Writes the file under a temporary name, flushed to disk; the function that is returned moves it into place."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise

    def move() -> None:
        os.replace(temporary, file)
        sync_folder(file.parent)

    return move


def sync_folder(folder: Path) -> None:
    """Makes renames inside folder survive a power cut. File systems that cannot (SMB of older kernels, some of FUSE) say EINVAL."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)
