"""The texts in a column of a .parquet, read by pyarrow in a process of its own: some damaged files abort the process that reads them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROWS = 1024  # at most, together


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of the column.

    first: the number of the first one, from 0; texts: UTF-8 that nobody has checked, or None; part: of the file's rows,
    those before the end of these.
    """

    first: int
    texts: list[bytes | None]
    part: float


@dataclass(frozen=True)
class Damage:
    """Why nothing can be read from this row on, counted from 0; row -1: the file as a whole."""

    row: int
    cause: str


def read_rows(path: Path, text_key: str, start: int, size: int) -> Iterator[Rows | Damage]:
    """The column's rows from `start` on, about `size` bytes at a time. OSError where the file cannot be opened."""
    with open(path, "rb"):
        pass
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, path, text_key, start, size), daemon=True)
    process.start()
    sender.close()
    row = start
    try:
        while (item := receiver.recv()) is not None:
            yield item
            row = item.first + len(item.texts) if isinstance(item, Rows) else row
    except (EOFError, OSError):  # OSError: it died in the middle of sending
        process.join()
        how = signal.Signals(-process.exitcode).name if process.exitcode < 0 else f"exit code {process.exitcode}"
        yield Damage(row if row else -1, f"the reader of .parquet files fails at it ({how}); the file is damaged, or memory is short")
    finally:
        receiver.close()
        process.kill()
        process.join()


def _send(connection: Connection, path: Path, text_key: str, start: int, size: int) -> None:
    """What the process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent ends this one
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the parent says in one line that it crashed
    for item in _read(path, text_key, start, size):
        connection.send(item)
    connection.send(None)


def _read(path: Path, text_key: str, start: int, size: int) -> Iterator[Rows | Damage]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        # checksums of pages are looked at where the file has them, and pages are read one by one
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=size, page_checksum_verification=True) as file:
            if cause := _why_no_text(file.schema_arrow, text_key):
                yield Damage(-1, cause)
                return
            n_rows = file.metadata.num_rows
            for batch in file.iter_batches(_rows_together(file.metadata, text_key, size), columns=[text_key], use_threads=False):
                first, row = row, row + len(batch)
                if row > start:
                    begin = max(first, start)
                    column = batch.column(batch.schema.get_field_index(text_key))[begin - first :]
                    yield Rows(begin, column.cast(pyarrow.large_string()).cast(pyarrow.large_binary()).to_pylist(), row / max(1, n_rows))
            if row == 0:
                yield Damage(-1, "the file is empty")
            elif row != n_rows:
                yield Damage(row, f"the .parquet file ends here, but says that it has {n_rows} rows")
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:  # OSError is pyarrow's for damaged pages
        cause = " ".join(str(error).split())[:200]
        yield Damage(row if row else -1, f"not a .parquet file that can be read{' from here on' if row else ''}: {cause}")


def _why_no_text(schema: Any, text_key: str) -> str:
    """What is wrong with the column of this name, if anything."""
    from pyarrow import types

    if not (found := schema.get_all_field_indices(text_key)):
        return f"no column {text_key!r} (columns: {', '.join(schema.names[:5]) or 'none'}); see --text_key"
    if len(found) > 1:
        return f"{len(found)} columns are called {text_key!r}"
    kind = schema.field(found[0]).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        return f"the column {text_key!r} has the type {' '.join(str(kind).split())[:80]}, not string; see --text_key"
    return ""


def _rows_together(metadata: Any, text_key: str, size: int) -> int:
    """So many rows, of the row group that has the longest ones, have about `size` bytes."""
    most = 1
    for group in (metadata.row_group(k) for k in range(metadata.num_row_groups)):
        n_bytes = sum(
            c.total_uncompressed_size for c in (group.column(j) for j in range(group.num_columns)) if c.path_in_schema == text_key
        )
        most = max(most, n_bytes // max(1, group.num_rows))
    return min(ROWS, max(1, size // most))
