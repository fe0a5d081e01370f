"""A small world for the shell scripts: a copy of env.sh beside fake python3, pip and nvidia-smi, without a network."""

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = [
    "sh",
    "bash",
    "dash",
    "cat",
    "cksum",
    "cut",
    "env",
    "flock",
    "grep",
    "sed",
    "mkdir",
    "rm",
    "cp",
    "sleep",
    "tail",
    "tr",
    "dirname",
    "readlink",
    "wc",
]
CUDA_TORCH = """
__version__ = '2.13.0'
class version: cuda = '13.0'
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 2)
    get_device_capability = staticmethod(lambda i: (9, 0))
    get_arch_list = staticmethod(lambda: ['sm_80', 'sm_90'])
"""
FAKE_PIP = """
import pathlib, re, site, sys
here = pathlib.Path(site.getsitepackages()[0])
with open({log!r}, "a") as log:
    print(*sys.argv[1:], file=log)
if pathlib.Path({offline!r}).exists() and pathlib.Path({offline!r}).read_text() in " ".join(sys.argv):
    sys.exit("ERROR: Could not find a version that satisfies the requirement")
args, names, pins = sys.argv[2:], [], {{}}
while args:
    arg = args.pop(0)
    if arg in ("-r", "-c"):
        lines = [line.partition(";")[0].strip() for line in open(args.pop(0)) if line.strip() and not line.startswith("#")]
        names += lines if arg == "-r" else []
        pins.update(line.split("==") for line in lines if arg == "-c")
    elif arg in ("--index-url", "-e"):
        args.pop(0)
    elif not arg.startswith("-"):
        names.append(arg)
from importlib.metadata import PackageNotFoundError, version
for name in names:
    package = re.match("[A-Za-z0-9._-]+", name)[0]
    wanted = name.split("==")[1] if "==" in name else pins[package]
    try:
        if version(package) == wanted: continue
    except PackageNotFoundError: pass
    info = here / f"{{package.replace(chr(45), chr(95))}}-{{wanted}}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {{package}}\\nVersion: {{wanted}}\\n")
"""
FAKE_TRAIN = """
import json, os, pathlib, signal, sys, time
with open("calls", "a") as log:
    print(json.dumps([pathlib.Path(sys.argv[0]).stem, *sys.argv[1:]]), file=log)
if "train_stage" in str(sys.argv):
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    folder = pathlib.Path(flags["--proj_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ("rwkv-init.pth" if flags["--train_stage"] == "1" else "rwkv-final.pth")).touch()
    if flags["--train_stage"] == "3" and pathlib.Path("status").exists():
        sys.exit(int(pathlib.Path("status").read_text()))
"""
FAKE_COMMAND = """
import json
def main(argv):
    with open("calls", "a") as log:
        print(json.dumps([__name__.rpartition(".")[2], *argv]), file=log)
    return 0
"""
PYTHON3 = """#!/bin/sh
# Behaves as python3, but a venv that it makes has the fake pip, and takes milliseconds.
if [ "$1 $2" = "-m venv" ]; then
    "{python}" -m venv --without-pip "$3" && cp -r "{pip}" "$3/{packages}/pip"
else
    exec "{python}" "$@"
fi
"""


