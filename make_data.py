"""Text to training data: `python make_data.py demo.jsonl 3 4096`; --help lists the flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "RWKV-v7"))

from rwkvlm.cli import run

if __name__ == "__main__":
    run(["make_data", *sys.argv[1:]])
