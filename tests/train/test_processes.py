"""Two processes on the CPU, as a user starts them: the same curve under every strategy, saved and stopped together."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkvlm.checkpoint import ranks
from rwkvlm.checkpoint.pth import load_weights
from rwkvlm.train.freeze import frozen_names
from rwkvlm.train.watch import Watch

ROOT = Path(__file__).resolve().parents[2]
TWO = dict(devices=2, micro_bsz=2)
STRATEGIES = ("ddp", "deepspeed_stage_2", "deepspeed_stage_3")


def start(argv: list[str], **more) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def ranks_started_by(pid: int) -> list[str]:
    """Its children that train; libraries run a compiler for a moment as well."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
    return found


def wait_for(path: Path, lines: int) -> None:
    until = time.monotonic() + 240
    while time.monotonic() < until:
        if path.exists() and path.read_text().count('"loss"') >= lines:
            return
        time.sleep(0.1)
    raise TimeoutError(path)


def check_same_run(one: Path, other: Path, losses) -> None:
    assert losses(other) == pytest.approx(losses(one), rel=1e-5)
    assert load_weights(other / "rwkv-final.pth").keys() == load_weights(one / "rwkv-final.pth").keys()


def test_two_processes_give_the_curve_of_one(run, whole, losses, records, tmp_path, monkeypatch):
    """Plain DDP: what `--devices 2` means by itself, where a cluster has left a place to meet; stopped and gone on with one process."""
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    monkeypatch.setenv("MASTER_PORT", "1")
    argv = run.argv(tmp_path / "out", **TWO, val_batches=4, max_steps=17)
    code, out, err = finish(start(argv))
    assert code == 0 and "2 x 2 = 4 samples" in out and "2 cpu, fp32, ddp" in out, err
    assert out.count("mini-epochs of 40 samples") == 1  # only the first process speaks
    assert run(tmp_path / "out") == 0
    check_same_run(whole, tmp_path / "out", losses)
    assert [r["val_loss"] for r in records(tmp_path / "out", "val_loss").values()] == pytest.approx(
        [r["val_loss"] for r in records(whole, "val_loss").values()], rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["deepspeed_stage_1", *STRATEGIES[1:]])
def test_zero_gives_the_curve_of_one_process(run, whole, losses, tmp_path, strategy):
    code, out, err = finish(start(run.argv(tmp_path / "out", **TWO, strategy=strategy)))
    assert code == 0, err
    assert "Traceback" not in err
    check_same_run(whole, tmp_path / "out", losses)
    assert sum(line.startswith("{") for line in (tmp_path / "out" / "train_log.txt").read_text().splitlines()) == 2  # settings, DeepSpeed's


def well(results: list[dict]) -> None:
    assert all(result["codes"] == [0, 0] and "Traceback" not in result["said"] for result in results), results


def interrupted(folder: Path, **flags) -> list[tuple[dict, dict]]:
    """Jobs of `forked`: a whole run in folder/a, and in folder/b one that stops in a mini-epoch and goes on."""
    return [(flags | dict(proj_dir=folder / name, max_steps=stop), {}) for name, stop in (("a", None), ("b", 13), ("b", None))]


@pytest.mark.slow
def test_interrupted_and_resumed_at_the_same_size_is_exact(forked, whole, losses, tmp_path):
    flags = TWO | dict(accumulate_grad_batches=2, micro_bsz=1)
    well(forked(*(job for strategy in STRATEGIES for job in interrupted(tmp_path / strategy, **flags, strategy=strategy))))
    for strategy in STRATEGIES:
        out = tmp_path / strategy
        check_same_run(whole, out / "a", losses)  # 2 processes x 1 sample x 2 micro batches
        assert losses(out / "a") == losses(out / "b"), strategy
        a, b = ((out / name / "rwkv-final.pth").read_bytes() for name in "ab")
        assert a == b, strategy


