"""Which rwkv-*.pth files a run has written, so that a training state is never mixed up with weights that came from elsewhere.

`{proj_dir}/state/weights.json` maps file names to identities, the newest first. A file is entered before it becomes
visible under its name, and the entry of the one that it replaces, which is there until then, stays. So every
rwkv-{n}.pth that is not entered was put there by someone else, who wants the run to go on from it, as the official
trainer does.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from ..config import UserError
from . import ranks
from .place import write_atomically
from .pth import load_weights, newest_weights, save_weights


def identity(path: Path) -> str:
    """Names a .pth file's content by the checksums in its zip directory, without reading all of it; "" if unreadable.

    Neither copying nor touching the file changes it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = sorted((e.filename.partition("/")[2], e.file_size, e.CRC) for e in archive.infolist())
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError):  # a later format, names that are no UTF-8
        return ""
    return hashlib.blake2b(json.dumps(entries).encode(), digest_size=16).hexdigest()


def publish_weights(proj_dir: str | Path, name: str, weights: Mapping[str, torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Writes {proj_dir}/{name} (rwkv-init.pth, rwkv-{n}.pth, rwkv-final.pth) as this run's own.

    Every rank calls it, with weights from full_weights. Raises UserError on every rank when rank 0 cannot write.
    """
    path = Path(proj_dir) / name

    def write() -> None:
        if ranks.rank() == 0:
            save_weights(path, weights, before_rename=lambda temporary: _enter(path, identity(temporary)))

    ranks.together(write, group)


def _enter(path: Path, content: str) -> None:
    file = path.parent / "state" / "weights.json"
    file.parent.mkdir(exist_ok=True)
    entries = _entries(path.parent)
    there = [identity(path)] if path.exists() else []
    entries[path.name] = list(dict.fromkeys([content, *(known for known in entries.get(path.name, []) if known in there)]))
    write_atomically(file, json.dumps(entries, indent=1))


def _entries(proj_dir: Path) -> dict[str, list[str]]:
    """By name, the identities under which it may be found."""
    try:
        entries = json.loads((proj_dir / "state" / "weights.json").read_text())
    except (OSError, ValueError):  # missing, or damaged
        return {}
    return entries if isinstance(entries, dict) else {}


def is_own(path: Path) -> bool:
    """Whether this run has written the file as it is now."""
    return identity(path) in _entries(path.parent).get(path.name, [])


def newest_entry(proj_dir: Path) -> list | None:
    """What a training state records of the weights beside it: [name, mini-epoch, identity] of the newest (pth.newest_weights)."""
    newest = newest_weights(proj_dir)
    return [newest[0].name, newest[1], identity(newest[0])] if newest else None


def why_stale(proj_dir: Path, recorded: list | None) -> str:
    """Why a state that recorded this entry must not be used; "" when it may.

    The weights that were newest then must be there, and nobody may have put others there, in their place or as newer ones.
    """
    name, mini_epoch, content = recorded or ("", -2, "")
    if name and not (proj_dir / name).is_file():
        return f"{name}, saved with it, is gone"
    if name and identity(proj_dir / name) != content and _is_wish(proj_dir / name):
        return f"{name} is not the file that was saved with it"
    for path in sorted(proj_dir.glob("rwkv-*.pth")):
        label = path.stem.removeprefix("rwkv-")
        newer = int(label) > mini_epoch if label.isdecimal() else label == "init" and mini_epoch < -1
        if newer and _is_wish(path):
            return f"{path.name} is newer and was not written by this run"
    return ""


def _is_wish(path: Path) -> bool:
    """Whether someone wants the run to go on from this file: who, the run itself apart, has put it there, and it can be read.

    A damaged one is nobody's wish, and costs no training state; it is reported.
    """
    if is_own(path):
        return False
    try:
        load_weights(path)
    except UserError as error:
        ranks.say(f"{error}; the training state does not need it")
        return False
    return True
