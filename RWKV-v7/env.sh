# Finds or makes the Python interpreter, and says what the machine has. POSIX sh; every script sources it from the repository's root.
#
# Reads  PYTHON           interpreter to use; never changed, it must have all of requirements.txt (default: .venv, then python3)
#        TORCH_INDEX_URL  package index tried first for torch
#        ACCELERATOR      cpu: use the CPU although a GPU is there; gpu: insist on the GPU
#        WITH_TESTS       1: the packages of tests/requirements.txt too
# Sets   PYTHON PYTHONPATH ACCELERATOR, and defines knob() and forward_signals() for the scripts.
#
# python3 is used as it is when it meets requirements.txt. Otherwise .venv is made, and a torch within range is taken over from
# python3, not installed again. A stamp in .venv makes every later start skip all of this.

# Paths may have any letters; with LC_ALL=C Python and setuptools would read and write those of .venv's .pth files as ASCII.
case ${LC_ALL:-} in C | POSIX) export LC_ALL=C.UTF-8 ;; esac

ROOT=$PWD
CPU_INDEX=https://download.pytorch.org/whl/cpu
LOG=$ROOT/.venv/setup.log
REQUIREMENTS=requirements.txt
[ -z "${WITH_TESTS:-}" ] || REQUIREMENTS="requirements.txt tests/requirements.txt"

die() { # as the commands of rwkvlm do: one line that says what is wrong and the cure, exit code 2
    printf 'error: %s\n' "$1" >&2
    exit 2
}

