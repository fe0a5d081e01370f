"""The weight file that is made from another one: its place is checked before the work, and the tokenizer goes with it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ..checkpoint.place import check_file, write_atomically
from ..checkpoint.pth import save_weights
from ..config import UserError
from ..data.tokenizer import TOKENIZER, tokenizer_of


def check_output(model: Path, out: Path) -> None:
    """UserError where `out` cannot be written, `model` would be lost, or a model there would be read with the tokenizer of others."""
    if out.exists() and model.exists() and os.path.samefile(model, out):
        raise UserError(f"--out {out} is the model itself, which would be lost; choose another name")
    check_file(out, "--out")
    if out.exists() and not out.is_file():
        raise UserError(f"--out {out} is no file; choose another name")
    if model.exists():
        _missing_tokenizer(model, out)


def save_output(model: Path, out: Path, tensors: Mapping[str, torch.Tensor], **how) -> None:
    """Writes what was made from `model`, and beside it the tokenizer.json that lies beside `model`. how: as for save_weights."""
    text = _missing_tokenizer(model, out)

    def before_rename(_: Path) -> None:
        if text:
            write_atomically(out.with_name(TOKENIZER), text)

    save_weights(out, tensors, "--out", before_rename, **how)


def _missing_tokenizer(model: Path, out: Path) -> str:
    """What has to be put beside `out`, that it is read with the tokenizer of `model`; "" where it is so already."""
    beside = out.with_name(TOKENIZER)  # not where a link leads, which is replaced
    own, there = _text(tokenizer_of(model)), _text(str(beside) if beside.is_file() else "world")
    if there and there != own:
        raise UserError(f"--out {out} would be read with {beside}, the tokenizer of other models; choose another folder")
    if own and not there and (others := sorted({*out.parent.glob("*.pth")} - {out})):
        raise UserError(
            f"--out {out} needs {tokenizer_of(model)} beside it, with which {others[0]} would be read too; choose another folder"
        )
    return "" if there else own


def _text(tokenizer: str) -> str:
    try:
        return "" if tokenizer == "world" else Path(tokenizer).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{tokenizer} cannot be read: {getattr(error, 'strerror', None) or error}; mend it, or move it away") from None