class World:
    """`root` is a checkout with the files of the set-up; `base` the packages of its python3, none at first."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.pip_log, self.offline = folder / "a checkout", folder / "bin", folder / "pip.log", folder / "offline"
        for name in (
            "RWKV-v7/env.sh",
            "RWKV-v7/requirements_met.py",
            "requirements.txt",
            "constraints.txt",
            "pyproject.toml",
            "tests/requirements.txt",
        ):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        package = self.root / "RWKV-v7" / "rwkvlm"
        shutil.copytree(ROOT / "RWKV-v7" / "rwkvlm" / "config", package / "config", ignore=shutil.ignore_patterns("__pycache__"))
        (package / "cli").mkdir()
        (self.root / "cuda").mkdir()
        for name in ("__init__.py", "__main__.py", "native.py", "cli/__init__.py", "cli/flags.py", "cli/machine.py"):
            shutil.copy(ROOT / "RWKV-v7" / "rwkvlm" / name, package / name)
        native = package / "native.py"
        native.write_text(native.read_text().replace("/usr/local/cuda", str(self.root / "no toolkit")))
        self.bin.mkdir()
        for tool in TOOLS:
            if shutil.which(tool):
                (self.bin / tool).symlink_to(shutil.which(tool))
        venv.create(folder / "base", with_pip=False, symlinks=True)
        self.packages = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        self.base = folder / "base" / self.packages
        (folder / "pip").mkdir()
        (folder / "pip" / "__main__.py").write_text(FAKE_PIP.format(log=str(self.pip_log), offline=str(self.offline)))
        self.command("nvidia-smi", "#!/bin/sh\nexit 9\n")  # without it the machine's /dev would be looked at
        self.command("python3", PYTHON3.format(python=folder / "base" / "bin" / "python", pip=folder / "pip", packages=self.packages))

    def add_scripts(self) -> None:
        """The demo scripts, beside a train.py, a make_data.py and commands that only write down how they were called."""
        for script in ROOT.glob("demo-training-*.sh"):
            shutil.copy(script, self.root)
        for name in ("train.py", "make_data.py"):
            (self.root / name).write_text(FAKE_TRAIN)
        for name in ("demo_corpus", "download", "generate"):
            (self.root / "RWKV-v7/rwkvlm/cli" / f"{name}.py").write_text(FAKE_COMMAND)
        self.install_requirements()

    def run(self, script: str, shell: str = "sh", **environment: str) -> subprocess.CompletedProcess:
        """Calls a script from another folder."""
        env = {"PATH": str(self.bin), "HOME": str(self.root), **environment}
        return subprocess.run([shell, f"../{self.root.name}/{script}"], cwd=self.bin, env=env, capture_output=True, text=True, timeout=60)

    def calls(self) -> list[list[str]]:
        """What train.py, make_data.py and the commands were called with since the last question."""
        log = self.root / "calls"
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def add_gpu(self) -> None:
        (self.base / "torch.py").write_text(CUDA_TORCH)
        self.command("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-0)'\n")

    def command(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def install(self, **versions: str) -> None:
        """Puts the metadata of packages into python3."""
        for name, version in versions.items():
            info = self.base / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def install_requirements(self) -> None:
        names = [line.split(">=")[0] for line in (ROOT / "requirements.txt").read_text().splitlines()]
        pins = dict(
            line.split(";")[0].split("==") for line in reversed((ROOT / "constraints.txt").read_text().splitlines()) if "==" in line
        )
        self.install(**{name: pins[name] for name in names})

    def fail_pip(self, when: str) -> None:
        """pip fails from now on when its arguments contain this text; "" means always."""
        self.offline.write_text(when)

    def start(self, then: str = "", shell: str = "sh", **environment: str) -> subprocess.CompletedProcess:
        """Sources env.sh as a script does, then runs `then`. There is no network: the proxy refuses."""
        env = {"PATH": str(self.bin), "HOME": str(self.root), "https_proxy": "http://127.0.0.1:9", **environment}
        return subprocess.run(
            [shell, "-c", f". RWKV-v7/env.sh\n{then}"], cwd=self.root, env=env, capture_output=True, text=True, timeout=60
        )

    def pip_calls(self) -> list[str]:
        return self.pip_log.read_text().splitlines() if self.pip_log.exists() else []


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


@pytest.fixture(params=["sh", "dash", "bash"])
def shell(request):
    if not shutil.which(request.param):
        pytest.skip(f"no {request.param} here")
    return request.param


@pytest.fixture
def shell_scripts():
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.sh", ".ci/run"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return [*ROOT.glob("*.sh"), ROOT / "RWKV-v7" / "env.sh", ROOT / ".ci" / "run"]
    return [ROOT / name for name in listed.stdout.split() if os.path.exists(ROOT / name)]