one_line() { printf %s "$1" | tr '\n' ','; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

lacking() { "$1" RWKV-v7/requirements_met.py $REQUIREMENTS; } # prints what is missing; true when nothing is

lacks_torch() { "$1" RWKV-v7/requirements_met.py requirements.txt | grep '^torch[<>=!]' >/dev/null; } # missing, or out of range

gpu_listed() {
    [ "${ACCELERATOR:-}" != cpu ] || return 1
    if command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep '^GPU ' >/dev/null
    else
        for device in /dev/nvidia[0-9]*; do [ ! -e "$device" ] || return 0; done # a container without the driver's tools
        return 1
    fi
}

stamp() { echo "$(cat pyproject.toml constraints.txt "$@" | cksum) $* $ROOT"; } # files of requirements

is_set_up() { [ -x .venv/bin/python ] && grep -qxF "$(stamp $REQUIREMENTS)" .venv/stamps 2>/dev/null; }

take_lock() { # FILE, what another start is doing: one at a time on all nodes that see FILE; the lock goes with the process that holds it, however that ends
    exec 9>>"$1"
    lock -n || {
        echo "Waiting for another start that is $2; its lock is $1"
        lock
    }
}

lock() { # what exec has opened as 9; -n: or fails at once
    if command -v flock >/dev/null; then
        flock "$@" 9
    else # macOS: Python locks what this shell has open
        [ -n "${PYTHON:-}" ] || find_base
        "${PYTHON:-$BASE}" -c 'import fcntl, sys
try: fcntl.flock(9, fcntl.LOCK_EX | (fcntl.LOCK_NB if sys.argv[1:] else 0))
except BlockingIOError: sys.exit(1)' "$@"
    fi
}

drop_lock() { exec 9>&-; }

find_base() { # sets BASE: python3, or a newer one beside it
    for BASE in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        new_enough "$BASE" && return
    done
    found=$(python3 --version 2>&1) || found="no python3"
    die "Python 3.10 or newer is needed; found: $found; install one, or set PYTHON= to an interpreter that has requirements.txt"
}

make_venv() {
    [ ! -e .venv ] || die ".venv is there, but has no bin/python; remove the folder .venv and start again"
    "$BASE" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$BASE has no venv module; apt install python3-venv (Debian, Ubuntu), or set PYTHON= to an interpreter that has requirements.txt"
    echo "Making .venv with $("$BASE" --version 2>&1) (once; details in .venv/setup.log)"
    reason=$("$BASE" -m venv .venv 2>&1) || {
        rm -rf .venv # made by the line above; half a .venv would be mistaken for a whole one
        die "$BASE -m venv .venv failed: $(printf %s "$reason" | tail -n 1); free some disk space, or set PYTHON= to an interpreter that has requirements.txt"
    }
    # A torch within range is taken over: its folder is put behind .venv's own on the search path, whether it belongs to the
    # system, to the user, to conda or to another venv.
    lacks_torch "$BASE" ||
        "$BASE" -c 'from importlib.metadata import distribution as d; print(d("torch").locate_file(""))' >"$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/torch_of_base.pth"
}

pip_install() { "$ROOT/.venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >>"$LOG" 2>&1; }

pip_or_die() { # what is installed, then pip's arguments
    echo "  installing $1"
    what=$1
    shift
    pip_install "$@" || {
        echo "pip's last lines (all of them: .venv/setup.log):" >&2
        grep -v '^WARNING: ' "$LOG" | tail -n 6 >&2
        die "installing $what failed; no network? set PIP_INDEX_URL and TORCH_INDEX_URL to a mirror, or PYTHON= to an interpreter that has requirements.txt. The next start goes on from here"
    }
}

reachable() { # a web address answers within 5 seconds (name look-up included, hence the thread)
    .venv/bin/python -c 'import os, sys, threading, urllib.request
def ask():
    try: urllib.request.urlopen(sys.argv[1], timeout=5); os._exit(0)
    finally: os._exit(1)
threading.Thread(target=ask, daemon=True).start(); threading.Event().wait(5); os._exit(1)' "$1" 2>/dev/null
}

install_torch() {
    torch=$(grep '^torch==' constraints.txt)
    index=${TORCH_INDEX_URL:-}
    [ -n "$index" ] || gpu_listed || { reachable "$CPU_INDEX/" && index=$CPU_INDEX; }
    if [ -n "$index" ]; then # --no-deps: its dependencies come from the default index, in the versions of constraints.txt
        echo "  installing $torch from $index"
        pip_install --index-url "$index" --no-deps "$torch" && return
        echo "  not to be had there; trying the default index"
    fi
    pip_or_die "$torch" -c constraints.txt "$torch"
}

set_up() {
    [ -x .venv/bin/python ] || { find_base; make_venv; }
    .venv/bin/python -c '' 2>/dev/null || die ".venv/bin/python does not start (its base interpreter may be gone); remove the folder .venv and start again"
    lacks_torch .venv/bin/python && install_torch
    # torch stays as it is, whatever version within the range it has
    kept=$(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))')
    sed "s/^torch==.*/torch==$kept/" constraints.txt >.venv/constraints.txt
    # deepspeed has no wheel. Its build imports torch, so it has to see the torch above, not one of its own; kernels are not prebuilt,
    # and with DS_ACCELERATOR=cpu it does not ask for nvcc either.
    pip_or_die "setuptools, wheel" -c .venv/constraints.txt setuptools wheel
    files=
    for file in $REQUIREMENTS; do files="$files -r $file"; done
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip_or_die "$REQUIREMENTS (one or two minutes)" --no-build-isolation -c .venv/constraints.txt $files
    pip_or_die "rwkvlm, this repository (editable)" --no-deps --no-build-isolation -e .
    add_nvcc
    missing=$(lacking .venv/bin/python) || die "after the installation .venv still lacks: $(one_line "$missing"); see .venv/setup.log"
    { stamp requirements.txt && stamp $REQUIREMENTS; } >.venv/stamps
}

add_nvcc() { # where a GPU has no CUDA toolkit; without it plain PyTorch computes, slower, and says so
    [ -z "${CUDA_HOME:-}" ] && gpu_listed || return 0
    package=$(PYTHONPATH=RWKV-v7 .venv/bin/python -c 'from rwkvlm import native; print("" if native.nvcc() else native.nvcc_package())' 2>>"$LOG")
    [ -n "$package" ] || return 0
    echo "  installing nvcc, for the CUDA kernels"
    pip_install -c .venv/constraints.txt "$package" || echo "  not to be had (.venv/setup.log says why): the kernels will run in plain PyTorch, much slower, and name the cure"
}

find_python() { # sets PYTHON
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || die "PYTHON=$PYTHON is not a Python 3.10 or newer; set another one, or unset PYTHON: .venv is made then"
        missing=$(lacking "$PYTHON") || die "PYTHON=$PYTHON lacks: $(one_line "$missing"); $PYTHON -m pip install$(printf -- ' -r %s' $REQUIREMENTS), or unset PYTHON: .venv is made then" # with -c constraints.txt pip would replace a torch within range
    elif is_set_up; then
        PYTHON=$ROOT/.venv/bin/python
    elif [ ! -e .venv ] && new_enough python3 && lacking python3 >/dev/null; then
        PYTHON=python3
    else
        (: >>.venv.lock) 2>/dev/null || die "cannot write in $ROOT, where .venv has to be made; make it writable, or set PYTHON= to an interpreter that has requirements.txt"
        take_lock .venv.lock "setting up .venv"
        is_set_up || set_up # the start that held the lock may have done it
        drop_lock
        PYTHON=$ROOT/.venv/bin/python
    fi
}

knob() { # NAME VALUE_ON_CPU VALUE_ON_GPU: an exported variable, unless the environment has set it already
    value=$2
    [ "$ACCELERATOR" = cpu ] || value=$3
    eval "[ -n \"\${$1+set}\" ] || $1=\$value"
    export "$1"
}

forward_signals() { # runs a command to its end; SIGTERM, SIGINT and SIGUSR1 go on to it, so that it can save; returns its exit status
    asked= stop=0 child= status=
    trap 'asked=TERM stop=143; pass_on' TERM HUP # before the command is there: without it this shell would end and leave the command alone
    trap 'asked=INT stop=130; pass_on' INT
    trap 'asked=USR1; pass_on' USR1
    "$@" &
    child=$!
    pass_on
    while :; do
        asked=
        wait $child
        ended=$?
        [ $ended = 127 ] && [ -n "$status" ] || status=$ended # 127: it had ended when the signal came, and bash as sh knows it no longer
        [ -n "$asked" ] || break # a signal ends wait, not the command
    done
    trap - TERM HUP INT USR1
    [ $status -ne 0 ] || status=$stop # it has ended well all the same: a Ctrl-C while Python starts is lost on it; what follows shall not begin
    return $status
}

pass_on() { [ -z "$asked" ] || [ -z "$child" ] || kill -$asked $child 2>/dev/null; } # it may have ended meanwhile

find_python
PYTHONPATH=$ROOT/RWKV-v7${PYTHONPATH:+:$PYTHONPATH}
export PYTHON PYTHONPATH
machine=$("$PYTHON" -m rwkvlm machine --accelerator "${ACCELERATOR:-auto}") || exit
eval "$machine"
export ACCELERATOR
