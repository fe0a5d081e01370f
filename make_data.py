"""Text to training data: `python make_data.py demo.jsonl 3 4096`; --help lists the flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "RWKV-v7"))

from rwkvlm.cli import main

if __name__ == "__main__":
    sys.exit(main(["make_data", *sys.argv[1:]]))