@pytest.mark.slow
@pytest.mark.parametrize("strategy, name, code", [("ddp", "SIGTERM", 143), ("deepspeed_stage_3", "SIGINT", 130)])
def test_a_signal_to_the_first_process_stops_all_of_them(run, whole, losses, tmp_path, strategy, name, code):
    out = tmp_path / "out"
    process = start(run.argv(out, **TWO, strategy=strategy, my_exit_tokens=400000))
    wait_for(out / "metrics.jsonl", 4)
    others = ranks_started_by(process.pid)
    assert len(others) == 1
    process.send_signal(getattr(signal, name))
    assert finish(process)[0] == code
    assert not Path(f"/proc/{others[0]}").exists()
    step = int((out / "state" / "latest").read_text().removeprefix("step"))
    assert 4 <= step == len(losses(out)) < 3125  # its last
    assert run(out, my_exit_tokens=400000, max_steps=3) == 0
    assert len(losses(out)) == step + 3


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_before_the_first_step_ends_all_of_them(forked, tmp_path, victim):
    """Between collective operations, the model being built: nothing is to be saved, nobody waits for the others."""
    flags = TWO | dict(proj_dir=tmp_path / "out", strategy="ddp")
    ended, after = forked((flags, dict(terminate=victim)), (flags | dict(max_steps=2), {}))
    assert ended["codes"][victim] == -signal.SIGTERM and ended["codes"][1 - victim] == 1 and "Traceback" not in ended["said"], ended
    assert re.search(rf"error: rank {victim} \(\S+, process \d+\) died", ended["said"]), ended
    assert after["codes"] == [0, 0], after


@pytest.mark.slow
def test_a_signal_to_one_process_stops_validation_in_all(forked, records, losses, tmp_path):
    """After the same batch of the four at step 10 (under ZeRO-3 each is collective); made when the run goes on, the loss is the same."""
    flags = TWO | dict(strategy="deepspeed_stage_3", val_batches=8)
    a, b = tmp_path / "a", tmp_path / "b"
    _, stopped, after = forked(
        (flags | dict(proj_dir=a), {}), (flags | dict(proj_dir=b), dict(validating=5)), (flags | dict(proj_dir=b), {})
    )
    assert (
        stopped["codes"] == [143, 143]
        and "stopped by SIGTERM at step 10; the training state is saved" in stopped["said"]
        and after["codes"] == [0, 0]
    ), (stopped, after)
    assert losses(b) == losses(a) and records(b, "val_loss") == records(a, "val_loss")


