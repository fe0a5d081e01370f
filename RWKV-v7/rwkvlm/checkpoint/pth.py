"""Weights in the official format: a flat state dict of bfloat16 tensors in one .pth file.

Names, shapes and order are those of RWKV-LM, RWKV-v7/train_temp. Block 0's v0, v1, v2, which nothing uses, are written,
as that trainer requires them, and may be absent when read, as they are in released files. Everything that can be wrong
with a file is a UserError of one line.
"""

from __future__ import annotations

import itertools
import os
import re
import zipfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from ..config import UserError
from ..models import DESCRIBING, LanguageModel, build, read_config
from ..models.rosa_toys import by_usual_names
from . import ranks
from .place import sync_folder

WRAPPERS = ("_forward_module.", "module.", "_orig_mod.")  # left in names by Lightning's DeepSpeed, DDP and torch.compile
UNUSED = frozenset(f"blocks.0.att.{v}" for v in ("v0", "v1", "v2"))
# how a block begins in the official trainer's files
TRAINED = "ln1 ln2 ln0 x_r x_w x_k x_v x_a x_g w1 w2 w0 a1 a2 a0 v1 v2 v0 g1 g2 k_k k_a r_k".split()
# How a file names the tensors that say that its model is no RWKV-7. Without them the PyPI package `rwkv` would compute the
# rest as an RWKV-7; it reads the number of a block behind each "blocks.", and so ends here, with the name in its error.
IN_FILE = {name: f"blocks.{name}" for name in DESCRIBING}
INIT = -1  # the place of rwkv-init.pth among the mini-epochs


