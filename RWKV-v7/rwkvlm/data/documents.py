"""Documents out of text files: .jsonl and .txt, either also .gz. Bad ones are yielded too, with file, line and cause."""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import orjson

from ..config import UserError

LATER = {
    ".zst": "unpack it first: zstd -d",
    ".parquet": "convert it to .jsonl first",
    ".xz": "unpack it first: unxz",
    ".bz2": "unpack it first: bunzip2",
    ".zip": "unpack it first: unzip",
}
LARGEST_TXT = (1 << 31) - 2  # bytes: the index counts a document's tokens in 31 bits


@dataclass(frozen=True)
class Document:
    text: str
    file: Path
    line: int  # 1 for a .txt, which is one document

    def where(self) -> str:
        return f"{self.file}, line {self.line}"


@dataclass(frozen=True)
class BadInput:
    file: Path
    line: int  # 0: the file as a whole
    cause: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.cause}" if self.line else f"{self.file}: {self.cause}"


def expand(inputs: Sequence[str]) -> list[Path]:
    """The files that names and glob patterns mean, in the order given, each pattern sorted. UserError for one that means none."""
    files: list[Path] = []
    for name in inputs:
        if Path(name).exists():
            found = [Path(name)]
        elif found := [Path(match) for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]:
            pass
        else:
            raise UserError(f"input {name} does not exist")
        files += found
    for path in files:
        if path.is_dir():
            raise UserError(f"input {path} is a folder; name files, for example '{path}/*.jsonl'")
        if path.suffix in LATER:
            raise UserError(f"input {path}: {path.suffix} is not read yet; {LATER[path.suffix]}")
        if kind(path) not in (".jsonl", ".txt"):
            raise UserError(f"input {path}: its kind is not known; use .jsonl, .jsonl.gz, .txt or .txt.gz")
    return files


def kind(path: Path) -> str:
    """The suffix that says what is inside, without .gz."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def read_documents(path: Path, text_key: str = "text") -> Iterator[Document | BadInput]:
    """Every document of a file in order; of a .jsonl the values of `text_key`, blank lines passed over."""
    number, empty = 0, True
    try:
        with _open(path) as file:
            if kind(path) == ".txt":
                empty = yield from _whole_text(path, file)
            else:
                for number, line in enumerate(file, 1):
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    if line := line.strip():
                        empty = False
                        yield _from_json(path, number, line, text_key)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield BadInput(path, number + 1, f"the .gz file is damaged here: {error}")
        return
    except OSError as error:
        raise UserError(f"input {path} cannot be read: {error.strerror or error}") from None
    if empty:
        yield BadInput(path, 0, "the file is empty")


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb", buffering=1 << 20)


def _whole_text(path: Path, file: IO[bytes]) -> Iterator[Document | BadInput]:
    """Yields the file as one document; the generator's value is whether it was empty."""
    data = file.read(LARGEST_TXT + 1).removeprefix(b"\xef\xbb\xbf")
    if len(data) > LARGEST_TXT:
        yield BadInput(path, 0, "a .txt is one document, and this one is larger than 2 GiB; split it")
        return False
    if not data.strip():
        return True
    try:
        yield Document(data.decode("utf-8"), path, 1)
    except UnicodeDecodeError as error:
        yield BadInput(path, data.count(b"\n", 0, error.start) + 1, f"invalid UTF-8 at byte {error.start} of the file")
    return False


def _from_json(path: Path, number: int, line: bytes, text_key: str) -> Document | BadInput:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        # Python's json decides: it accepts NaN and infinities, as the official tool does, and says better what is wrong
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return BadInput(path, number, f"invalid UTF-8 at byte {error.start} of the line")
        except json.JSONDecodeError as error:
            return BadInput(path, number, f"not JSON: {error.msg} at column {error.colno}")
        except RecursionError:
            return BadInput(path, number, "not JSON that can be read: nested too deeply")
    if not isinstance(record, dict):
        return BadInput(path, number, f"a JSON {type(record).__name__}, not an object with the key {text_key!r}")
    if text_key not in record:
        return BadInput(path, number, f"no key {text_key!r} (keys: {', '.join(list(record)[:5]) or 'none'}); see --text_key")
    text = record[text_key]
    if not isinstance(text, str):
        return BadInput(path, number, f"the value of {text_key!r} is {type(text).__name__}, not text")
    return Document(text, path, number)
