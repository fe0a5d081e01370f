"""`python -m rwkvlm demo_corpus --out data/demo.jsonl`: the demo corpus, from texts that this machine has."""

from __future__ import annotations

from dataclasses import dataclass

from ..config.train import flag
from ..data.corpus import write_demo_corpus
from .flags import parse_flags


@dataclass(frozen=True)
class Settings:
    """Write the demo corpus: Python's standard library, then installed packages."""

    out: str = flag("data/demo.jsonl", "file to write")
    max_bytes: int = flag(30_000_000, "bytes of text at most")


def main(argv: list[str]) -> int:
    settings = parse_flags(Settings, argv, "python -m rwkvlm demo_corpus")
    made = write_demo_corpus(settings.out, settings.max_bytes)
    print(f"{settings.out}: {made.text_bytes} bytes of text in {made.documents} documents, sha256 {made.sha256}")
    return 0
