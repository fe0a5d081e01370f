"""The losses of the first mini-epochs of MiniPile against the published ones. bench/minipile_losses.sh calls it. Standard library only.

Exit codes: 0 every mini-epoch that was asked for is there and within the tolerance, 1 one is not within it, 2 it cannot
start, 3 some are missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Mini-epochs 0 to 11 of L12-D768, ctx 512, micro_bsz 16, lr 6e-4 to 6e-5, weight decay 1e-3: the README of RWKV-LM's RWKV-v7/train_temp.
PUBLISHED = (4.875856, 4.028621, 3.801625, 3.663070, 3.578974, 3.510906, 3.462345, 3.412196, 3.376724, 3.336911, 3.313411, 3.295895)
TOLERANCE = 0.01
RECIPE = {
    "DATA": "minipile", "MODEL_TYPE": "x070", "N_LAYER": "12", "N_EMBD": "768", "CTX_LEN": "512", "M_BSZ": "16", "LR_INIT": "6e-4",
    "LR_FINAL": "6e-5", "W_DECAY": "0.001", "BETA_2": "0.99", "ADAM_EPS": "1e-18", "EPOCH_SAMPLES": "40320", "GPU_PER_NODE": "1",
    "N_NODE": "1", "PROMPT": "", "ACCELERATOR": "gpu",
}  # fmt: skip


def losses(folder: Path) -> dict[int, float]:
    """Mini-epoch -> loss, of train_log.txt; of one that was written twice the last counts."""
    path = folder / "train_log.txt"
    text = path.read_text(errors="replace") if path.exists() else ""
    return {int(epoch): float(loss) for epoch, loss in re.findall(r"^(\d+) (\d+\.\d+) \d+\.\d+ \d\.\d+ \S+ \S+ \d+$", text, re.M)}


def compare(folder: Path, count: int) -> int:
    """Prints a table; returns the exit code."""
    found, code = losses(folder), 0
    print("mini-epoch  published       ours  difference")
    for epoch, published in enumerate(PUBLISHED[:count]):
        ours = found.get(epoch)
        if ours is None:
            print(f"{epoch:10}  {published:9.6f}    missing")
            code = code or 3
        else:
            off = ours - published
            print(
                f"{epoch:10}  {published:9.6f}  {ours:9.6f}  {off:+10.6f}" + ("" if abs(off) <= TOLERANCE else f"  more than {TOLERANCE}")
            )
            code = code if abs(off) <= TOLERANCE else 1
    return code


def train(folder: Path, count: int, command: list[str]) -> int:
    """Runs the recipe until its mini-epochs are there; returns its exit code, or 0 where this has stopped it."""
    environment = os.environ | RECIPE | {"PROJ_DIR": str(folder), "PYTHON": sys.executable}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)

    def stop(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.killpg(process.pid, signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        while process.poll() is None:
            if len([e for e in losses(folder) if e < count]) == count:
                stop()
                process.wait()
                return 0
            time.sleep(1.0)
        return process.returncode
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", type=Path, metavar="DIR", help="of a run that has been, or is still going on")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "minipile-losses")
    options = parser.parse_args(arguments)
    count = int(os.environ.get("MINI_EPOCHS") or len(PUBLISHED))
    if not 1 <= count <= len(PUBLISHED):
        print(f"error: MINI_EPOCHS={count}: 1 to {len(PUBLISHED)} have been published", file=sys.stderr)
        return 2
    if options.compare:
        return compare(options.compare, count)
    if not all((ROOT / "data" / f"minipile.{kind}").exists() for kind in ("bin", "idx")):
        print("error: there is no data/minipile.bin and .idx; DATA=minipile ./demo-training-prepare.sh fetches them", file=sys.stderr)
        return 2
    code = 0 if len(losses(options.out)) >= count else train(options.out.resolve(), count, [str(ROOT / "demo-training-run.sh")])
    return compare(options.out, count) or (3 if code else 0)


if __name__ == "__main__":
    sys.exit(main())
