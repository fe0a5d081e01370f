"""Train RWKV-7: `python train.py --help` lists the flags, demo-training-run.sh shows them in use."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "RWKV-v7"))

from rwkvlm.cli import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
