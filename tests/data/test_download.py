"""Downloading from a server on this machine that drops connections, answers with errors, or holds something else."""

import errno
import http.client
import os
import re
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from rwkvlm.cli import main
from rwkvlm.config import UserError
from rwkvlm.data import download as module
from rwkvlm.data.binidx import BinIdx, BinIdxWriter
from rwkvlm.data.download import MINIPILE, Remote, fetch, minipile


class Server(ThreadingHTTPServer):
    """Serves `files`; `faults` are used up one an answer: an HTTP status, or ("drop", bytes sent before the connection ends)."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log, self.ranges = {}, [], [], True
        self.etags, self.shift = {}, 0  # by path; how far from the byte asked for the answer begins

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/mirror"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.log.append((self.path, wanted))
        fault = server.faults.pop(0) if server.faults else None
        body = server.files.get(self.path)
        if isinstance(fault, int) or body is None:
            return self.send_error(fault or 404)
        etag = server.etags.get(self.path)
        if self.headers.get("If-Range") not in (None, etag):
            wanted = None
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) + server.shift if wanted and server.ranges else 0
        if start >= len(body) and wanted and server.ranges:
            return self.send_error(416)
        self.send_response(206 if wanted and server.ranges else 200)
        if wanted and server.ranges:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if etag:
            self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : start + fault[1]] if fault else body[start:])
        self.close_connection = True


@pytest.fixture
def server(tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    with BinIdxWriter(tmp_path / "origin" / "mini") as out:
        for k in range(40):
            out.add(np.random.default_rng(k).integers(1, 65000, 5000).astype(np.uint16))
    for suffix in ("bin", "idx"):
        server.files[f"/mirror/mini.{suffix}"] = (tmp_path / "origin" / f"mini.{suffix}").read_bytes()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def said(monkeypatch):
    """The lines for the screen."""
    lines = []
    monkeypatch.setattr(module, "_say", lines.append)
    return lines


@pytest.fixture
def get(server, said, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    return lambda n_tokens=200_000: fetch(Remote("mini", server.url, n_tokens), tmp_path / "data" / "mini")


def origin(server):
    return np.frombuffer(server.files["/mirror/mini.bin"], np.uint16)


def left(tmp_path):
    return sorted(str(p.relative_to(tmp_path / "data")) for p in (tmp_path / "data").rglob("*") if p.is_file())


def test_plain_download_and_nothing_the_second_time(server, get, tmp_path):
    assert np.array_equal(get().tokens, origin(server)) and left(tmp_path) == ["mini.bin", "mini.idx"]
    assert len(server.log) == 2
    assert get().n_docs == 40 and len(server.log) == 2 and not (tmp_path / "data" / "mini.download").exists()


def test_dropped_connections_are_resumed(server, get, said, tmp_path):
    server.faults = [("drop", 100), 503, None, ("drop", 150_000), ("drop", 1000), 500, ("drop", 0), 429]
    assert np.array_equal(get().tokens, origin(server)) and left(tmp_path) == ["mini.bin", "mini.idx"]
    ranges = [r for p, r in server.log if p.endswith("bin")]
    assert ranges == [None, "bytes=150000-", "bytes=151000-", "bytes=151000-", "bytes=151000-", "bytes=151000-"]
    assert any("ended at byte 150000 of 400000" in line for line in said) and any("503" in line for line in said)


def test_a_network_that_fails_while_bytes_come_is_no_full_disk(server, get, said, monkeypatch):
    real = http.client.HTTPResponse.read
    errors = [ssl.SSLError(1, "bad record mac"), OSError(errno.EHOSTUNREACH, "No route to host")]

    def read(self, *size):
        if errors:
            raise errors.pop()
        return real(self, *size)

    monkeypatch.setattr(http.client.HTTPResponse, "read", read)
    assert np.array_equal(get().tokens, origin(server))
    assert "No route to host; trying again" in said[0] and "bad record mac" in said[1]


def test_a_later_call_goes_on(server, get, tmp_path):
    server.faults = [None, ("drop", 200_000), 404]
    with pytest.raises(UserError, match="404"):
        get()
    assert left(tmp_path) == ["mini.download/mini.bin.partial", "mini.download/mini.idx"]
    server.log.clear()
    assert np.array_equal(get().tokens, origin(server)) and server.log == [("/mirror/mini.bin", "bytes=200000-")]


def test_a_server_without_ranges(server, get):
    server.ranges, server.faults = False, [None, ("drop", 200_000)]
    assert np.array_equal(get().tokens, origin(server))


def test_giving_up(server, get, tmp_path, monkeypatch):
    server.faults = [503] * 100
    with pytest.raises(UserError, match=r"mini.idx cannot be downloaded \(answer 503 .*MINIPILE_URL") as caught:
        get()
    assert "\n" not in str(caught.value) and len(server.log) == module.ATTEMPTS
    server.shutdown(), server.server_close()
    with pytest.raises(UserError, match="cannot be downloaded"):
        get()
    assert not (tmp_path / "data" / "mini.bin").exists()


def test_missing_file(server, get):
    del server.files["/mirror/mini.idx"]
    with pytest.raises(UserError, match="mini.idx: the server answers 404 .*MINIPILE_URL"):
        get()
    assert len(server.log) == 1


def test_wrong_files_are_not_put_in_place(server, get, tmp_path):
    good = dict(server.files)
    server.files["/mirror/mini.idx"] = b"<html>please log in</html>" * 10
    with pytest.raises(UserError, match="does not hold mini: .*not a binidx index.*it was removed"):
        get()
    server.files = dict(good)
    with pytest.raises(UserError, match="the index counts 200000 tokens, and mini has 200001"):
        get(200_001)
    server.files["/mirror/mini.bin"] = good["/mirror/mini.bin"][:-2]
    with pytest.raises(UserError, match="mini.bin is 399998 bytes long and should be 400000"):
        get()
    assert not (tmp_path / "data" / "mini.bin").exists() and not (tmp_path / "data" / "mini.idx").exists()
    server.files = good
    assert get().n_tokens == 200_000


def test_another_file_of_the_same_size_is_not_mixed_in(server, get, tmp_path):
    """What has come so far is of another file, which only the ETag tells."""
    server.etags["/mirror/mini.bin"] = '"first"'
    server.faults = [None, ("drop", 200_000), 404]
    with pytest.raises(UserError, match="404"):
        get()
    server.etags["/mirror/mini.bin"] = '"second"'
    other = np.random.default_rng(99).integers(1, 65000, 200_000).astype(np.uint16)
    server.files["/mirror/mini.bin"] = other.tobytes()
    assert np.array_equal(get().tokens, other) and left(tmp_path) == ["mini.bin", "mini.idx"]


@pytest.mark.parametrize("etag", ['"strong"', 'W/"weak"', None])
def test_the_same_file_goes_on(server, get, etag):
    server.etags["/mirror/mini.bin"] = etag
    server.faults = [None, ("drop", 200_000), ("drop", 50_000)]
    assert np.array_equal(get().tokens, origin(server))
    assert [wanted for path, wanted in server.log if path.endswith("bin")] == [None, "bytes=200000-", "bytes=250000-"]


def test_a_server_that_sends_another_part(server, get, said):
    server.shift, server.faults = -1000, [None, ("drop", 200_000)]
    assert np.array_equal(get().tokens, origin(server))
    assert any("was asked for byte 200000 and sends bytes 199000-399999/400000" in line for line in said)
    assert [wanted for path, wanted in server.log if path.endswith("bin")] == [None, "bytes=200000-", None]


def test_tokens_outside_the_vocabulary(server, tmp_path):
    """Right in size and index, wrong inside."""
    good = server.files["/mirror/mini.bin"]
    wrong = bytearray(good)
    wrong[123_456:123_458] = (65530).to_bytes(2, "little")
    server.files["/mirror/mini.bin"] = bytes(wrong)
    remote = Remote("mini", server.url, 200_000, 65530)
    with pytest.raises(UserError, match="does not hold mini: .*mini.bin holds token 65530 at position 61728.*it was removed") as caught:
        fetch(remote, tmp_path / "data" / "mini")
    assert "\n" not in str(caught.value) and left(tmp_path) == ["mini.download/mini.idx"]
    server.files["/mirror/mini.bin"] = good
    assert fetch(remote, tmp_path / "data" / "mini").n_tokens == 200_000


def test_a_file_that_shrank_is_fetched_anew(server, get, tmp_path):
    folder = tmp_path / "data" / "mini.download"
    folder.mkdir(parents=True)
    (folder / "mini.idx.partial").write_bytes(b"x" * 5000)
    assert get().n_tokens == 200_000


def test_damaged_files_already_there(server, get, tmp_path):
    get()
    os.truncate(tmp_path / "data" / "mini.bin", 1000)
    with pytest.raises(UserError, match="truncated.*remove .*mini.bin"):
        get()


def test_disk_too_small(server, get, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match=r"mini.bin.partial needs 390.62 KiB and .* has 1,000 B free; free some space or choose another place"
    ):
        get()


def test_mirror_variable_and_command(server, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MINIPILE_URL", raising=False)
    assert minipile() == MINIPILE and MINIPILE.n_tokens == 1498226207
    monkeypatch.setenv("MINIPILE_URL", server.url + "/")
    assert minipile().url == server.url
    assert main(["download", "--out", str(tmp_path / "m")]) == 2
    assert "minipile.idx: the server answers 404" in capsys.readouterr().err
    monkeypatch.setattr(module, "MINIPILE", Remote("mini", "", 200_000))
    assert main(["download", "--out", str(tmp_path / "m")]) == 0
    assert "200000 tokens, 40 documents, uint16" in capsys.readouterr().out
    assert BinIdx(tmp_path / "m").n_tokens == 200_000
    assert main(["download", "--out", f"{tmp_path}/"]) == 2
    assert "/ is a folder; add a name, for example " in capsys.readouterr().err
    monkeypatch.setenv("MINIPILE_URL", "nonsense")
    assert main(["download", "--out", str(tmp_path / "n")]) == 2
    assert capsys.readouterr().err.startswith("error: nonsense/mini.idx is not a web address")
