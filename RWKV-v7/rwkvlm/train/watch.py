"""Dead and silent processes: when one dies or falls silent, the whole run ends within seconds, and one line says which and why.

Collective operations alone do not do this: gloo reports a closed connection without saying whose, NCCL may wait for minutes, and
Lightning kills everything without a word. So a thread in every process watches what it can see: the processes that this one has
started, the one that has started it, and a TCP connection between rank 0 and every other rank. What it sees goes to rank 0, which
waits a moment for further reports, names the cause, tells the others, and ends. Nothing here needs the training thread, which may hang.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from ..checkpoint import ranks
from ..config import env

try:
    from torch.distributed import set_timeout
except ImportError:  # torch 2.11 to 2.13; 2.15 calls this name deprecated, in every process of a run
    from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

TICK, BEAT = 0.25, 2.0  # seconds between two looks, and between two signs of life
GRACE = 3.0  # from the first report to the verdict: time for a better one
LAST_WORDS = 10.0  # for the training thread to end by an error of its own
CONNECT, HELLO = 300.0, 10.0  # for the others to come, and for one that has come to say who it is
KILLED, DIED, FAILED, SILENT = range(4)  # the one that says most comes first
EXIT_CODE = 1
INTERRUPTED = 130  # as a shell counts SIGINT
MEETING = "check MASTER_ADDR and firewalls, or set GLOO_SOCKET_IFNAME (on GPUs NCCL_SOCKET_IFNAME too) to the interface between the nodes"
# the last two: gloo, which may leave out its name
COMMUNICATION = ("gloo", "NCCL", "Connection closed by peer", "Application timeout caused pair closure")


@dataclass
class _Peer:
    """The other end of a connection. silent: seconds since its last sign of life."""

    rank: int
    name: str
    socket: socket.socket
    silent: float = 0.0
    unread: bytes = b""


class Watch:
    """One for each process of a run, from before the process group exists to its end; no thread when a run has only one process.

    timeout_s: silence, or waiting for others in a collective operation, after which a run ends.
    processes(): those that this one has started, of the ranks after its own. started: whether another process of the run
    has started this one. cure: what the user can do when the run ends.
    """

    def __init__(
        self, timeout_s: float, rank: int, local_rank: int, processes: Callable[[], Sequence[subprocess.Popen]], started: bool, cure: str
    ) -> None:
        self.timeout_s, self.rank, self.local_rank, self.processes = timeout_s, rank, local_rank, processes
        self.cure = cure
        self.parent = (env.starter() or os.getppid()) if started else 0
        self.world_size = 1  # of the process group, once there is one
        self.names: dict[int, str] = {}
        self._lock = threading.RLock()
        self._selector = selectors.DefaultSelector()
        self._peers: dict[int, _Peer] = {}
        self._left: set[int] = set()  # ranks that have ended well
        self._causes: list[tuple[int, int, int, str]] = []  # kind, number, rank, what happened
        self._waiting: dict[int, str] = {}  # ranks whose collective operations fail because of another one
        self._since = self._beaten = 0.0
        self._looked = time.monotonic()
        self._training = False
        # The numbers of the signals that have come, until all have met: the training thread is in C++ then, where Python hears of none.
        self._signals: socket.socket | None = None
        self._failed_here = self._closed = False
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._signals, self._told = socket.socketpair()
            for end in (self._signals, self._told):
                end.setblocking(False)
            self._woken = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        self._thread.start()

    def connect(self, address: str, one_node: bool) -> None:
        """Rank 0 listens at address and the others come. Collective, on the default process group."""
        self.world_size = ranks.world_size()
        if self._signals:
            signal.set_wakeup_fd(self._woken)
        if self.rank == 0:
            server = socket.create_server(("127.0.0.1" if one_node else "", 0), backlog=self.world_size)
            where = ranks.broadcast((server.getsockname()[1], secrets.token_hex(8), self._own_name()))
            threading.Thread(target=self._welcome, args=(server, where[1]), daemon=True).start()
            return
        port, token, name = ranks.broadcast(None)
        try:
            own = socket.create_connection(("127.0.0.1" if one_node else address, port), CONNECT)
            self._add(0, name, own, dict(token=token, rank=self.rank, name=self._own_name()))
        except OSError as error:
            print(
                f"rank {self.rank} cannot reach rank 0 at {address}:{port} ({error}); a dead process will be noticed late",
                file=sys.stderr,
                flush=True,
            )

    def training_begins(self) -> None:
        """From now on no process may keep the others waiting for longer than timeout_s."""
        set_timeout(timedelta(seconds=self.timeout_s))
        self._training = True

    def _own_name(self) -> str:
        return f"rank {self.rank} ({socket.gethostname()}, process {os.getpid()})"

    def _welcome(self, server: socket.socket, token: str) -> None:
        """Until all are there. Whoever else connects, a port scanner say, takes nobody's place."""
        server.settimeout(CONNECT)
        known = 0
        with server, suppress(OSError):
            while known < self.world_size - 1:
                guest = server.accept()[0]
                guest.settimeout(HELLO)
                hello = _greeting(guest)
                if hello.get("token") == token:
                    self._add(hello["rank"], hello["name"], guest, {})
                    known += 1
                else:
                    guest.close()

    def _add(self, rank: int, name: str, own: socket.socket, hello: dict) -> None:
        own.settimeout(GRACE)
        with self._lock:
            self._peers[rank] = _Peer(rank, name, own)
            if hello:
                self._send(self._peers[rank], **hello)
            self._selector.register(own, selectors.EVENT_READ, self._peers[rank])

    def _send(self, peer: _Peer, **message) -> None:
        with self._lock, suppress(OSError):
            peer.socket.sendall(json.dumps(message).encode() + b"\n")

    def _tell_all(self, **message) -> None:
        for peer in list(self._peers.values()):
            self._send(peer, **message)

    # what the training thread says

    def report(self, error: BaseException) -> None:
        """The training of this process is failing; to be called before anything is torn down."""
        line = f"{type(error).__name__}: {ranks.describe(error)}"
        with self._lock:
            if isinstance(error, KeyboardInterrupt) and not self._training:
                self._tell_all(interrupted=True)
            elif is_communication(error):
                self._wait_for_others(self.rank, line)
                self._tell_all(waiting=line)
            else:
                self._failed_here = True
                self._cause(FAILED, self.rank, f"failed: {line}")

    def end(self, error: BaseException) -> None:
        """Does not return when the error is only a consequence: the cause is being found, and the process ends with it."""
        if is_communication(error):
            self._thread.join()
        self._wait_for_processes(GRACE)

    def close(self) -> None:
        """The training of this process has ended well; waits for the processes that it has started."""
        with self._lock:
            self._closed = True
            self._tell_all(bye=True)
        self._thread.join()
        self._wait_for_processes(self.timeout_s)

    def _wait_for_processes(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in self.processes():
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            process.kill()

    # what the thread sees

    def _run(self) -> None:
        while not self._closed:
            self._listen()
            with self._lock:
                if not self._closed:
                    self._look_around()
                    if self._since and time.monotonic() - self._since > self._patience():
                        self._end(self._verdict(), speak=self._speaks())

    def _listen(self) -> None:
        if not self._selector.get_map():
            time.sleep(TICK)
            return
        for key, _ in self._selector.select(TICK):
            peer: _Peer = key.data
            try:
                data = peer.socket.recv(1 << 16)
            except OSError:
                data = b""
            with self._lock:
                peer.silent = 0.0
                *lines, peer.unread = (peer.unread + data).split(b"\n")
                for line in lines:
                    self._understand(peer, json.loads(line))
                if not data and peer.rank in self._peers:
                    self._forget(peer)
                    if peer.rank not in self._lost():  # it has not said why
                        self._cause(DIED, peer.rank, "died (killed, or out of memory)")

    def _understand(self, peer: _Peer, message: dict) -> None:
        peer.name = message.get("name", peer.name)
        if "bye" in message:
            self._left.add(peer.rank)
            self._forget(peer)
        if "interrupted" in message:
            self._interrupted()
        if "cause" in message:
            self._cause(*message["cause"])
        if "waiting" in message:
            self._wait_for_others(peer.rank, message["waiting"])
        if "verdict" in message:
            self._end(message["verdict"], speak=False)

    def _forget(self, peer: _Peer) -> None:
        self.names[peer.rank] = peer.name
        self._selector.unregister(peer.socket)
        peer.socket.close()
        del self._peers[peer.rank]

    def _look_around(self) -> None:
        now = time.monotonic()
        if self._signals and self.world_size == 1:
            with suppress(BlockingIOError):
                if signal.SIGINT in self._signals.recv(64):
                    self._interrupted()
        for number, process in enumerate(self.processes(), 1):
            if (code := process.poll()) and self.rank + number not in self._left:
                if not self._training and code in (INTERRUPTED, -signal.SIGINT):
                    self._interrupted()
                self.names.setdefault(self.rank + number, f"rank {self.rank + number} (process {process.pid})")
                died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                self._cause(KILLED if code < 0 else FAILED, self.rank + number, died)
        if self.parent and os.getppid() != self.parent:
            self._cause(DIED, self.rank - self.local_rank, "died (killed, or out of memory)")
        # A machine that slept, or had no time for any of us, is not a silence of the others: only while this thread runs do seconds count.
        passed, self._looked = min(now - self._looked, 4 * TICK), now
        for peer in self._peers.values():
            peer.silent += passed
            if self._training and peer.silent > max(self.timeout_s, 3 * BEAT):
                self._cause(SILENT, peer.rank, f"has not answered for {self.timeout_s:g} s (--dist_timeout)")
        if now - self._beaten > BEAT:
            self._beaten = now
            self._tell_all()

    # what follows from it

    def _cause(self, kind: int, rank: int, what: str) -> None:
        if not any(kind == k and rank == r for k, _, r, _ in self._causes):
            self._since = self._since or time.monotonic()
            self._causes.append((kind, len(self._causes), rank, what))
            if self.rank != 0 or rank == 0:  # rank 0 keeps what others report for its verdict
                self._tell_all(cause=[kind, rank, what])

    def _wait_for_others(self, rank: int, line: str) -> None:
        self._since = self._since or time.monotonic()
        self._waiting[rank] = line

    def _lost(self) -> set[int]:
        return {rank for _, _, rank, _ in self._causes}

    def _patience(self) -> float:
        """Rank 0 decides. Others do when it does not."""
        return GRACE if self.rank == 0 or 0 in self._lost() else 2 * GRACE + BEAT

    def _verdict(self) -> str:
        if self._causes:
            _, _, rank, what = min(self._causes)
            return f"{self._name(rank)} {what}"
        line = next(iter(self._waiting.values()))
        if self.world_size == 1:
            return f"the processes cannot meet: {line}; {MEETING}"
        absent = [rank for rank in ([0] if self.rank else range(self.world_size)) if rank not in self._waiting]
        if not absent:
            return f"the processes lost each other: {line}"
        self._causes += [(SILENT, len(self._causes), rank, "") for rank in absent]
        late = any(word in line.lower() for word in ("timed out", "timeout"))
        what = f"did not answer for {self.timeout_s:g} s (--dist_timeout)" if late else f"cannot be reached: {line}"
        return f"{' and '.join(map(self._name, absent))} {what}"

    def _speaks(self) -> bool:
        """Rank 0 does; where it has gone without a word, or cannot be told, the first process of each node that is left."""
        gone = any(rank == 0 and kind != FAILED for kind, _, rank, _ in self._causes)
        return self.rank == 0 or (gone and self.rank == 1) or (self.local_rank == 0 and (gone or self.world_size == 1))

    def _name(self, rank: int) -> str:
        peer = self._peers.get(rank)
        return peer.name if peer else self.names.get(rank, f"rank {rank}")

    def _end(self, verdict: str, speak: bool) -> None:
        """The end of this process, whatever its training thread is doing. What it was saving is as after kill -9: not there, or whole."""
        self._tell_all(verdict=verdict)
        if self._failed_here:
            time.sleep(LAST_WORDS)
        if speak:
            with suppress(OSError):
                print(f"error: {verdict}; {self.cure}", file=sys.stderr, flush=True)
        if self.parent and os.getppid() == self.parent and self.rank - self.local_rank in self._lost():
            os.kill(self.parent, signal.SIGKILL)  # it is frozen, and whoever waits for it would wait forever
        self._leave(EXIT_CODE)

    def _interrupted(self) -> NoReturn:
        """The end of all, of which none is to blame; before training begins, so that nothing is lost."""
        self._tell_all(interrupted=True)
        self._leave(INTERRUPTED)

    def _leave(self, code: int) -> NoReturn:
        for process in self.processes():
            process.kill()
        os._exit(code)


def _greeting(guest: socket.socket) -> dict:
    """The first line, and nothing of what comes after it, which is for the thread that listens; {} from a stranger."""
    line = b""
    with suppress(OSError, ValueError):
        while (byte := guest.recv(1)) not in (b"", b"\n"):
            line += byte
        hello = json.loads(line)
        return hello if isinstance(hello, dict) else {}
    return {}


def is_communication(error: BaseException) -> bool:
    """Whether another process may be the cause of this error."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and any(word in str(error) for word in COMMUNICATION))
