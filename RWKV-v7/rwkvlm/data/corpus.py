"""The demo corpus: real text that is on every machine that can run this package.

Python's standard library without its tests and its tables of encodings (80 near copies of one file, which would flatter a
held-out loss), then sources and documentation of the installed packages that the requirements name,
each in sorted order, up to a size. The same installation gives the same bytes; their SHA-256 names them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import orjson

from ..config import UserError

PACKAGES = ("deepspeed", "lightning_fabric", "numpy", "pytorch_lightning", "torch")
SUFFIXES = {".py", ".md", ".rst", ".txt"}
LEFT_OUT = {"__pycache__", "dist-packages", "encodings", "idle_test", "site-packages", "test", "testing", "tests"}


@dataclass(frozen=True)
class Corpus:
    documents: int
    text_bytes: int
    sha256: str  # of the file


def _files(root: Path) -> Iterator[Path]:
    """Texts below a folder, in the order of their relative path."""
    found = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*") if path.suffix in SUFFIXES]
    for name, path in sorted(found):
        if not LEFT_OUT & set(name.split("/")[:-1]) and path.is_file():
            yield path


def _texts() -> Iterator[str]:
    """Every distinct text in order; files that are not UTF-8 or hold nothing are left out."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        roots += [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    seen = set()
    for root in roots:
        for path in _files(root):
            try:
                text = path.read_bytes().decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.sha256(text.encode("utf-8")).digest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                yield text


def write_demo_corpus(path: str | Path, max_bytes: int = 30_000_000) -> Corpus:
    """Write the corpus as {"text": ...} lines, up to `max_bytes` of text; atomic. UserError if nothing is found or it cannot be written."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _write(path, partial, max_bytes)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another --out") from None


def _write(path: Path, partial: Path, max_bytes: int) -> Corpus:
    documents, text_bytes, digest = 0, 0, hashlib.sha256()
    with open(partial, "wb") as file:
        for text in _texts():
            size = len(text.encode("utf-8"))
            if text_bytes + size > max_bytes:
                break
            line = orjson.dumps({"text": text}, option=orjson.OPT_APPEND_NEWLINE)
            file.write(line)
            digest.update(line)
            documents, text_bytes = documents + 1, text_bytes + size
    if not documents:
        partial.unlink()
        raise UserError(
            f"no text for the demo corpus below {max_bytes} bytes in {sysconfig.get_paths()['stdlib']}; give data of your own (DATA=PREFIX)"
        )
    partial.replace(path)
    return Corpus(documents, text_bytes, digest.hexdigest())
