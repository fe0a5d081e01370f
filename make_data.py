"""Text to training data; see RWKV-v7/rwkvlm/cli/make_data.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "RWKV-v7"))

from rwkvlm.cli.make_data import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
