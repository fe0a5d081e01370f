"""LAMBADA: the last word of a passage, which people guess only when they have read all of it (arXiv 1606.06031).

The protocol is that of RWKV's evaluations and of the data set of OpenAI that they use: all words but the last are the
context, after a token 0; the space before the last word belongs to it. Perplexity is that of the words, not of their
tokens; a word is right if each of its tokens is the likeliest.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

from ..config import UserError
from ..data.documents import where
from ..data.tokenizer import END_OF_DOCUMENT
from ..infer.engine import Engine
from .score import continuations
from .text import texts


def lambada(engine: Engine, source: str, batch: int = 8, limit: int = 0, text_key: str = "text") -> dict[str, Any]:
    """accuracy and perplexity over the lines of a .jsonl. UserError names the first line that is no passage."""
    for name, value, least in (("batch", batch, 1), ("limit", limit, 0)):
        if value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    pairs = []
    for text, block, line in islice(texts(source, text_key), limit or None):
        context, space, word = text.rpartition(b" ")
        if not context or not word:
            raise UserError(f"{where(block.file, line)}: the text has no last word behind a space; LAMBADA's lines have")
        pairs.append(([END_OF_DOCUMENT, *engine.encode(context)], engine.encode(space + word)))
    if not pairs:
        raise UserError(f"{source} holds no passages")
    found = continuations(engine, pairs, batch)
    nats = -sum(logarithm for logarithm, _ in found) / len(found)
    return {
        "data": source,
        "passages": len(found),
        "accuracy": sum(right for _, right in found) / len(found),
        "perplexity": math.exp(min(nats, 700.0)),
    }
