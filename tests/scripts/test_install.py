"""The package works from its checkout only: cuda/ lies beside it."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_copy_apart_from_cuda_is_refused(tmp_path):
    shutil.copytree(ROOT / "RWKV-v7" / "rwkvlm", tmp_path / "site-packages" / "rwkvlm", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-m", "rwkvlm", "--help"], cwd=tmp_path / "site-packages", env={}, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("ImportError: rwkvlm in ")
    assert "pip install -e ." in done.stderr
