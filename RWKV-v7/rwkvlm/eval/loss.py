"""How well a model predicts a text: loss a token, perplexity, bits a byte, and how the loss falls with the tokens read before."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from ..config import UserError
from ..data.tokenizer import END_OF_DOCUMENT
from ..infer.engine import Engine
from .score import scores
from .text import Document, bytes_of, documents

AHEAD = 64  # batches that are put in order of length together
AHEAD_TOKENS = 1 << 22  # or fewer batches, with about so many tokens


def text_loss(engine: Engine, source: str, ctx_len: int = 0, batch: int = 8, limit: int = 0, text_key: str = "text") -> dict[str, Any]:
    """The figures of a text or a .bin/.idx pair, for a table or JSON: the same for any batch, but for rounding.

    ctx_len 0: each document by itself from its beginning, after a token 0; all of its tokens are predicted, the 0 that
    ends it is not. Else what training does: the documents one after the other, each ended by its 0, cut into windows of
    ctx_len tokens that know nothing of the tokens before. limit: so many documents; 0: all. UserError where nothing is
    left to predict.
    """
    for name, value, least in (("ctx_len", ctx_len, 0), ("batch", batch, 1), ("limit", limit, 0)):
        if value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    count = _Count()
    read = islice(documents(engine, source, text_key), limit or None)
    rows = _windows(read, ctx_len, count, engine) if ctx_len else _whole(read, count)
    for side_by_side in _batches(rows, batch):
        for part in scores(engine, side_by_side, [1] * len(side_by_side)):
            count.add(part.place, part.nats)
    if not count.tokens:
        raise UserError(f"{source} has no tokens to predict; give a longer text")
    return {"data": source, "ctx_len": ctx_len, **count.report()}


@dataclass
class _Count:
    documents: int = 0
    n_bytes: int | None = 0
    tokens: int = 0
    nats: float = 0.0
    by_place: np.ndarray = field(default_factory=lambda: np.zeros((2, 64)))  # nats and tokens by powers of two

    def document(self, document: Document) -> None:
        self.documents += 1
        self.n_bytes = None if self.n_bytes is None or document.n_bytes is None else self.n_bytes + document.n_bytes

    def add(self, place: np.ndarray, nats: np.ndarray) -> None:
        self.tokens += len(nats)
        self.nats += float(nats.sum())
        power = np.frexp(place)[1] - 1
        self.by_place += [np.bincount(power, nats, 64), np.bincount(power, minlength=64)]

    def report(self) -> dict[str, Any]:
        loss, (nats, tokens) = self.nats / self.tokens, self.by_place
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.n_bytes,
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "bits_per_byte": self.nats / math.log(2) / self.n_bytes if self.n_bytes else None,
            "loss_by_tokens_read": [
                {"from": 1 << k, "to": (2 << k) - 1, "tokens": int(tokens[k]), "loss": nats[k] / tokens[k]}
                for k in np.flatnonzero(tokens).tolist()
            ],
        }


def _whole(read: Iterator[Document], count: _Count) -> Iterator[np.ndarray]:
    for document in read:
        count.document(document)
        tokens = document.tokens
        tokens = tokens[:-1] if len(tokens) and tokens[-1] == END_OF_DOCUMENT else tokens
        if len(tokens):
            yield np.concatenate([np.array([END_OF_DOCUMENT], tokens.dtype), tokens])


def _windows(read: Iterator[Document], ctx_len: int, count: _Count, engine: Engine) -> Iterator[np.ndarray]:
    """Of ctx_len tokens that are predicted, each after the last token of the one before; the last one may be shorter."""
    left: np.ndarray | None = None
    for document in read:
        count.document(document)
        if not len(document.tokens):
            continue
        if left is None and count.n_bytes is not None:
            count.n_bytes -= bytes_of(engine, document.tokens[:1])  # the very first token is not predicted
        left = document.tokens if left is None else np.concatenate([left, document.tokens])
        whole = (len(left) - 1) // ctx_len
        for k in range(whole):
            yield left[k * ctx_len : (k + 1) * ctx_len + 1]
        left = left[whole * ctx_len :]
    if left is not None and len(left) > 1:
        yield left


def _batches(rows: Iterator[np.ndarray], batch: int) -> Iterator[list[np.ndarray]]:
    """Rows of about the same length side by side; of a bounded number at a time, so that the data may have any size."""
    ahead: list[np.ndarray] = []
    tokens = 0
    for row in rows:
        ahead.append(row)
        tokens += len(row)
        if len(ahead) == AHEAD * batch or tokens >= AHEAD_TOKENS:
            yield from _sorted(ahead, batch)
            ahead, tokens = [], 0
    yield from _sorted(ahead, batch)


def _sorted(rows: list[np.ndarray], batch: int) -> Iterator[list[np.ndarray]]:
    rows = sorted(rows, key=len)
    for first in range(0, len(rows), batch):
        yield rows[first : first + batch]
