"""Launched as users do: a dead process ends the run with its name, torchrun restarts it, and two nodes train as one."""

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rwkvlm.checkpoint.pth import load_weights

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "train.py")
TWO = dict(devices=2, micro_bsz=2, save_steps=2)
LONG = TWO | dict(my_exit_tokens=4_000_000)
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start(command: list[str], log: Path, **variables: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCH_VARIABLES}
    with open(log, "w") as file:
        return subprocess.Popen(command, env=environment | {"OMP_NUM_THREADS": "1"} | variables, stdout=file, stderr=subprocess.STDOUT)


def descendants(pid: int) -> list[int]:
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return own + [below for child in own for below in descendants(child)]


def ranks_of(pid: int) -> dict[int, int]:
    """Process ids of the training processes below pid, by LOCAL_RANK."""
    found = {}
    for child in descendants(pid):
        variables = dict(item.split(b"=", 1) for item in Path(f"/proc/{child}/environ").read_bytes().split(b"\0") if b"=" in item)
        if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes() and b"LOCAL_RANK" in variables:
            found[int(variables[b"LOCAL_RANK"])] = child
    return found


def gone(pid: int, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = Path(f"/proc/{pid}/stat")
        try:
            if state.read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def wait_for_steps(out: Path, steps: int, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 240
    while time.monotonic() < end and process.poll() is None:
        if (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").read_text().count('"loss"') >= steps:
            return
        time.sleep(0.05)
    raise TimeoutError(log.read_text())


@pytest.mark.parametrize(
    "victim, signum, said",
    [
        (
            1,
            signal.SIGKILL,
            r"error: rank 1 \(\S+, process \d+\) was killed by SIGKILL; the same command goes on from the last training state\n",
        ),
        pytest.param(0, signal.SIGKILL, r"error: rank 0 \(\S+, process \d+\) died", marks=pytest.mark.slow),
        pytest.param(
            1,
            signal.SIGSTOP,
            r"error: rank 1 \(\S+, process \d+\) (has not answered|did not answer) for 15 s \(--dist_timeout\)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            0,
            signal.SIGSTOP,
            r"error: rank 0 \(\S+, process \d+\) (has not answered|did not answer) for 15 s \(--dist_timeout\)",
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_a_dead_or_frozen_process_ends_the_run_with_its_name(run, tmp_path, victim, signum, said):
    """Lightning's own launch: rank 0 is the user's process, rank 1 its child."""
    log = tmp_path / "log"
    timeout = dict(dist_timeout=15) if signum == signal.SIGSTOP else {}
    process = start([sys.executable, TRAIN, *run.argv(tmp_path / "out", **LONG, **timeout)], log)
    wait_for_steps(tmp_path / "out", 3, process, log)
    child = ranks_of(process.pid)[1]
    os.kill(process.pid if victim == 0 else child, signum)
    code = process.wait(60)
    assert gone(child) and code == (1 if victim else -signal.SIGKILL)
    text = log.read_text()
    assert re.search(said, text) and text.count("error: ") == 1 and "Traceback" not in text, text


def test_a_process_that_ends_before_it_has_begun_is_named(run, tmp_path):
    """While rank 0 waits for it to come: the exit code is in the line."""
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('LOCAL_RANK') == '1': os._exit(7)\n")
    log = tmp_path / "log"
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    process = start([sys.executable, TRAIN, *run.argv(tmp_path / "out", **TWO, train_stage=0)], log, PYTHONPATH=path)
    assert process.wait(240) == 1
    assert re.search(
        r"error: rank 1 \(process \d+\) ended with exit code 7; the same command with --train_stage 3 goes on from the last ",
        log.read_text(),
    ), log.read_text()


def test_ctrl_c_while_the_processes_meet_is_no_failure_of_one(run, tmp_path):
    """As from a terminal, to both: the first is in torch's C++ then, where Python does not hear of it, and would blame the other."""
    begun, log = tmp_path / "begun", tmp_path / "log"
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib, signal, time\nif os.environ.get('LOCAL_RANK') == '1':\n    signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        f"    pathlib.Path({str(begun)!r}).write_text(str(os.getpid()))\n    time.sleep(100)\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    process = start([sys.executable, TRAIN, *run.argv(tmp_path / "out", **TWO)], log, PYTHONPATH=path)
    while not begun.exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    time.sleep(2)
    os.kill(int(begun.read_text()), signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "error: " not in log.read_text(), log.read_text()


def test_ctrl_c_while_nodes_meet_ends_this_one(run, tmp_path, free_port):
    """It sits in torch's C++ for half an hour otherwise."""
    log, node = tmp_path / "log", dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port), NODE_RANK="0")
    process = start([sys.executable, TRAIN, *run.argv(tmp_path / "out", num_nodes=2)], log, **node)
    while "waits for 2 nodes to meet" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "error: " not in log.read_text(), log.read_text()


def test_a_process_whose_starter_dies_before_it_has_begun_ends(run, tmp_path):
    """While it imports its libraries: who has started it is not to be asked of the system then."""
    pid = tmp_path / "pid"
    (tmp_path / "sitecustomize.py").write_text(
        f"import os, pathlib\nif os.environ.get('LOCAL_RANK') == '1' and not os.path.exists({str(pid)!r}):\n"
        f"    pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\n    os.kill(os.getppid(), 9)\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    process = start([sys.executable, TRAIN, *run.argv(tmp_path / "out", **TWO)], tmp_path / "log", PYTHONPATH=path)
    assert process.wait(240) == -signal.SIGKILL
    child = int(pid.read_text())
    try:
        assert gone(child), (tmp_path / "log").read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process(run, losses, tmp_path):
    """With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, which the run script exports; the weights are those of an undisturbed run."""
    flags, weights = TWO | dict(my_exit_tokens=150 * 128), []  # long enough not to be over before it is killed
    for name, kills in (("a", 0), ("b", 2)):
        log, out = tmp_path / f"log-{name}", tmp_path / name
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "--max-restarts=3",
            TRAIN,
            *run.argv(out, **flags),
        ]
        process = start(command, log, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        for number in range(kills):
            wait_for_steps(out, 5 + 15 * number, process, log)
            os.kill(ranks_of(process.pid)[number], signal.SIGKILL)
            while (out / "metrics.jsonl").read_text().count('"run"') < number + 2:
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
        assert process.wait(300) == 0, log.read_text()
        weights.append((out / "rwkv-final.pth").read_bytes())
    assert "start     training state" in log.read_text() and losses(tmp_path / "a") == losses(tmp_path / "b") and weights[0] == weights[1]


@pytest.fixture(scope="module")
def one_node(tiny, tmp_path_factory):
    """one_node(strategy): the folder of a run of two processes on one node, made once."""

    @functools.cache
    def make(strategy: str) -> Path:
        folder = tmp_path_factory.mktemp("one")
        process = start([sys.executable, TRAIN, *tiny.argv(folder / "out", devices=2, micro_bsz=2, strategy=strategy)], folder / "log")
        assert process.wait(300) == 0, (folder / "log").read_text()
        return folder / "out"

    return make


@pytest.mark.slow
@pytest.mark.parametrize("launcher, strategy", [("torchrun", "ddp"), ("python", "deepspeed_stage_2"), ("slurm", "ddp")])
def test_two_nodes_train_as_one_with_two_processes(run, whole, one_node, losses, tmp_path, free_port, launcher, strategy):
    """Nodes on loopback.

    NODE_RANK, MASTER_ADDR and MASTER_PORT with plain python, as the run script prints it; torchrun; srun's variables.
    """
    out, started = tmp_path / "out", []
    slurm = dict(
        SLURM_STEP_ID="0",
        SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="1",
        SLURM_LOCALID="0",
        SLURM_JOB_ID="4711",
        SLURM_JOB_NAME="job",
        SLURM_NODELIST="localhost",
    )
    argv = run.argv(out, micro_bsz=2, num_nodes=2, devices=1, strategy=strategy)
    for node in range(2):
        where, command = {}, [sys.executable, TRAIN]
        if launcher == "python":
            where = dict(NODE_RANK=str(node), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port)
        elif launcher == "slurm":
            where = slurm | dict(SLURM_PROCID=str(node), SLURM_NODEID=str(node), MASTER_PORT=free_port)
        else:
            torchrun = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={node}", "--master_addr=127.0.0.1"]
            command = [sys.executable, *torchrun, f"--master_port={free_port}", TRAIN]
        started.append(start([*command, *argv], tmp_path / f"log{node}", **where))
    codes, said = [process.wait(300) for process in started], "".join((tmp_path / f"log{node}").read_text() for node in range(2))
    assert codes == [0, 0], said
    one = one_node(strategy)
    assert losses(out) == losses(one) == pytest.approx(losses(whole), rel=1e-5)
    assert (out / "rwkv-final.pth").read_bytes() == (one / "rwkv-final.pth").read_bytes() and load_weights(out / "rwkv-final.pth")
    assert said.count("2 nodes x 1 cpu") == 1


@pytest.fixture
def two_hosts():
    """Names of two network namespaces joined by a cable, 10.77.0.1 and 10.77.0.2."""
    names = [f"rwkvlm{os.getpid()}{side}" for side in "ab"]
    commands = [f"netns add {name}" for name in names] + [f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}"]
    for number, name in enumerate(names, 1):
        commands += [f"-n {name} addr add 10.77.0.{number}/24 dev cable", f"-n {name} link set cable up", f"-n {name} link set lo up"]
    try:
        for command in commands:
            done = subprocess.run(["ip", *command.split()], capture_output=True, text=True) if shutil.which("ip") else None
            if done is None or done.returncode:
                pytest.skip(f"no network namespaces can be made here: {done.stderr.strip() if done else 'no ip (iproute2)'}")
        yield names
    finally:
        for name in names if shutil.which("ip") else ():
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_hosts_whose_names_mean_loopback(run, whole, losses, tmp_path, two_hosts):
    """As Debian's /etc/hosts has it: gloo by itself would offer 127.0.0.1 to the other host. A cut cable ends both."""
    if not socket.gethostbyname(socket.gethostname()).startswith("127."):
        pytest.skip("this machine's name does not mean its loopback device")
    argv = run.argv(tmp_path / "out", micro_bsz=2, num_nodes=2, devices=1, strategy="ddp", dist_timeout=15, save_steps=2)
    for cut, codes in ((True, [1, 1]), (False, [0, 0])):
        nodes, log = [], tmp_path / f"log{cut}"
        longer = ["--my_exit_tokens", "4000000"] if cut else []
        for number, host in enumerate(two_hosts):
            where = dict(NODE_RANK=str(number), MASTER_ADDR="10.77.0.1", MASTER_PORT="29500")
            nodes.append(start(["ip", "netns", "exec", host, sys.executable, TRAIN, *argv, *longer], Path(f"{log}{number}"), **where))
        if cut:
            wait_for_steps(tmp_path / "out", 3, nodes[0], Path(f"{log}0"))
            subprocess.run(["ip", "-n", two_hosts[1], "link", "set", "cable", "down"], check=True)
        said = [(node.wait(300), Path(f"{log}{number}").read_text()) for number, node in enumerate(nodes)]
        assert [code for code, _ in said] == codes, said
        if cut:
            subprocess.run(["ip", "-n", two_hosts[1], "link", "set", "cable", "up"], check=True)
            assert all(f"error: rank {1 - number} " in text and "15 s (--dist_timeout)" in text for number, (_, text) in enumerate(said)), (
                said
            )
            shutil.rmtree(tmp_path / "out")
    assert losses(tmp_path / "out") == pytest.approx(losses(whole), rel=1e-5)
    assert "node 1 waits for 2 nodes to meet at 10.77.0.1:29500, 30 minutes at most" in said[1][1]


@pytest.mark.slow
def test_the_deepspeed_launcher(run, whole, losses, tmp_path, free_port):
    """It gives every process a --local_rank of its own."""
    argv = run.argv(tmp_path / "out", **TWO, strategy="deepspeed_stage_2")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={free_port}", TRAIN, *argv]
    process = start(command, tmp_path / "log", DS_ACCELERATOR="cpu")
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    assert losses(tmp_path / "out") == pytest.approx(losses(whole), rel=1e-5)
