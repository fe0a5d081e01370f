"""RWKV-v7/docs/new_model.md: what it says makes a model that trains, resumes and generates"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "RWKV-v7" / "docs" / "new_model.md"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository with the page's recipe and its changes."""
    root = tmp_path_factory.mktemp("new model")
    for name in ("RWKV-v7", "cuda"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "train.py", root)
    page = PAGE.read_text()
    (file,), (code,), (diff,) = (
        re.findall(r"^`(RWKV-v7/.*\.py)`:$", page, re.M),
        re.findall(r"```python\n(.*?)```", page, re.S),
        re.findall(r"```diff\n(.*?)```", page, re.S),
    )
    (root / file).write_text(code)
    subprocess.run(["git", "apply", "-"], cwd=root, input=diff, text=True, check=True)
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_the_page_is_in_the_style_that_the_tests_ask_for(checkout, command):
    pytest.importorskip("ruff")
    package = checkout / "RWKV-v7" / "rwkvlm"
    run(checkout, "-m", "ruff", *command.split(), "--no-cache", package / "config", package / "models")


def run(root: Path, *words: object) -> str:
    environment = os.environ | {"PYTHONPATH": str(root / "RWKV-v7"), "OMP_NUM_THREADS": "1", "RWKV_FP32_PRODUCTS": "highest"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:] or done.stdout[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_page_makes_a_model_that_trains_resumes_and_generates(checkout, tmp_path):
    (tmp_path / "text.txt").write_text("abcabcabd" * 400)
    flags = dict(
        data_file=tmp_path / "text.txt", data_type="utf-8", my_testing="x071", n_layer=2, n_embd=64, head_size=32, ctx_len=32,
        micro_bsz=8, my_exit_tokens=40 * 8 * 32, lr_init=5e-3, lr_final=1e-3, adam_eps=1e-8, train_stage=3, random_seed=1,
        precision="fp32", accelerator="cpu",
    )  # fmt: skip
    words = ["train.py", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    for folder, stops in (("whole", [0]), ("parts", [15, 0])):
        for stop in stops:
            said = run(checkout, *words, "--proj_dir", tmp_path / folder, "--max_steps", stop)
            assert "model     x071 L2 D64, 2 heads of 32" in said
    whole, parts = (torch.load(tmp_path / folder / "rwkv-final.pth") for folder in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert whole["blocks.1.ffn.gate.weight"].any(), "the gate is trained"
    generate = [
        "-m",
        "rwkvlm",
        "generate",
        "--model",
        tmp_path / "whole" / "rwkv-final.pth",
        "--tokenizer",
        tmp_path / "whole" / "tokenizer.json",
        "--device",
        "cpu",
    ]
    assert "abcabcab" in run(checkout, *generate, "--prompt", "abcabcabd", "--length", 8, "--top_k", 1, "--seed", 1)