@pytest.mark.slow
def test_processes_that_a_launcher_started(run, whole, losses, tmp_path):
    """torchrun: every process exits by itself; errors of the user are one line of ours."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py")]
    done = subprocess.run(
        [*torchrun, *run.argv(tmp_path / "out", **TWO)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    check_same_run(whole, tmp_path / "out", losses)


@pytest.mark.slow
def test_frozen_parts_under_every_strategy(forked, tmp_path, losses, same_state):
    """The embedding, whose gradient would come last, and the head, which the loss reads by itself; stopped in a mini-epoch and gone on."""
    patterns, strategies = "emb,head,blocks.0.ffn,blocks.0.ln0.bias,blocks.1.att.k_k", ("deepspeed_stage_1", *STRATEGIES)
    short = dict(my_exit_tokens=16 * 128)
    well(
        forked(
            *(
                job
                for strategy in strategies
                for job in interrupted(tmp_path / strategy, **TWO, strategy=strategy, precision="bf16", freeze=patterns, **short)
            )
        )
    )
    for strategy in strategies:
        out = tmp_path / strategy
        before, a, b = (
            load_weights(path) for path in (out / "a" / "rwkv-init.pth", out / "a" / "rwkv-final.pth", out / "b" / "rwkv-final.pth")
        )
        frozen = frozen_names(patterns, list(a))
        trained = set(a) - {f"blocks.0.att.v{n}" for n in range(3)} - frozen
        assert {name for name in a if not a[name].equal(before[name])} >= {
            name for name in trained if "weight" in name and "ln" not in name
        }, strategy
        assert all(a[name].equal(before[name]) for name in frozen), strategy
        assert losses(out / "a") == losses(out / "b") and all(a[name].equal(b[name]) for name in a), strategy
        assert same_state(*(out / name / "state" / "step16" for name in "ab")), strategy


@pytest.mark.slow
def test_all_processes_give_up_together(forked, tmp_path):
    """One bad sample in every step from 4 on, in one process or the other; the sentence names it."""
    flags = TWO | dict(precision="bf16", save_steps=2, max_skips=3, accumulate_grad_batches=2, micro_bsz=1)
    bad = dict(nan_in=[*range(14, 100, 3)])
    for result in forked(*((flags | dict(strategy=strategy, proj_dir=tmp_path / strategy), bad) for strategy in STRATEGIES)):
        said = result["said"]
        assert result["codes"] == [2, 2], said
        told = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(told) == 1 and re.search(
            r"error: [34] steps in a row were skipped .* last one step [67]: "
            r"\d of its 4 samples do this alone: (23|26) \(chunk \d+, tokens",
            told[0],
        ), said
        assert "gradients of 69 parameters, in emb, ln, att, ffn, head, are not" in told[0] and "Traceback" not in said


@pytest.mark.parametrize(
    "line, said",
    [
        (
            "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete",
            "did not answer for 15 s (--dist_timeout)",
        ),
        ("Application timeout caused pair closure", "did not answer for 15 s (--dist_timeout)"),
        ("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234", "cannot be reached: RuntimeError: [gloo/"),
    ],
)
def test_what_gloo_says_of_a_silent_process_blames_that_process(line, said):
    watch = Watch(15.0, rank=0, local_rank=0, processes=lambda: (), started=False, cure="")
    watch.world_size = 2
    watch.report(RuntimeError(line))
    assert watch._verdict().startswith(f"rank 1 {said}")


@pytest.mark.parametrize("rank, local_rank, speaks", [(0, 0, True), (1, 1, False), (2, 0, True), (3, 1, False)])
def test_processes_that_never_met_say_so_on_each_node(rank, local_rank, speaks):
    """Two nodes of two: there is no way to tell rank 0."""
    watch = Watch(15.0, rank, local_rank, processes=lambda: (), started=False, cure="")
    watch.report(
        RuntimeError("Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:152] timed out connecting: SO_ERROR: Connection refused")
    )
    assert re.fullmatch(
        r"the processes cannot meet: RuntimeError: Gloo connect.*; check MASTER_ADDR .* GLOO_SOCKET_IFNAME .*", watch._verdict()
    )
    assert watch._speaks() == speaks


def test_a_stranger_takes_nobodys_place(monkeypatch):
    """A port scanner, or whoever else connects to rank 0 while it waits for the others."""
    told = []
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "broadcast", lambda value: (told.append(value) or value) if value else told[0])
    first, second = (Watch(15.0, rank, rank, processes=lambda: (), started=False, cure="") for rank in range(2))
    first.connect("", one_node=True)
    for words in (b"GET / HTTP/1.0\r\n\r\n", b"7\n", b""):
        with socket.create_connection(("127.0.0.1", told[0][0])) as stranger:
            stranger.sendall(words)
    second.connect("127.0.0.1", one_node=True)
    end = time.monotonic() + 30
    while not first._peers and time.monotonic() < end:
        time.sleep(0.01)
    assert list(first._peers) == [1] and list(second._peers) == [0]
    for watch in (first, second):
        for peer in watch._peers.values():
            peer.socket.close()


def test_an_interrupt_before_training_is_nobodys_fault(monkeypatch):
    """Neither that of a process that has ended by it, nor of one that hears of it first and says so."""

    class Ended(Exception):
        pass

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", leave)
    for code in (130, -signal.SIGINT):
        child = subprocess.Popen([sys.executable, "-c", ""])
        child.wait()
        child.returncode = code
        watch = Watch(15.0, rank=0, local_rank=0, processes=lambda child=child: (child,), started=False, cure="")
        watch.world_size = 2
        with pytest.raises(Ended, match="130"):
            watch._look_around()
        watch._training = True  # from here on each saves, and ends in time
        watch._look_around()
        assert watch._lost() == {1}
    own, other = socket.socketpair()
    first, second = (Watch(15.0, rank, rank, processes=lambda: (), started=False, cure="") for rank in range(2))
    first._add(1, "rank 1", own, {})
    second._add(0, "rank 0", other, {})
    second.report(KeyboardInterrupt())
    with own, other, pytest.raises(Ended, match="130"):
        first._listen()
    assert not first._causes and not second._causes
