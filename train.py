"""Train RWKV-7: `python train.py --help` lists the flags, demo-training-run.sh shows them in use."""

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "RWKV-v7"))

from rwkvlm.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts a background command with SIGINT ignored
    sys.exit(main(["train", *sys.argv[1:]]))
