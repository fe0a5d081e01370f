"""What a model is measured on: texts and token files, a document at a time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config import UserError
from ..data.binidx import BinIdx
from ..data.documents import KINDS, Block, expand, kind, parse, read_blocks, where
from ..data.tokenizer import END_OF_DOCUMENT, PART
from ..infer.engine import Engine


class Document(NamedTuple):
    """A document to be measured.

    tokens: [n], as they are in training data: with a last 0, but for files of tokens that have none.
    n_bytes: of its text; None where nobody knows.
    """

    tokens: np.ndarray
    n_bytes: int | None


def documents(engine: Engine, source: str, text_key: str = "text") -> Iterator[Document]:
    """Those of a .txt (one document), .jsonl or .parquet, of JSON lines from standard input ("-"), or of a .bin/.idx pair.

    UserError names the file and what is wrong in it, tokens outside the vocabulary too.
    """
    found = _of_text(engine, source, text_key) if kind(Path(source)) in KINDS else _of_tokens(engine, source)
    vocab_size = engine.model.config.vocab_size
    for document in found:
        if len(bad := document.tokens[(document.tokens < 0) | (document.tokens >= vocab_size)]):
            raise UserError(
                f"{source} has token {bad[0]}, but the model's vocabulary has {vocab_size}; use the tokenizer it was trained with"
            )
        yield document


def texts(source: str, text_key: str, whole: int = 0) -> Iterator[tuple[bytes, Block, int]]:
    """Each text with its block, and its line in the file. UserError for the first that is bad.

    A .txt comes in parts, of which all but the last go on (Block.goes_on).
    """
    for path in expand([source]):
        for block in read_blocks(path, text_key, whole=whole):
            parsed = parse(block, text_key)
            if parsed.bad:
                bad = str(parsed.bad[0])
                raise UserError(bad if bad.endswith("--text_key") else f"{bad}; correct it or take it out: nothing is passed over here")
            for text, line in zip(parsed.texts, parsed.lines):
                yield text, block, int(line)


def _of_text(engine: Engine, source: str, text_key: str) -> Iterator[Document]:
    tokenizer, dtype = engine.tokenizer, np.min_scalar_type(engine.tokenizer.vocab_size - 1)
    parts, rest, n_bytes, kept = [], b"", 0, True
    for text, block, line in texts(source, text_key, tokenizer.largest_text):
        n_bytes += len(text)
        rest += text
        try:
            ids = np.array(tokenizer.encode(rest), dtype=dtype)
        except UserError as error:
            raise UserError(f"{where(block.file, line)}: {error}") from None
        # characters that a vocabulary lacks; no error, since some tokenizers normalise texts
        if kept and not (kept := tokenizer.comes_back(rest, ids)):
            print(
                f"{where(block.file, line)}: the text does not come back from its tokens; "
                "the figures are of what the tokenizer knows of it",
                file=sys.stderr,
                flush=True,
            )
        if block.goes_on:
            n, settled = tokenizer.settled(ids, len(rest))
            parts, rest = [*parts, ids[:n]], rest[settled:]
        else:
            yield Document(np.concatenate([*parts, ids, np.array([END_OF_DOCUMENT], dtype)]), n_bytes)
            parts, rest, n_bytes = [], b"", 0


def _of_tokens(engine: Engine, prefix: str) -> Iterator[Document]:
    data = BinIdx(prefix)
    known = engine.tokenizer.vocab_size <= engine.model.config.vocab_size
    for i in range(data.n_docs):
        tokens = data.doc(i)
        yield Document(tokens, bytes_of(engine, tokens) if known else None)


def bytes_of(engine: Engine, tokens: np.ndarray) -> int:
    """How many bytes the text of the tokens has."""
    tokens = tokens[tokens != END_OF_DOCUMENT]
    return sum(len(engine.tokenizer.decode_bytes(tokens[first : first + PART])) for first in range(0, len(tokens), PART))
