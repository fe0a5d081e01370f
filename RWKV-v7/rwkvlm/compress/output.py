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
    """UserError where nothing can be written to `out`, `model` would be lost, or another tokenizer than its own would be found there."""
    if out.exists() and model.exists() and os.path.samefile(model, out):
        raise UserError(f"--out {out} is the model itself, which would be lost; choose another name")
    check_file(out, "--out")
    if out.exists() and not out.is_file():
        raise UserError(f"--out {out} is no file; choose another name")
    _missing_tokenizer(model, out)


def save_output(model: Path, out: Path, tensors: Mapping[str, torch.Tensor], **how) -> None:
    """Writes what was made from `model`, and beside it the tokenizer.json that lies beside `model`. how: as for save_weights."""
    if text := _missing_tokenizer(model, out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out.with_name(TOKENIZER), text)
        except OSError as error:
            raise UserError(f"cannot write {out.with_name(TOKENIZER)}: {error.strerror}; choose another --out") from None
    save_weights(out, tensors, "--out", **how)


def _missing_tokenizer(model: Path, out: Path) -> str:
    """What has to be put beside `out`, that it is read with the tokenizer of `model`; "" where it is so already."""
    own, there = _text(tokenizer_of(model)), _text(tokenizer_of(out))
    if there and there != own:
        raise UserError(f"--out {out} would be read with {tokenizer_of(out)}, the tokenizer of other models; choose another folder")
    return "" if there else own


def _text(tokenizer: str) -> str:
    try:
        return "" if tokenizer == "world" else Path(tokenizer).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{tokenizer} cannot be read: {getattr(error, 'strerror', None) or error}; mend it, or move it away") from None
