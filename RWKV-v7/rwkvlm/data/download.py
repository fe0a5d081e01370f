"""Token files from the network: resumed after every interruption, and put in place only when they are what they should be."""

from __future__ import annotations

import http.client
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..config import UserError, env
from ..config.volume import volume
from .binidx import BinIdx, Index, bin_path, check_prefix, check_room, idx_path

TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 8  # in a row without a new byte
PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before the second attempt, doubled for each further one; at most
SAY_EVERY = 10.0  # seconds
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
# what a connection raises; the disk, which is never asked in the same place, raises OSError as well
NETWORK = (OSError, http.client.HTTPException)


@dataclass(frozen=True)
class Remote:
    """{url}/{name}.idx and {url}/{name}.bin, which together hold n_tokens tokens below vocab_size; n_docs 0: not known."""

    name: str
    url: str
    n_tokens: int
    vocab_size: int = 65536
    n_docs: int = 0


# Source: RWKV-LM, RWKV-v7/train_temp/demo-training-prepare.sh; the World tokenizer gives ids up to 65529
MINIPILE = Remote(
    "minipile", "https://huggingface.co/datasets/BlinkDL/minipile-tokenized/resolve/main/rwkv_vocab_v20230424", 1498226207, 65530
)
# Source: demo-training-prepare-v7-pile.sh there; an index of 4212099722 bytes is 42 + 20 a document. It is not offered for download.
PILE = Remote("pile_20B_tokenizer_text_document", "", 332115325534, 50304, 210604984)
KNOWN = {"minipile": MINIPILE, "pile": PILE}


def minipile() -> Remote:
    """MiniPile from the official place, or from the mirror that MINIPILE_URL names."""
    return replace(MINIPILE, url=env.minipile_url().rstrip("/") or MINIPILE.url)


