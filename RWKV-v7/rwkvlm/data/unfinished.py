"""Work of make_data.py that can be taken up again after a kill or on a full disk: the tokens so far, in a folder beside the output.

The folder is {prefix}.unfinished. Its progress.json says how far the work has come; it is replaced as a whole, after the
tokens that it counts are on the disk, and tokens that a killed run wrote behind these are cut off. The folder belongs to
one job (inputs with size and date, tokenizer, flags): another job begins anew.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ..config import UserError
from ..config.locks import try_lock
from .shuffle import LEAF, Documents, Pile

SAVE_EVERY = 10.0  # seconds
SAVED = "progress.json"
LISTED = 100  # bad inputs that are remembered by name


@dataclass
class Progress:
    """What has been tokenised: everything before byte (row) `at`, line `line`, of file number `file`.

    A document that comes in parts and has begun is counted apart until it is complete; `rest` are its last bytes, in hexadecimal, which
    have no tokens yet.
    """

    file: int = 0
    at: int = 0
    line: int = 1
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    skipped: int = 0
    first_skipped: list[str] = field(default_factory=list)
    complete: bool = False
    open_tokens: int = 0
    open_bytes: int = 0
    open_parts: int = 0
    open_blank: bool = True
    rest: str = ""


class Unfinished:
    """The work on one job in its folder, as a context manager. UserError where another process works in the folder.

    pile: the documents of `progress`; seen: which token ids occur in those that are complete, bool [vocab_size].

    Leaving the block removes the folder; a kill leaves it for the next run. With `kept` it also stays after Ctrl-C and,
    where something has been saved, after a full disk, bad input, or any error once all is tokenised.
    """

    def __init__(self, prefix: Path, job: dict, dtype: np.dtype, vocab_size: int, kept: bool = True) -> None:
        self.folder = prefix.with_name(prefix.name + ".unfinished")
        self.job, self._kept, self.dtype = job, kept, np.dtype(dtype)
        self.progress = Progress()
        self.seen, self._open_seen = (np.zeros(vocab_size, dtype=bool) for _ in range(2))
        self.pile = Pile(self.folder / "all", self.dtype, numbered=False, memory=LEAF)
        self._saver, self._saving, self._saved = ThreadPoolExecutor(1), Future(), time.monotonic()
        self._saving.set_result(None)

    def __enter__(self) -> Unfinished:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / "lock"
        self._lock = open(lock, "w")
        if not try_lock(self._lock):
            self._lock.close()
            raise UserError(f"another process works in {self.folder}; wait for it, or choose another --out")
        taken_up = {*self.pile.paths, self.folder / SAVED} if self._resume() else set()
        for path in set(self.folder.iterdir()) - {lock} - taken_up:
            path.unlink()
        self.pile.truncate(self.progress.documents, self.progress.tokens + self.progress.open_tokens)
        return self

    def _resume(self) -> bool:
        try:
            saved = json.loads((self.folder / SAVED).read_text())
            progress = Progress(**saved["progress"])
            seen, open_seen = (
                np.unpackbits(np.frombuffer(bytes.fromhex(ids), np.uint8))[: len(self.seen)].astype(bool) for ids in saved["seen"]
            )
            sizes = [path.stat().st_size for path in self.pile.paths]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if saved["job"] != self.job or sizes[0] < progress.tokens * self.dtype.itemsize or sizes[1] < progress.documents * 4:
            return False
        self.progress, self.seen, self._open_seen = progress, seen, open_seen
        # the document that was open then was bad and has been dropped: it is read again, from its beginning
        if sizes[0] < (progress.tokens + progress.open_tokens) * self.dtype.itemsize:
            progress.at, progress.line = 0, 1
            self._no_document()
        return True

    def add(self, ids: np.ndarray, sizes: np.ndarray, occurring: np.ndarray) -> None:
        """Append documents: ids [total], sizes [n] in tokens, which ids occur [vocab_size] bool."""
        self.seen |= occurring
        first = self.progress.documents
        numbers = np.arange(first, first + len(sizes))
        self.pile.append(Documents(ids.astype(self.dtype), sizes.astype(np.int32), numbers))  # a copy: ids lie in a larger buffer
        self.progress.documents += len(sizes)
        self.progress.tokens += len(ids)

    def add_part(self, ids: np.ndarray, occurring: np.ndarray, n_bytes: int, blank: bool, rest: bytes) -> None:
        """Append tokens of a document that goes on, from n_bytes of its text; `rest` is to be put before what follows."""
        done = self.progress
        self._open_seen |= occurring
        self.pile.append(Documents(ids.astype(self.dtype), np.zeros(0, np.int32), np.zeros(0, np.int64)))
        done.open_tokens, done.open_bytes, done.open_parts = done.open_tokens + len(ids), done.open_bytes + n_bytes, done.open_parts + 1
        done.open_blank, done.rest = done.open_blank and blank, rest.hex()

    def end_document(self) -> None:
        """The document whose parts have been added is complete."""
        done = self.progress
        self.pile.append(Documents(np.zeros(0, self.dtype), np.array([done.open_tokens], np.int32), np.array([done.documents])))
        done.documents, done.tokens, done.text_bytes = done.documents + 1, done.tokens + done.open_tokens, done.text_bytes + done.open_bytes
        self.seen |= self._open_seen
        self._no_document()

    def drop_document(self) -> None:
        """Forget the parts of a document that turned out to be bad."""
        self.pile.flush()
        self.pile.truncate(self.progress.documents, self.progress.tokens)
        self._no_document()

    def _no_document(self) -> None:
        done = self.progress
        done.open_tokens = done.open_bytes = done.open_parts = 0
        done.open_blank, done.rest = True, ""
        self._open_seen[:] = False

    def save(self) -> None:
        """Make what has been added survive: from time to time, in the background."""
        if time.monotonic() - self._saved < SAVE_EVERY or not self._saving.done():
            return
        self._saving.result()
        self._saved = time.monotonic()
        self.pile.flush()
        seen = [np.packbits(ids).tobytes().hex() for ids in (self.seen, self._open_seen)]
        text = json.dumps({"job": self.job, "progress": asdict(self.progress), "seen": seen})
        self._saving = self._saver.submit(self._write, text)

    def saved(self) -> bool:
        """Whether there is something to take up after an error."""
        self._saving.result()
        return self._kept and (self.folder / SAVED).exists()

    def _write(self, text: str) -> None:
        for path in self.pile.paths:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        new = self.folder / "progress.new"
        with open(new, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.folder / SAVED)

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        self._saver.shutdown()
        of_use = kind is not None and (self.progress.complete or issubclass(kind, OSError | UserError)) and (self.folder / SAVED).exists()
        with suppress(OSError):
            if not (self._kept and (of_use or kind is KeyboardInterrupt)):
                lock = self.folder / "lock"
                for path in (*(set(self.folder.iterdir()) - {lock}), lock):  # it last: until then nobody else begins here
                    path.unlink()
        self._lock.close()
        with suppress(OSError):
            self.folder.rmdir()  # unless something is kept
