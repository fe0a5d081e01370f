"""The full state of a training run: saved atomically, verified by checksum, loaded at any world size, ZeRO stage or precision.

    capture(model, optimizer) -> Captured                          every process by itself: a copy in host memory
    write(proj_dir, step, captured, meta, keep_last) -> Path       collective; needs no more of the model
    find_state(proj_dir) -> StateInfo | None                       every process by itself, from the manifests alone
    check(info) -> str                                             collective: reads the checksums of the files, divided among the ranks
    load_state(info, model, optimizer) -> None                     collective
    set_aside(proj_dir) -> None                                    collective; when a run starts without the state that is there

model: the bare LanguageModel (also when DDP or a DeepSpeed engine wraps it); optimizer: trainer.strategy.optimizers[0].
meta: whatever JSON can hold (global sample number, tokens, schedule); it comes back unchanged in StateInfo.meta. Capture between
optimizer steps only. Every rank's random states (torch, CUDA, numpy, Python) are saved, and restored at the same world size.

    {proj_dir}/state/step{n}/rank00000.pt ...   torch.save: every rank's pieces of masters, moments and steps by parameter name
    {proj_dir}/state/step{n}/manifest.json      sizes and checksums of these, shapes, meta, the newest rwkv-*.pth at that time
    {proj_dir}/state/latest                     name of the newest, for people and scripts
    {proj_dir}/state/weights.json               which rwkv-*.pth files are this run's own (ledger.py)

With a process group of its own `write` runs in a thread beside the training (train/saver.py). Ranks share proj_dir's file system.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import zlib
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..config import UserError
from . import ledger, ranks
from .place import prepare_file, sync_folder, write_atomically
from .shards import Piece, pieces, share, write_back

FORMAT = 1
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # DeepSpeed's dynamic loss scaler (fp16)


@dataclass(frozen=True)
class StateInfo:
    """An intact training state: its folder, optimizer steps taken, the meta that was saved."""

    path: Path
    step: int
    meta: dict[str, Any]


@dataclass(frozen=True)
class Captured:
    """One rank's part of a state in host memory, and the shapes of all tensors of the model."""

    content: dict[str, Any]
    shapes: dict[str, list[int]]


def capture(model: nn.Module, optimizer: torch.optim.Optimizer) -> Captured:
    """A copy in host memory of what this rank saves. No communication."""
    tensors = {
        piece.name: {"start": piece.start, "step": piece.step} | {key: view.to("cpu", copy=True) for key, view in piece.values.items()}
        for piece in share(pieces(model, optimizer), ranks.rank(), ranks.world_size())
    }
    scaler = getattr(optimizer, "loss_scaler", None)
    content = {
        "tensors": tensors,
        "random": _random_states(),
        "scaler": {key: getattr(scaler, key) for key in SCALER if hasattr(scaler, key)},
    }
    return Captured(content, _shapes(model))


def write(
    proj_dir: str | Path, step: int, captured: Captured, meta: dict[str, Any], keep_last: int, group: dist.ProcessGroup | None = None
) -> Path:
    """Saves every rank's part as {proj_dir}/state/step{step} and deletes all but the newest keep_last.

    All or nothing, whenever it is interrupted: ranks write into step{step}.tmp; rank 0 seals it with a manifest,
    renames it and moves `latest`. Collective in group. Raises UserError on every rank when any rank cannot write; what
    was there before is intact then.
    """
    folder = Path(proj_dir) / "state"
    path, temporary = folder / f"step{step}", folder / f"step{step}.tmp"

    def prepare() -> None:
        if ranks.rank() == 0:
            _clear_remains(folder)  # before, not after: they may be what fills the disk
            temporary.mkdir(parents=True)
            sync_folder(folder.parent)  # which may not have known of state/ before

    def write_own() -> tuple[str, int, int]:
        name = f"rank{ranks.rank():05d}.pt"
        temporary.mkdir(parents=True, exist_ok=True)  # network file systems may show rank 0's later
        with open(temporary / name, "wb") as file:
            checked = _Checked(file)
            torch.save(captured.content, checked)
            file.flush()
            os.fsync(file.fileno())
        return name, checked.size, checked.crc

    def seal() -> None:
        if ranks.rank() == 0:
            if absent := [name for name, _, _ in files if not (temporary / name).exists()]:
                raise UserError(f"{absent[0]} of another node is not there; --proj_dir must be on a file system that all nodes share")
            content = {
                "format": FORMAT,
                "step": step,
                "world_size": ranks.world_size(),
                "meta": json.loads(json.dumps(meta)),
                "files": {name: {"size": size, "crc32": crc} for name, size, crc in files},
                "shapes": captured.shapes,
                "weights": ledger.newest_entry(Path(proj_dir)),
            }
            write_atomically(temporary / "manifest.json", json.dumps({"content": content, "crc32": _crc(content)}))
            point = prepare_file(folder / "latest", path.name)  # before the rename: what follows needs no room on the disk
            if path.exists():
                _put_away(path)
            os.replace(temporary, path)
            sync_folder(folder)
            point()
            _prune(folder, step, keep_last)

    try:
        ranks.together(prepare, group)
        files = ranks.together(write_own, group)
        ranks.together(seal, group)
    except UserError as error:
        if ranks.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot save the training state in {path}: {error}; free some space or choose another --proj_dir") from error
    return path