def save_weights(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    flag: str = "--proj_dir",
    before_rename: Callable[[Path], None] | None = None,
    first: Sequence[str] = TRAINED,
) -> None:
    """Writes tensors as bfloat16, ordered, all or nothing: under a temporary name, flushed to disk, renamed.

    The temporary name does not end in .pth, so a scan for rwkv-*.pth never sees half a file. before_rename(temporary
    path) is called when the content is safe and not yet visible. Raises UserError when the file cannot be written;
    flag: the one that chooses the place, for this error. first: how a block begins (see `ordered`).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({IN_FILE.get(name, name): _plain(tensors[name]) for name in ordered(tensors, first)}, file)
            file.flush()
            os.fsync(file.fileno())
        if before_rename is not None:
            before_rename(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {ranks.describe(error)}; free some space or choose another {flag}") from error


def ordered(names: Iterable[str], first: Sequence[str] = TRAINED) -> list[str]:
    """A model's names as the official trainer writes them, or with another beginning of each block.

    A program that takes a layer's weights one after the other needs it: RWKV-LM's rwkv_v7_numpy.py.
    """
    blocks: dict[str, int] = {}

    def place(name: str) -> tuple[int, int]:
        block = match[0] if (match := re.match(r"blocks\.\d+\.", name)) else name
        part = re.sub(r"^att\.|\.(weight|bias)$", "", name.removeprefix(block))
        return blocks.setdefault(block, len(blocks)), first.index(part) if part in first else len(first)

    return sorted(names, key=place)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """bfloat16, on the CPU, owning exactly its own memory (torch.save writes whole storages)."""
    tensor = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by official name, memory-mapped, in the file's own dtype.

    Raises UserError when the file is missing, truncated, not a flat dict of floating-point tensors, or a toy that is no
    model of ours (models/rosa_toys.py).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} {'is a folder' if path.is_dir() else 'does not exist'}; give the path of a .pth file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # of any kind: torch's reader runs over whatever bytes a file holds as if they were a pickle's
        if isinstance(error, PermissionError):
            raise UserError(f"checkpoint {path} may not be read; change its permissions") from error
        if isinstance(error, UnicodeEncodeError):
            raise UserError(f"checkpoint {path}: PyTorch opens no file whose name, folders included, is not UTF-8; rename it") from error
        raise UserError(f"checkpoint {path} is truncated or not a PyTorch weights file; copy or download it again") from error
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"checkpoint {path} holds a {type(content).__name__}, not named weights; give a flat state dict as RWKV-LM saves it"
        )
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise UserError(f"checkpoint {path}: entry {name!r} is not a weight; give a flat state dict as RWKV-LM saves it")
    return by_usual_names({_unwrap(name): value for name, value in content.items()})


def _unwrap(name: str) -> str:
    while (wrapper := next((w for w in WRAPPERS if name.startswith(w)), None)) is not None:
        name = name.removeprefix(wrapper)
    return next((own for own, in_file in IN_FILE.items() if name == in_file), name)


@torch.no_grad()
def load_into(model: nn.Module, tensors: Mapping[str, torch.Tensor], partial: bool = False) -> list[str]:
    """Copies checkpoint tensors into the model, cast to its dtype; returns the names that kept their values.

    partial: names missing in the checkpoint keep their values; otherwise only block 0's unused v0, v1, v2 may be missing.
    Ones in front of a shape do not count. Raises UserError naming the first wrong shape, missing or unknown name; the
    model is unchanged then.
    """
    own = model.state_dict(keep_vars=True)
    if misfit := _misfit(own, tensors, partial):
        raise UserError("; ".join(misfit))
    for name, tensor in own.items():
        if name in tensors:
            tensor.copy_(tensors[name].reshape(tensor.shape))
    return [name for name in own if name not in tensors]


def _misfit(own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], partial: bool) -> tuple[str, str] | None:
    """The first thing that is wrong, and the cure in training."""
    for name, tensor in own.items():
        if name in tensors and _plain_shape(tensors[name]) != _plain_shape(tensor):
            what = f"the checkpoint's {name} has shape {list(tensors[name].shape)}, the model's has {list(tensor.shape)}"
            return what, "leave out --n_layer, --n_embd, --vocab_size and the other sizes to take them from the checkpoint"
    required = [name for name in own if name not in tensors and name not in UNUSED]
    if required and not partial:
        return f"the checkpoint lacks {required[0]} ({len(required)} missing in all)", "use --load_partial 1 to keep initial values there"
    for name in tensors:
        if name not in own:
            return f"the checkpoint's {name} is unknown to this model of {len(own)} tensors", "check --my_testing and --n_layer"
    return None


def _plain_shape(tensor: torch.Tensor) -> list[int]:
    """Without ones in front: some tools make [C] of the official [1, 1, C]."""
    return [*itertools.dropwhile(lambda size: size == 1, tensor.shape)]


def model_from(tensors: Mapping[str, torch.Tensor], device: torch.device | str, dtype: torch.dtype) -> LanguageModel:
    """The model whose weights these are, to be used as it is; UserError for tensors that do not make one.

    It is laid out without memory first: torch's own initial values, float32, would take seconds and twice the memory at large sizes.
    """
    with torch.device("meta"):
        model = build(read_config(tensors)).to(dtype)
    if misfit := _misfit(model.state_dict(), tensors, partial=False):
        raise UserError(f"{misfit[0]}: it is damaged, or of a model that is not known here; give another one")
    load_into(model.to_empty(device=device), tensors)
    return model.eval()


def newest_weights(proj_dir: str | Path, skip: Collection[Path] = ()) -> tuple[Path, int] | None:
    """The newest rwkv-{n}.pth of a run and its mini-epoch n, or rwkv-init.pth and -1, or None.

    As in the official scan, rwkv-final.pth does not count. skip: files to pass over.
    """
    found = []
    for path in Path(proj_dir).glob("rwkv-*.pth"):
        label = path.stem.removeprefix("rwkv-")
        if path not in skip and (label == "init" or label.isdecimal()):
            found.append((INIT if label == "init" else int(label), path))
    if not found:
        return None
    mini_epoch, path = max(found)
    return path, mini_epoch
