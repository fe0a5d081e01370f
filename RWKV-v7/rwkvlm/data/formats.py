"""Training data that are not binidx: --data_type utf-8 (a text, its characters are the vocabulary), bytes (any file), numpy (.npy).

For the first two `tokenizer_json` describes the vocabulary to Hugging Face's `tokenizers`, and so to `generate --tokenizer`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..config import UserError
from .binidx import BinIdx, how_to_make
from .documents import kind
from .tokens import Tokens

READ = 1 << 22  # bytes of a text decoded together
CODE_POINTS = 0x110000


class NumpyTokens(Tokens):
    """A .npy file of one row of integers, memory-mapped."""

    def __init__(self, path: str | Path) -> None:
        self.prefix, self.file = str(path), _existing(path)
        try:
            self.tokens = np.load(self.file, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # of any kind: to numpy whatever bytes the header holds are a Python expression
            raise UserError(
                f"data file {path} is not a .npy file that can be read: {' '.join(str(error).split())}; save it again with numpy.save"
            ) from None
        if not isinstance(self.tokens, np.memmap) or self.tokens.dtype.kind not in "iu" or self.tokens.ndim != 1 or not len(self.tokens):
            what = f"{self.tokens.dtype} {list(self.tokens.shape)}" if isinstance(self.tokens, np.ndarray) else "an archive"
            raise UserError(
                f"data file {path} holds {what}; --data_type numpy takes one row of integers, "
                "for example numpy.save(path, tokens.astype(numpy.uint16))"
            )
        self.tokens = self.tokens.view(np.ndarray)


class ByteTokens(Tokens):
    """Any file: its bytes are the tokens."""

    vocab_size = 256

    def __init__(self, path: str | Path) -> None:
        self.prefix, self.file = str(path), _existing(path)
        self.tokens = np.memmap(self.file, mode="r", dtype=np.uint8).view(np.ndarray)

    def tokenizer_json(self) -> str:
        """Byte pairs without any pair. A byte is written as one of 256 printable characters, as in GPT-2's vocabulary."""
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in printable]
        names = {b: chr(b) for b in printable} | {b: chr(256 + k) for k, b in enumerate(others)}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        model = {"type": "BPE", "dropout": None, "unk_token": None, "vocab": {names[b]: b for b in range(256)}, "merges": []}
        return _tokenizer_json(model, level, level)


class TextTokens(Tokens):
    """A UTF-8 text: tokens 1, 2, ... are its characters in Unicode order.

    Token 0 ends a document, as everywhere, and never occurs. The tokens are in memory, 2 bytes a character (4 beyond
    65535 different ones). alphabet: code points of another text, which must suffice.
    """

    def __init__(self, path: str | Path, alphabet: np.ndarray | None = None) -> None:
        self.prefix, self.file = str(path), _existing(path)
        if (suffix := kind(self.file)) in (".jsonl", ".parquet"):
            command, prefix = how_to_make(self.file)
            raise UserError(
                f"data file {path}: --data_type utf-8 would train on the characters of a {suffix} as it is, not on the texts in it; "
                f"{command} makes tokens of these: then give --data_file {prefix} with --data_type binidx"
            )
        counts = np.zeros(CODE_POINTS, dtype=np.int64)
        for points in self._code_points():
            counts += np.bincount(points, minlength=CODE_POINTS)
        used = np.flatnonzero(counts)
        if alphabet is not None and len(unknown := np.setdiff1d(used, alphabet)):
            raise UserError(
                f"data file {path} has the character {chr(unknown[0])!r} (U+{unknown[0]:04X}), "
                "which the first text lacks; take it out, or begin with the text that has all"
            )
        self.alphabet = used if alphabet is None else alphabet
        self.vocab_size = 1 + len(self.alphabet)
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.int32
        ids = np.zeros(CODE_POINTS, dtype=dtype)
        ids[self.alphabet] = np.arange(1, self.vocab_size)
        self.tokens, at = np.empty(int(counts.sum()), dtype=dtype), 0
        for points in self._code_points():
            self.tokens[at : at + len(points)] = ids[points]
            at += len(points)
        self.tokens.flags.writeable = False

    def like(self, prefix: str) -> Tokens:
        return TextTokens(prefix, self.alphabet)

    def _code_points(self) -> Iterator[np.ndarray]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        with open(self.file, "rb") as file:
            done, block = 0, b"x"
            while block:
                block = file.read(READ)
                try:
                    text = decoder.decode(block, final=not block)
                except UnicodeDecodeError as error:
                    at = done + len(block) - len(error.object) + error.start
                    raise UserError(
                        f"data file {self.file}: invalid UTF-8 at byte {at}; convert the text, or use --data_type bytes"
                    ) from None
                done += len(block)
                yield np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)

    def tokenizer_json(self) -> str:
        vocab = {"": 0} | {chr(point): k for k, point in enumerate(self.alphabet, 1)}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": ""}  # a character that it lacks is token 0
        split = {"type": "Split", "pattern": {"Regex": "(?m)."}, "behavior": "Isolated", "invert": False}
        return _tokenizer_json(model, split, {"type": "Fuse"})


FORMATS: dict[str, type[Tokens]] = {"binidx": BinIdx, "numpy": NumpyTokens, "utf-8": TextTokens, "bytes": ByteTokens}


def _existing(path: str | Path) -> Path:
    try:
        if Path(path).stat().st_size:
            open(path, "rb").close()  # a folder, or a file of someone else's
            return Path(path)
    except OSError as error:
        raise UserError(
            f"data file {path} cannot be read: {error.strerror or error}; --data_type utf-8, bytes and numpy take the whole name of a file"
        ) from None
    raise UserError(f"data file {path} is empty")


def _tokenizer_json(model: dict, pre_tokenizer: dict, decoder: dict) -> str:
    whole = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(whole, indent=1)
