"""`python -m rwkvlm download --out data/minipile`: MiniPile, tokenised, 3 GB; MINIPILE_URL names a mirror."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.train import flag
from ..data.download import fetch, minipile
from .flags import parse_flags


@dataclass(frozen=True)
class Settings:
    """Download MiniPile (tokenised, 1498226207 tokens) to PREFIX.bin and PREFIX.idx; goes on where an earlier call stopped."""

    out: str = flag("data/minipile", "PREFIX")


def main(argv: list[str]) -> int:
    settings = parse_flags(Settings, argv, "python -m rwkvlm download")
    data = fetch(minipile(), settings.out)
    print(f"{settings.out}.bin/idx: {data.n_tokens} tokens, {data.n_docs} documents, {data.dtype.name}")
    return 0
