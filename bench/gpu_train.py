"""The demo recipe where requirements.txt is not met, which its shell scripts insist on: train.py itself, with the knobs that stand in them.

bench/gpu.sh train runs it in their place when, say, deepspeed is missing. Values in the environment count, as for the scripts.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {  # of train.py -> knob; the rest stands in the scripts' commands
    "my_testing": "MODEL_TYPE", "n_layer": "N_LAYER", "n_embd": "N_EMBD", "head_size": "HEAD_SIZE", "ctx_len": "CTX_LEN",
    "random_seed": "RANDOM_SEED", "my_exit_tokens": "EXIT_TOKENS", "micro_bsz": "M_BSZ", "kernel": "KERNEL", "lr_init": "LR_INIT",
    "lr_final": "LR_FINAL", "beta2": "BETA_2", "adam_eps": "ADAM_EPS", "weight_decay": "W_DECAY", "epoch_save": "EPOCH_SAVE",
    "epoch_samples": "EPOCH_SAMPLES", "save_minutes": "SAVE_MINUTES", "head_chunk": "HEAD_CHUNK", "precision": "PRECISION",
    "strategy": "STRATEGY", "grad_cp": "GRAD_CP", "compile": "COMPILE", "cuda_graphs": "CUDA_GRAPHS",
}  # fmt: skip
MISSING = "orjson, with which the data are made, is not installed, and there is no data/demo.bin; bring data/demo.* of another machine"
OTHERS = {"data_file": "data/demo", "vocab_size": "65536", "warmup_steps": "10", "devices": "1"}


def knobs(gpu: bool) -> dict[str, str]:
    """Name -> value: the environment's, else that of the scripts."""
    text = "".join((ROOT / f"demo-training-{name}.sh").read_text() for name in ("prepare", "run"))
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^knob .*$", text, re.M)]
    found = {name: values[-1] if gpu else values[0] for _, name, *values in lines}
    # as for DATA=demo on one GPU
    found |= {"EXIT_TOKENS": "0" if gpu else found["EXIT_TOKENS"], "EPOCH_SAMPLES": "500", "STRATEGY": "auto"}
    return {name: os.environ.get(name) or value for name, value in found.items()}


def main() -> int:
    gpu = os.environ.get("ACCELERATOR") != "cpu"
    given = knobs(gpu)
    folder = Path(os.environ["PROJ_DIR"])
    flags = {flag: given[knob] for flag, knob in FLAGS.items()} | OTHERS | {"proj_dir": str(folder), "accelerator": "gpu" if gpu else "cpu"}
    python = [sys.executable, str(ROOT / "train.py")]
    os.chdir(ROOT)
    if not (ROOT / "data" / "demo.bin").exists():
        if importlib.util.find_spec("orjson") is None:
            print(f"error: {MISSING}", file=sys.stderr)
            return 2
        for command in (
            ["-m", "rwkvlm", "demo_corpus", "--out", "data/demo.jsonl"],
            ["make_data.py", "data/demo.jsonl", "1", given["CTX_LEN"], "--out", "data/demo", "--val_split", "0.03"],
        ):
            if code := subprocess.run([sys.executable, *command]).returncode:
                return code
    if not (folder / "rwkv-init.pth").exists():
        first = {
            name: flags[name]
            for name in ("my_testing", "n_layer", "n_embd", "head_size", "ctx_len", "random_seed", "data_file", "vocab_size", "proj_dir")
        }
        if code := subprocess.run([*python, *_words(first | {"train_stage": "1", "accelerator": "cpu", "devices": "1"})]).returncode:
            return code
    command = [*python, *_words(flags | {"train_stage": "3"})]
    print("+", shlex.join(command), flush=True)
    os.execv(command[0], command)  # the signals of bench/gpu.py reach train.py itself


def _words(flags: dict[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


if __name__ == "__main__":
    sys.exit(main())
