"""RWKV-v7/env.sh: which interpreter it takes, what it installs, and what it says when it cannot."""

import fcntl
import shutil
import subprocess
import sys
import time

import pytest

NO_CUDA_TORCH = "__version__ = '2.13.0+cpu'\nclass version: cuda = None\n"
GPU = "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-0)'\n"


def test_syntax(shell, shell_scripts):
    assert len(shell_scripts) >= 3
    for script in shell_scripts:
        done = subprocess.run([shell, "-n", script], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", script


def test_python3_in_range_is_used_as_it_is(world, shell):
    world.install_requirements()
    done = world.start('echo "$PYTHON $ACCELERATOR"', shell)
    assert (done.returncode, done.stdout, done.stderr) == (0, "python3 cpu\n", "")
    assert not (world.root / ".venv").exists() and world.pip_calls() == []


def test_paths_may_have_any_letters_under_every_locale(world, shell):
    """With LC_ALL=C Python stops at a .pth file whose path has an é in it."""
    world.install_requirements()
    for asked, used in (("C", "C.UTF-8"), ("POSIX", "C.UTF-8"), ("en_US.UTF-8", "en_US.UTF-8"), ("", "")):
        assert world.start('echo "$LC_ALL"', shell, LC_ALL=asked).stdout == f"{used}\n"


def test_clean_machine(world, shell):
    done = world.start('echo "$PYTHON"; flock -n .venv.lock sh -c "echo the lock is free"', shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2:] == [str(world.root / ".venv/bin/python"), "the lock is free"]
    calls = world.pip_calls()
    assert "torch==2.13.0" in calls[0] and "--index-url" not in calls[0]  # the CPU index is out of reach in this world
    assert "--no-build-isolation -c .venv/constraints.txt -r requirements.txt" in calls[2]
    assert calls[-1].endswith("--no-deps --no-build-isolation -e .")


def test_second_start_installs_nothing_until_the_requirements_change(world):
    world.start()
    calls = len(world.pip_calls())
    second = world.start()
    assert (second.stdout, second.stderr, len(world.pip_calls())) == ("", "", calls)
    with open(world.root / "constraints.txt", "a") as file:
        file.write("# changed\n")
    third = world.start()
    assert third.returncode == 0 and len(world.pip_calls()) > calls
    assert not any(call.split()[-1].startswith("torch==") for call in world.pip_calls()[calls:])


def test_the_packages_of_the_tests_come_on_top(world):
    world.start()
    calls = len(world.pip_calls())
    assert world.start('"$PYTHON" -m pytest --version', WITH_TESTS="1").returncode != 0  # only metadata: pytest itself is not there
    assert any("-r tests/requirements.txt" in call for call in world.pip_calls()[calls:])
    calls = len(world.pip_calls())
    world.start()
    world.start(WITH_TESTS="1")
    assert len(world.pip_calls()) == calls


def test_torch_of_python3_is_taken_over_and_never_replaced(world):
    world.install(torch="2.12.1+cu126")
    (world.base / "torch.py").write_text("__version__ = '2.12.1+cu126'")
    done = world.start('"$PYTHON" -c "import torch; print(torch.__file__)"')
    assert done.stdout.splitlines()[-1] == str(world.base / "torch.py"), done.stderr
    assert not any(call.split()[-1].startswith("torch==") for call in world.pip_calls())
    assert "torch==2.12.1+cu126" in (world.root / ".venv/constraints.txt").read_text().splitlines()
    assert not list((world.root / ".venv" / world.packages).glob("torch-*"))


def test_torch_out_of_range_is_not_taken_over(world):
    world.install(torch="2.9.0")
    assert world.start().returncode == 0
    assert list((world.root / ".venv" / world.packages).glob("torch-2.13.0.dist-info"))


def test_index_for_torch_is_tried_first_then_the_default_one(world):
    done = world.start(TORCH_INDEX_URL="https://mirror.invalid/whl")
    assert done.returncode == 0
    assert "--index-url https://mirror.invalid/whl --no-deps torch==2.13.0" in world.pip_calls()[0]
    assert "torch==2.13.0" not in world.pip_calls()[1]


def test_index_for_torch_without_torch(world):
    world.fail_pip("mirror.invalid")
    done = world.start(TORCH_INDEX_URL="https://mirror.invalid/whl")
    assert done.returncode == 0 and "trying the default index" in done.stdout
    assert world.pip_calls()[1].endswith("-c constraints.txt torch==2.13.0")


def test_offline_is_reported_and_the_next_start_goes_on(world, shell):
    world.fail_pip("requirements.txt")
    done = world.start("echo not reached", shell)
    assert done.returncode == 2 and "not reached" not in done.stdout
    assert "ERROR: Could not find a version" in done.stderr and ".venv/setup.log" in done.stderr and "no network?" in done.stderr
    world.offline.unlink()
    calls = len(world.pip_calls())
    assert world.start(shell=shell).returncode == 0
    assert not any(call.split()[-1].startswith("torch==") for call in world.pip_calls()[calls:])


def test_python_too_old(world, shell):
    world.command("python3", '#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.18 && exit\nexit 1\n')
    done = world.start("echo not reached", shell)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: Python 3.10 or newer is needed; found: Python 3.8.18; install one")


def test_a_newer_python_beside_python3_is_found(world):
    (world.bin / "python3").rename(world.bin / "python3.12")
    world.command("python3", "#!/bin/sh\nexit 1\n")
    assert world.start().returncode == 0 and (world.root / ".venv/bin/python").exists()


def test_no_python(world):
    (world.bin / "python3").unlink()
    assert world.start().stderr.startswith("error: Python 3.10 or newer is needed; found: ")


def test_no_venv_module(world):
    world.command("python3.11", (world.bin / "python3").read_text())
    world.command("python3", '#!/bin/sh\ncase $2 in "import ensurepip"*) exit 1; esac\nexec python3.11 "$@"\n')
    done = world.start()
    assert done.returncode == 2 and "has no venv module" in done.stderr and "apt install python3-venv" in done.stderr
    assert not (world.root / ".venv").exists()


def test_failed_venv_leaves_nothing(world):
    real = (world.bin / "python3").read_text()
    world.command("python3", real.replace('"$3" && cp', '"$3" && echo disk full && exit 1 && cp'))
    done = world.start()
    assert done.returncode == 2 and "disk full" in done.stderr and not (world.root / ".venv").exists()
    world.command("python3", real)
    assert world.start().returncode == 0


def test_python_knob_is_checked_and_never_changed(world):
    world.install(torch="2.12.0")
    done = world.start(PYTHON="python3")
    assert done.returncode == 2 and "error: PYTHON=python3 lacks: deepspeed>=" in done.stderr and " torch>=" not in done.stderr
    # no pins: they would replace the torch that is there
    assert "; python3 -m pip install -r requirements.txt, or unset PYTHON: .venv is made then" in done.stderr
    assert world.pip_calls() == [] and not (world.root / ".venv").exists()
    assert "is not a Python 3.10 or newer" in world.start(PYTHON="/bin/false").stderr


@pytest.mark.parametrize("flock", [pytest.param(True, marks=pytest.mark.skipif(not shutil.which("flock"), reason="no flock here")), False])
def test_a_second_start_waits_for_the_first_and_no_longer_than_it_lives(world, flock):
    if not flock:
        (world.bin / "flock").unlink(missing_ok=True)
    hold = "import fcntl, sys; f = open('.venv.lock', 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    first = subprocess.Popen([sys.executable, "-c", hold], cwd=world.root, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    first.stdout.readline()
    env = {"PATH": str(world.bin), "https_proxy": "http://127.0.0.1:9"}
    with subprocess.Popen(["sh", "-c", ". RWKV-v7/env.sh"], cwd=world.root, env=env, stdout=subprocess.PIPE, text=True) as second:
        assert second.stdout.readline().startswith("Waiting for another start")
        for _ in range(10):
            time.sleep(0.1)
            assert second.poll() is None and not (world.root / ".venv").exists()
        first.kill()
        first.communicate()
        assert second.wait(30) == 0 and world.pip_calls()


def test_without_flock_the_lock_is_held_until_it_is_dropped(world, shell):
    (world.bin / "flock").unlink(missing_ok=True)
    world.install_requirements()
    free = """python3 -c 'import fcntl; fcntl.flock(open("lock"), fcntl.LOCK_EX | fcntl.LOCK_NB)' 2>/dev/null && echo free || echo held"""
    assert world.start(f"take_lock lock 'doing it'; {free}; drop_lock; {free}", shell).stdout == "held\nfree\n"


def test_what_another_start_has_set_up_meanwhile_is_not_set_up_again(world):
    world.start()
    calls, lock = len(world.pip_calls()), open(world.root / ".venv.lock", "a")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (world.root / ".venv").rename(world.root / "venv")
    with subprocess.Popen(
        ["sh", "-c", ". RWKV-v7/env.sh"], cwd=world.root, env={"PATH": str(world.bin)}, stdout=subprocess.PIPE, text=True
    ) as second:
        assert second.stdout.readline().startswith("Waiting for another start")
        (world.root / "venv").rename(world.root / ".venv")
        lock.close()
        assert second.wait(30) == 0
    assert len(world.pip_calls()) == calls


def test_listed_gpu_that_torch_cannot_use_stops_with_the_cure(world, shell):
    world.install_requirements()
    (world.base / "torch.py").write_text(NO_CUDA_TORCH)
    world.command("nvidia-smi", GPU)
    done = world.start("echo not reached", shell)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.startswith("error: there is a GPU, but torch 2.13.0+cpu") and "--force-reinstall torch==2.13.0" in done.stderr
    chosen = world.start('echo "$ACCELERATOR"', shell, ACCELERATOR="cpu")
    assert (chosen.returncode, chosen.stdout) == (0, "cpu\n")


def test_a_listed_gpu_is_used(world):
    world.install_requirements()
    world.add_gpu()
    knobs = 'knob M_BSZ 4 16; knob N_LAYER 6 12; knob WANDB "" ""; echo "$ACCELERATOR $M_BSZ $N_LAYER [$WANDB]"'
    assert world.start(knobs, N_LAYER="3").stdout == "gpu 16 3 []\n"
    assert world.start(knobs, N_LAYER="3", ACCELERATOR="cpu").stdout == "cpu 4 3 []\n"


def test_no_cpu_build_is_sought_where_there_is_a_gpu(world):
    world.command("nvidia-smi", GPU)
    begin = time.monotonic()
    world.start("exit 0")
    assert "--index-url" not in world.pip_calls()[0] and time.monotonic() - begin < 20


def test_a_gpu_without_a_toolkit_gets_nvcc(world, shell):
    world.add_gpu()
    world.install(torch="2.13.0")
    world.fail_pip("cuda-toolkit")
    done = world.start('echo "$ACCELERATOR"', shell)
    assert (done.returncode, done.stderr, done.stdout.splitlines()[-1]) == (0, "", "gpu")
    assert "not to be had (.venv/setup.log says why): the kernels will run in plain PyTorch" in done.stdout
    assert world.pip_calls()[-1].endswith("-c .venv/constraints.txt cuda-toolkit[nvcc,nvvm,crt,cccl,cudart]==13.0.*")


@pytest.mark.parametrize("has", ["nvcc", "torch built for CUDA 12", "CUDA_HOME"])
def test_nvcc_is_not_installed_where_there_is_one_or_none_to_be_had(world, has):
    world.add_gpu()
    world.install(torch="2.13.0")
    if has == "nvcc":
        world.command("nvcc", "#!/bin/sh\n")
    elif has != "CUDA_HOME":
        (world.base / "torch.py").write_text((world.base / "torch.py").read_text().replace("'13.0'", "'12.8'"))
    elsewhere = {"CUDA_HOME": "/elsewhere"} if has == "CUDA_HOME" else {}
    assert world.start(**elsewhere).returncode == 0 and not any("cuda-toolkit" in call for call in world.pip_calls())


def test_the_cpu_build_is_sought_where_the_gpu_is_not_wanted(world):
    world.command("nvidia-smi", GPU)
    (world.root / "web").mkdir()
    (world.root / "web" / "sitecustomize.py").write_text(
        "import urllib.request\nurllib.request.urlopen = lambda address, timeout: address\n"
    )
    world.start("exit 0", ACCELERATOR="cpu", PYTHONPATH=str(world.root / "web"))
    assert "--index-url https://download.pytorch.org/whl/cpu" in world.pip_calls()[0]


def test_accelerator_that_is_not_there(world):
    world.install_requirements()
    assert "ACCELERATOR=gpu, but there is no GPU" in world.start(ACCELERATOR="gpu").stderr
    assert "ACCELERATOR=tpu is not known" in world.start(ACCELERATOR="tpu").stderr


@pytest.mark.parametrize("signal, status", [("TERM", 143), ("HUP", 143), ("INT", 130)])
def test_signals_reach_the_command_and_its_status_comes_back(world, shell, signal, status):
    world.install_requirements()
    child = (
        "import os, signal, sys, time\n"
        "def stop(number, frame): os.write(1, b'saved\\n'); time.sleep(0.3); sys.exit(128 + number)\n"
        "signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)\n"
        "print('ready', flush=True); time.sleep(30)\n"
    )
    (world.root / "child.py").write_text(child)
    script = ". RWKV-v7/env.sh\nforward_signals $PYTHON child.py\nstatus=$?\necho status $status\nexit $status\n"
    process = subprocess.Popen([shell, "-c", script], cwd=world.root, env={"PATH": str(world.bin)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    subprocess.run(["sh", "-c", f"kill -{signal} {process.pid}"], check=True)
    rest = process.communicate(timeout=20)[0]
    assert rest == f"saved\nstatus {status}\n" and process.returncode == status


@pytest.mark.parametrize("signal, status", [("TERM", 143), ("INT", 130), ("USR1", 0)])
def test_what_follows_a_command_that_missed_the_signal_does_not_begin(world, shell, signal, status):
    """As Python misses a Ctrl-C while it starts: to a command in the background it is ignored until Python says otherwise."""
    world.install_requirements()
    script = f"forward_signals sh -c 'trap \"\" {signal}; kill -{signal} $PPID; sleep 0.2'\necho $? $status"
    assert world.start(script, shell).stdout == f"{status} {status}\n"


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
@pytest.mark.parametrize("bash", [["bash"], ["bash", "--posix"]], ids=" ".join)  # the latter is sh on some machines
@pytest.mark.parametrize(
    "moment",
    ["child=*) kill -TERM $$ ;;", "wait* | 'kill -0'*) [ ! -e ready ] || sleep 1 ;;", "wait*) [ -e waited ] || { : >waited; sleep 1; } ;;"],
)
def test_signals_at_any_moment(world, bash, moment):
    """Before the shell knows the command that it has started, which went on alone then.

    And one that has ended before the shell waits again, whose status was lost; and before the shell waits first.
    """
    world.install_requirements()
    asks = "" if "child" in moment else "os.kill(os.getppid(), signal.SIGTERM); "
    (world.root / "child.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        f"pathlib.Path('ready').touch(); {asks}time.sleep(30)\n"
    )
    trap = f"trap 'case $BASH_COMMAND in {moment.replace(chr(39), chr(34))} esac' DEBUG"
    script = f". RWKV-v7/env.sh\nset -T\n{trap}\nforward_signals $PYTHON child.py\n"
    done = subprocess.run([*bash, "-c", script], cwd=world.root, env={"PATH": str(world.bin)}, timeout=60)
    assert done.returncode in ((7, 143) if "child" in moment else (7,))


def test_exit_status_passes_through_without_signals(world):
    world.install_requirements()
    assert world.start("forward_signals sh -c 'exit 7'\nexit $?").returncode == 7
    assert world.start("forward_signals true && echo fine").stdout == "fine\n"
    ended = world.start("forward_signals true\nkill -TERM $$\necho not reached")
    assert (ended.returncode, ended.stdout) == (-15, ""), "signals are the script's own again"