def _put_away(path: Path) -> None:
    """Renames a state of the step that is being saved, or of a later one: it must be damaged, since training began before it."""
    damaged = path.with_name(path.name + ".damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    os.replace(path, damaged)


def _prune(folder: Path, newest: int, keep_last: int) -> None:
    """Deletes the oldest states beyond keep_last."""
    states = _states(folder)
    for step, path in states:
        if step > newest:
            _put_away(path)
    for path in [path for step, path in states if step <= newest][keep_last:]:
        os.replace(path, path.with_name(path.name + ".tmp"))
    _clear_remains(folder)


def _clear_remains(folder: Path) -> None:
    """Deletes what interrupted saves have left."""
    for remains in folder.glob("step*.tmp"):
        shutil.rmtree(remains, ignore_errors=True)


def find_state(proj_dir: str | Path, skip: Collection[Path] = ()) -> StateInfo | None:
    """The newest state with a sound manifest and files of the right sizes, or None. Changes nothing on disk; no communication.

    What is wrong with a newer one is reported in one line. None also, with one line, when the rwkv-*.pth files say that someone has
    replaced or added weights since (ledger.why_stale). `check` reads the files; a state found damaged is then to be skipped.
    """
    proj_dir = Path(proj_dir)
    for _, path in _states(proj_dir / "state"):
        if path in skip:
            continue
        try:
            manifest, problem = _read_manifest(path), ""
            for name, expected in manifest["files"].items():
                if (size := (path / name).stat().st_size) != expected["size"]:
                    problem = f"{name} has {size} bytes instead of {expected['size']}"
        except OSError as error:
            problem = ranks.describe(error)
        if problem:
            say_damaged(path, problem)
        elif reason := ledger.why_stale(proj_dir, manifest["weights"]):
            ranks.say(f"training state {path} is not used: {reason}")
            return None
        else:
            return StateInfo(path, manifest["step"], manifest["meta"])
    return None


def say_damaged(path: Path, problem: str) -> None:
    ranks.say(f"training state {path} is damaged ({problem}); looking for an older one")


def check(info: StateInfo) -> str:
    """What is wrong with the files of a state, "" if nothing. Collective.

    Each file is read by one rank: at the same world size by the one that will load it.
    """
    problem = ""
    try:
        files = sorted(_read_manifest(info.path)["files"].items())
        for name, expected in files[ranks.rank() :: ranks.world_size()]:
            if _file_crc(info.path / name) != expected["crc32"]:
                problem = f"the checksum of {name} is wrong"
    except OSError as error:
        problem = ranks.describe(error)
    return next(filter(None, ranks.gather(problem)), "")


def _states(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of all states, newest first."""
    found = [(int(match[1]), path) for path in folder.glob("step*") if (match := re.fullmatch(r"step(\d+)", path.name)) and path.is_dir()]
    return sorted(found, reverse=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    """OSError for one that cannot be read or is damaged."""
    with suppress(ValueError, KeyError, TypeError):
        sealed = json.loads((path / "manifest.json").read_text())
        if sealed["content"]["format"] == FORMAT and _crc(sealed["content"]) == sealed["crc32"]:
            return sealed["content"]
    raise OSError("manifest.json is not readable")


def set_aside(proj_dir: str | Path) -> None:
    """Renames state/ to state.aside-{k} when it holds states. Collective.

    A run that does not continue them then never mixes with them or deletes them. weights.json stays in state/.
    """
    folder = Path(proj_dir) / "state"

    def rename() -> None:
        if ranks.rank() == 0 and _states(folder):
            k = 1
            while (aside := folder.with_name(f"state.aside-{k}")).exists():
                k += 1
            own = folder / "weights.json"
            kept = own.read_text() if own.exists() else None
            os.replace(folder, aside)
            if kept is not None:
                folder.mkdir()
                write_atomically(own, kept)
            ranks.say(f"the older training state is now in {aside}")

    ranks.together(rename)


def load_state(info: StateInfo, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts a state into model and optimizer. The optimizer must be fresh or between steps.

    At the world size, strategy and precision of the save, training goes on to the same bits; elsewhere to the same numbers within
    rounding. Raises UserError on every rank when the state is of a model with other sizes.
    """

    def fill() -> None:
        manifest = _read_manifest(info.path)
        _check_shapes(info.path, manifest["shapes"], _shapes(model))
        saved, own = manifest["world_size"], ranks.rank()
        order = sorted(range(saved), key=lambda r: r != own)  # at the same world size everything is in the own file
        same_world = saved == ranks.world_size()
        wanted = {piece.name: piece for piece in pieces(model, optimizer)}
        left = sum(piece.numel for piece in wanted.values())
        steps: dict[int, tuple[Piece, float]] = {}
        for number, rank in enumerate(order):
            content = torch.load(info.path / f"rank{rank:05d}.pt", map_location="cpu", weights_only=True, mmap=True)
            if number == 0:
                _set_scaler(optimizer, content["scaler"])
                if same_world:
                    _set_random_states(content["random"])
            for name, entry in content["tensors"].items():
                if name in wanted:
                    left -= _copy(entry, wanted[name], steps)
            if left == 0:
                break
        if left:
            raise RuntimeError(f"{left} numbers of {info.path} are missing")
        for piece, step in steps.values():
            piece.set_step(step)

    ranks.together(fill)
    write_back(optimizer)


@torch.no_grad()
def _copy(entry: dict[str, Any], piece: Piece, steps: dict[int, tuple[Piece, float]]) -> int:
    """Copies the overlap of a saved entry with a piece and returns its size; notes the largest step of each counter.

    A tensor that was trained and is frozen now, or the other way round, keeps its numbers; new moments are zero.
    """
    main = "master" if "master" in entry else "value"
    start = entry["start"]
    part = piece.cut(start, start + entry[main].numel())
    if part.numel <= 0:
        return 0
    for key, view in part.values.items():
        source = entry.get(main if key in ("master", "value") else key)
        if source is None:
            view.zero_()
        else:
            view.copy_(source[part.start - start : part.start - start + part.numel])
    if part.adam:
        counter = id(part.adam[1])
        steps[counter] = (part, max(entry["step"], steps[counter][1] if counter in steps else 0.0))
    return part.numel


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in model.state_dict(keep_vars=True).items()}


def _check_shapes(path: Path, saved: dict[str, list[int]], own: dict[str, list[int]]) -> None:
    for name in sorted(saved.keys() | own.keys()):
        if saved.get(name) != own.get(name):
            raise UserError(
                f"the training state {path} has {name} of shape {saved.get(name, 'none')}, the model {own.get(name, 'none')}; "
                "use the sizes of the run, or another --proj_dir"
            )


def _random_states() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": [version, list(words), gauss],
        "numpy": [keys.tolist(), int(position), int(has_gauss), float(cached)],
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def _set_scaler(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    scaler = getattr(optimizer, "loss_scaler", None)
    for key, value in saved.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


class _Checked:
    """A file that counts and checksums what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size, self.crc = file, 0, 0

    def write(self, data: bytes) -> int:
        self.crc = zlib.crc32(data, self.crc)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _file_crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
    return crc


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