def fetch(remote: Remote, prefix: str | Path) -> BinIdx:
    """{prefix}.bin/.idx, downloaded unless they are there, checked in size, index and number of tokens.

    Until all is checked, every token included, the files rest in the folder {prefix}.download, from where the next call goes on.
    UserError when the server does not deliver, or delivers something else, which is removed.
    """
    check_prefix(prefix)
    prefix = Path(prefix)
    if idx_path(prefix).exists() and bin_path(prefix).exists():
        try:
            data = BinIdx(prefix)
            _check_count(data.n_tokens, remote)
        except UserError as error:
            raise UserError(f"{error}; to download it again, remove {prefix}.bin and {prefix}.idx") from None
        return data
    folder = prefix.with_name(prefix.name + ".download")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        here = folder / remote.name
        download(f"{remote.url}/{remote.name}.idx", idx_path(here), None)
        with _removed_if_wrong(idx_path(here), remote):
            index = Index(idx_path(here))
            _check_count(index.n_bytes // index.dtype.itemsize, remote)
        download(f"{remote.url}/{remote.name}.bin", bin_path(here), index.n_bytes)
        _say(f"checking {bin_path(here)}")
        with _removed_if_wrong(bin_path(here), remote):
            BinIdx(here).check_token_range(remote.vocab_size, index.n_bytes)
        bin_path(here).replace(bin_path(prefix))
        idx_path(here).replace(idx_path(prefix))
        shutil.rmtree(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; choose another place or free some space"
        ) from None
    return BinIdx(prefix)


@contextmanager
def _removed_if_wrong(path: Path, remote: Remote) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        path.unlink()
        raise UserError(
            f"{remote.url} does not hold {remote.name}: {error}; it was removed: try again, or another mirror (MINIPILE_URL)"
        ) from None


def check_is(data: BinIdx, remote: Remote) -> None:
    """UserError when the pair has other numbers of tokens and documents than the data set. Its tokens are not looked at."""
    try:
        _check_count(data.n_tokens, remote)
        if remote.n_docs and data.n_docs != remote.n_docs:
            raise UserError(f"the index counts {data.n_docs} documents, and {remote.name} has {remote.n_docs}")
    except UserError as error:
        raise UserError(f"{data.prefix} is another data set: {error}") from None


def _check_count(n_tokens: int, remote: Remote) -> None:
    if n_tokens != remote.n_tokens:
        raise UserError(f"the index counts {n_tokens} tokens, and {remote.name} has {remote.n_tokens}")


class _Interrupted(Exception):
    """The transfer broke off in a way that another attempt may mend."""


def _say(line: str) -> None:
    print(line, flush=True)  # soon, also into a file or a pipe


def download(url: str, path: Path, size: int | None) -> None:
    """The file at `url`, of `size` bytes if given, goes to `path` by way of {path}.partial, from which a later attempt goes on.

    It goes on only with the same file, as far as the server can tell (ETag). Nothing is done if `path` exists with that
    size. UserError after ATTEMPTS fruitless attempts in a row, at once for an answer that will not change (404, another
    size).
    """
    if path.exists() and size in (None, path.stat().st_size):
        return
    partial = path.with_name(path.name + ".partial")
    partial.touch()
    fruitless = 0
    while True:
        before = partial.stat().st_size
        try:
            _attempt(url, partial, size)
            break
        except _Interrupted as reason:
            fruitless = fruitless + 1 if partial.stat().st_size <= before else 0
            if fruitless == ATTEMPTS:
                raise UserError(
                    f"{url} cannot be downloaded ({reason}); start again to go on from byte {before}, or set another mirror (MINIPILE_URL)"
                ) from None
            _say(f"{url}: {reason}; trying again")
            time.sleep(min(PAUSE * 2**fruitless, LONGEST_PAUSE))
    partial.replace(path)
    _etag(partial).unlink(missing_ok=True)


def _etag(partial: Path) -> Path:
    """Where the server's name for the contents of a partial file is kept."""
    return partial.with_name(partial.name + ".etag")


def _attempt(url: str, partial: Path, size: int | None) -> None:
    """One request for what is missing. Returns when the file is complete; raises _Interrupted or UserError."""
    have = partial.stat().st_size
    if size is not None and have == size:
        return
    try:
        answer = urllib.request.urlopen(_request(url, partial, have), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # what is there is no beginning of that file
            partial.write_bytes(b"")
            raise _Interrupted("the server holds another file than before") from None
        if error.code in TRANSIENT:
            raise _Interrupted(f"answer {error.code} {error.reason}") from None
        raise UserError(
            f"{url}: the server answers {error.code} {error.reason}; check the address, or set another mirror (MINIPILE_URL)"
        ) from None
    except NETWORK as error:
        raise _Interrupted(_said(error)) from None
    except ValueError as error:
        raise UserError(f"{url} is not a web address: {error}; set MINIPILE_URL to one, or unset it") from None
    with answer:
        if answer.status != 206:
            have = 0  # the whole file comes, from its beginning
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            partial.write_bytes(b"")
            raise _Interrupted(
                f"the server was asked for byte {have} and sends {answer.headers.get('Content-Range', 'it does not say which')}"
            )
        _etag(partial).unlink(missing_ok=True)
        if (name := answer.headers.get("ETag", "")).startswith('"'):  # W/"..." does not promise the same bytes
            _etag(partial).write_text(name)
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else size
        if size is not None and total != size:
            raise UserError(f"{url} is {total} bytes long and should be {size}: not the right file; try another mirror (MINIPILE_URL)")
        if total is not None:
            check_room(partial, total - have)
        _receive(answer, partial, have, total, url)


def _request(url: str, partial: Path, have: int) -> urllib.request.Request:
    if not have:
        return urllib.request.Request(url)
    same = {"If-Range": _etag(partial).read_text()} if _etag(partial).exists() else {}
    return urllib.request.Request(url, headers={"Range": f"bytes={have}-"} | same)


def _read(answer: http.client.HTTPResponse) -> bytes:
    try:
        return answer.read(1 << 20)
    except NETWORK as error:
        raise _Interrupted(_said(error)) from None


def _said(error: Exception) -> str:
    return str(getattr(error, "reason", error)) or type(error).__name__


def _receive(answer: http.client.HTTPResponse, partial: Path, have: int, total: int | None, url: str) -> None:
    started, first, last = time.monotonic(), have, time.monotonic()
    with open(partial, "r+b") as file:
        file.truncate(have)
        file.seek(have)
        while block := _read(answer):
            file.write(block)
            have += len(block)
            if (now := time.monotonic()) - last > SAY_EVERY:
                last = now
                rate = (have - first) / (now - started)
                left = f" of {volume(total)}, {(total - have) / rate:.0f} s left" if total else ""
                _say(f"{url}: {volume(have)}{left} ({volume(rate)}/s)")
    if total is not None and have < total:
        raise _Interrupted(f"the connection ended at byte {have} of {total}")
