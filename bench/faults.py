"""Injects faults into real training runs of two processes and checks that nothing is lost but the work since the last save.

    python bench/faults.py --kills 50 --others 2 --seed 1 --out faults.json

Runs of a tiny model save their training state at every second step. Each fault hits one start of a run, at a moment drawn at random; the
next start must go on from the newest intact state on disk, found here independently, and a run that has had its faults and reached its
last token must have written the same bytes as a run without faults. Any other outcome is an error, exit code 1.

kills: SIGKILL of one process or of all, while it starts, at any moment, or while a save is under way. others: rounds of every other fault.
Needs the right to mount (root) for the full disk and the read-only folder; without it a file-size limit and permissions stand for them.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path

from forked import Finished, World, write_tokens  # first: it settles the environment

# isort: split
from environment import write_record
from rwkvlm.checkpoint import state
from rwkvlm.train.module import TrainModule

RANKS, BATCH, CTX, STEPS = 2, 2, 16, 120
TIMEOUT = 15  # seconds, --dist_timeout where a process is frozen: longer than a slow machine keeps one waiting
FLAGS = dict(
    vocab_size=64, n_layer=1, n_embd=32, head_size=16, ctx_len=CTX, micro_bsz=BATCH, my_exit_tokens=STEPS * RANKS * BATCH * CTX,
    lr_init=2e-3, lr_final=2e-4, warmup_steps=5, epoch_samples=100, epoch_save=1, random_seed=1, accelerator="cpu", precision="fp32",
    kernel="torch", train_stage=3, save_steps=2, keep_last=3, enable_progress_bar=False,
)  # fmt: skip
STRATEGIES = ("ddp", "deepspeed_stage_2", "deepspeed_stage_3")
FAULTS_A_RUN = 8


class Trial:
    """One run from its beginning to its last token, through all the faults that hit it."""

    def __init__(self, folder: Path, data: str, strategy: str, chance: random.Random) -> None:
        self.folder, self.out, self.chance, self.strategy = folder, folder / "out", chance, strategy
        self.flags = FLAGS | dict(data_file=data, proj_dir=self.out, strategy=strategy)
        self.expected = 0  # the step from which the next start must go on
        self.records: list[dict] = []

    def begin(self, before=lambda rank: None, wait: bool = True, **flags) -> World:
        before_this = len(self._lines("run"))
        world = World(self.flags | flags, RANKS, self.folder / "log", before)
        if wait:
            world.until(lambda: len(self._lines("run")) > before_this)
            step = self._lines("run")[-1]["step"]
            assert step == self.expected, f"went on from step {step} instead of {self.expected}\n{world.said()}"
        return world

    def _lines(self, key: str) -> list[dict]:
        try:
            *lines, _ = (self.out / "metrics.jsonl").read_bytes().split(b"\n")  # what follows the last break may be half a line
        except FileNotFoundError:
            return []
        return [line for line in map(json.loads, lines) if key in line]

    def steps(self) -> int:
        """Losses written, by all starts."""
        return len(self._lines("loss"))

    def newest(self) -> int:
        """Step of the newest intact state, 0 without one."""
        damaged: list[Path] = []
        with redirect_stderr(io.StringIO()):  # what find_state says of damaged ones
            while (info := state.find_state(self.out, damaged)) is not None and state.check(info):
                damaged.append(info.path)
        return info.step if info else 0

    def note(self, fault: str, world: World, **facts) -> None:
        self.expected = self.newest()
        self.records.append(dict(fault=fault, strategy=self.strategy, state_after=self.expected, exit_codes=world.codes) | facts)

    def complete(self) -> bytes:
        """The last start, undisturbed; the bytes of its weights."""
        with suppress(Finished):  # it may have been at its last token when the last fault came
            world = self.begin()
            world.wait(300)
            assert set(world.codes.values()) == {0}, world.said()
        return (self.out / "rwkv-final.pth").read_bytes()

    def pause(self, world: World, seconds: float = 0.4) -> None:
        """A random time of training."""
        world.until(lambda: self.steps() > 0)
        end = time.monotonic() + self.chance.uniform(0, seconds)
        while time.monotonic() < end and len(world.living()) == RANKS:
            time.sleep(0.001)

    def saving(self) -> bool:
        return any((self.out / "state").glob("step*.tmp"))

    def over(self, world: World) -> bool:
        """Whether it was at its last token before the fault was through.

        Such a fault does not count: what is left is killed, the next start ends the run.
        """
        if not any(line["step"] == STEPS for line in self._lines("loss")):
            return False
        world.kill(world.living())
        world.wait(60)
        self.expected = self.newest()
        return True


def kill(trial: Trial) -> bool:
    """SIGKILL. A process that is left ends by itself within 60 s and names the dead one."""
    chance = trial.chance
    moment = chance.choice(("start", "any", "save", "save"))
    victims = chance.choice(([0], [1], [0, 1]))
    world = trial.begin(wait=moment != "start")
    if moment == "start":
        time.sleep(chance.uniform(0, 1.5))
    else:
        trial.pause(world)
        while moment == "save" and world.living() and not trial.saving():
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.005) if moment == "save" else 0)
    world.kill(victims)
    if moment == "start":  # they may not know each other yet: a launcher ends the others
        world.wait(60, victims)
        world.kill(world.living())
    seconds = world.wait(60)
    if trial.over(world):
        return False
    named = all(f"rank {rank} (" in world.said() for rank in victims)
    if len(victims) < RANKS and moment != "start":
        assert named and seconds < 60, world.said()
    trial.note(
        f"kill -9 of {'all' if len(victims) == RANKS else 'one'}",
        world,
        moment=moment,
        rank=victims,
        seconds=seconds,
        named=named,
        within_save=trial.saving(),
    )
    return True


def terminate(trial: Trial) -> bool:
    """SIGTERM to one process: all save and stop with 143."""
    world = trial.begin()
    trial.pause(world)
    world.kill([trial.chance.randrange(RANKS)], signal.SIGTERM)
    seconds = world.wait(60)
    if trial.over(world):
        return False
    assert set(world.codes.values()) == {128 + signal.SIGTERM}, world.said()
    trial.note("SIGTERM", world, seconds=seconds)
    return True


def freeze(trial: Trial) -> bool:
    """SIGSTOP: the others end after --dist_timeout and name the frozen one."""
    world, victim = trial.begin(dist_timeout=TIMEOUT), trial.chance.randrange(RANKS)
    trial.pause(world)
    world.kill([victim], signal.SIGSTOP)
    seconds = world.wait(60, [rank for rank in range(RANKS) if rank != victim])
    world.kill([victim])  # as a launcher does
    world.wait(60)
    if trial.over(world):
        return False
    assert f"rank {victim} (" in world.said() and f"for {TIMEOUT} s (--dist_timeout)" in world.said(), world.said()
    trial.note("SIGSTOP", world, seconds=seconds, rank=[victim])
    return True


def crash(trial: Trial) -> bool:
    """An error in one process: its message is on stderr once, and the others end."""
    victim, step = trial.chance.randrange(RANKS), trial.chance.randrange(1, 30)

    def before(rank: int) -> None:
        def training_step(module, batch, batch_idx, original=TrainModule.training_step):
            if batch_idx == step:
                raise RuntimeError("injected error")
            return original(module, batch, batch_idx)

        if rank == victim:
            TrainModule.training_step = training_step

    world = trial.begin(before)
    seconds = world.wait(60)
    if trial.over(world):
        return False
    said = world.said()
    assert set(world.codes.values()) == {1} and said.count("\nRuntimeError: injected error") == 1 and said.count("Traceback") == 1, said
    assert victim == 0 or f"rank {victim} (" in said and "failed: RuntimeError: injected error" in said, said
    trial.note("exception in one process", world, seconds=seconds, rank=[victim])
    return True


def damage(trial: Trial, how: str) -> bool:
    """The newest state is damaged between two starts: the one before it is used, and a line says so."""
    world = trial.begin()
    trial.pause(world)
    world.until(lambda: trial.newest() > 2)
    world.kill(world.living())
    world.wait(60)
    if trial.over(world):
        return False
    before = trial.newest()
    newest = trial.out / "state" / f"step{before}"
    file = newest / f"rank0000{trial.chance.randrange(RANKS)}.pt"
    content = bytearray(file.read_bytes())
    if how == "bytes flipped":
        content[trial.chance.randrange(len(content))] ^= 1 << trial.chance.randrange(8)
        file.write_bytes(content)
    elif how == "file cut":
        file.write_bytes(content[: trial.chance.randrange(len(content))])
    elif how == "file missing":
        file.unlink()
    else:
        (newest / "manifest.json").unlink()
    trial.expected = trial.newest()
    assert trial.expected < before
    world = trial.begin()
    assert f"{newest} is damaged" in world.said(), world.said()
    trial.pause(world)
    world.kill(world.living())
    world.wait(60)
    if trial.over(world):
        return False
    trial.note(f"newest state damaged: {how}", world)
    return True


def no_room(trial: Trial, how: str) -> bool:
    """Saves fail while training goes on; later ones succeed again; then all is killed."""
    world = trial.begin()
    trial.pause(world)
    try:
        with {"disk full": full_disk, "file-size limit in one process": file_limit, "folder read-only": read_only}[how](
            trial, world
        ) as hold:

            def lost(saves: int) -> bool:
                hold()
                return world.said().count("training goes on") >= saves

            world.until(lambda: lost(1))
            kept = trial.newest()
            world.until(lambda: lost(3))
            assert trial.newest() >= kept
        world.until(lambda: trial.newest() > kept)
    except (Finished, ChildProcessError):  # at the last token there is no going on without room: that ends with an error
        assert set(world.codes.values()) in ({0}, {2}) and "Traceback" not in world.said(), world.said()
        trial.expected = trial.newest()
        return False
    world.kill(world.living())
    world.wait(60)
    said = [line for line in world.said().splitlines() if "cannot" in line]
    assert "Traceback" not in world.said() and said, world.said()
    trial.note(how, world, saves_lost=world.said().count("training goes on"), first_line=said[0])
    return True


@contextmanager
def file_limit(trial: Trial, world: World):
    """Its part of a state is larger than the limit, what it says on stderr is not."""
    pid = world.pids[trial.chance.randrange(RANKS)]
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    try:
        yield lambda: None
    finally:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@contextmanager
def full_disk(trial: Trial, world: World):
    """The folder of the run is a small file system (inject), and all that is free there is filled.

    Again whatever is freed: a save under way may still delete an older state.
    """
    ballast = trial.out / "ballast"
    with open(ballast, "wb", buffering=0) as file:

        def fill() -> None:
            with suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass

        try:
            fill()
            yield fill
        finally:
            ballast.unlink()


@contextmanager
def read_only(trial: Trial, world: World):
    folder = str(trial.out / "state")
    if os.geteuid():
        os.chmod(folder, 0o500)
        try:
            yield lambda: None
        finally:
            os.chmod(folder, 0o700)
        return
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        deadline = time.monotonic() + 60
        while subprocess.run(["mount", "-o", "remount,bind,ro", folder], capture_output=True).returncode:  # busy: a save has a file open
            assert time.monotonic() < deadline, f"{folder} cannot be made read-only"
        yield lambda: None
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def may_mount(folder: Path) -> bool:
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True).returncode == 0
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)
    return mounted


OTHERS = {
    "terminate": terminate,
    "freeze": freeze,
    "crash": crash,
    "file-size limit": lambda trial: no_room(trial, "file-size limit in one process"),
    "read-only": lambda trial: no_room(trial, "folder read-only"),
    "disk full": lambda trial: no_room(trial, "disk full"),
    **{how: lambda trial, how=how: damage(trial, how) for how in ("bytes flipped", "file cut", "file missing", "manifest missing")},
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Inject faults into training runs.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--others", type=int, default=1, help="rounds of all other faults")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="inject no more after this time; the run under way is still brought to its end"
    )
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="", help="JSON file for the results")
    args = parser.parse_args()
    chance, began = random.Random(args.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        records = inject(Path(place), chance, args.kills, args.others, args.strategies.split(","), began + args.seconds)
    counts = Counter(record["fault"] for record in records)
    if args.out:
        write_record(Path(args.out), seconds=round(time.monotonic() - began, 1), survived=counts, faults=records)
    print("\n".join(f"{count:4} {fault}" for fault, count in counts.items()))
    return 0


def inject(place: Path, chance: random.Random, kills: int, others: int, strategies: list[str], deadline: float) -> list[dict]:
    data, mounts = write_tokens(place / "data", 4000, FLAGS["vocab_size"]), may_mount(place / "mount")
    whole = {}
    for strategy in strategies:
        (place / strategy).mkdir()
        whole[strategy] = Trial(place / strategy, data, strategy, chance).complete()
    needs_mount = {"disk full"} | ({"read-only"} if not os.geteuid() else set())
    todo = [kill] * kills + [fault for name, fault in OTHERS.items() if mounts or name not in needs_mount] * others
    chance.shuffle(todo)
    records, number = [], 0
    while todo and time.monotonic() < deadline:
        number += 1
        folder = place / f"trial{number}"
        (folder / "out").mkdir(parents=True)
        trial = Trial(folder, data, strategies[number % len(strategies)], chance)
        if mounts:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(trial.out)], check=True)
        try:
            while todo and len(trial.records) < FAULTS_A_RUN and time.monotonic() < deadline:
                try:
                    if not todo[-1](trial):
                        break
                except Finished:  # the run was faster
                    break
                todo.pop()
                print(json.dumps(trial.records[-1]), flush=True)
            assert trial.complete() == whole[trial.strategy], f"the weights are not those of the undisturbed run ({trial.strategy})"
        finally:
            if mounts:
                subprocess.run(["umount", "-l", str(trial.out)], check=True)
        records += trial.records
        shutil.rmtree(folder)
    return records


if __name__ == "__main__":
    sys.exit(main())
