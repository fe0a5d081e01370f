"""Pairs of runs of run.sh: `python compare.py OUT`. Losses step by step, and weights: how far apart, as a share of the way from the initial ones; the losses of all go to losses.json."""

import json
import math
import sys
from pathlib import Path

import torch

OUT = Path(sys.argv[1])
PAIRS = [
    ("official_fp32_other", "official_fp32"), ("official_fp32", "ours_fp32"), ("official_two", "official_fp32"), ("official_two", "ours_two"), ("official_goes_on", "ours_goes_on"),
    ("official_fp32", "official_bf16"), ("official_bf16", "ours_bf16"), ("official_bf16", "ours_bf16_ddp"), ("ours_bf16", "ours_bf16_ddp"), ("ours_fp32", "ours_bf16"),
]  # fmt: skip


def steps(name):
    own, theirs = OUT / name / "metrics.jsonl", sorted(OUT.glob(f"program-{name}*/metrics.jsonl"))
    lines = map(json.loads, (own if own.exists() else theirs[0]).read_text().splitlines())
    return {line["step"]: line for line in lines if "loss" in line}


def weights(name):
    """fp32 where there are such: in an official file of an fp32 run, in the pieces of our training state."""
    pieces = {}
    for path in (OUT / name).glob("state/step80/rank*"):
        for key, entry in torch.load(path)["tensors"].items():
            if "master" in entry:
                pieces.setdefault(key, []).append((entry["start"], entry["master"]))
    found = {key: torch.cat([x for _, x in sorted(parts, key=lambda part: part[0])]) for key, parts in pieces.items()}
    return found or {key: x.float().flatten() for key, x in torch.load(OUT / name / "rwkv-final.pth").items()}


def norm(a, b):
    return math.sqrt(sum((a[key] - b[key]).square().sum().item() for key in a if key in b))


initial = {key: x.float().flatten() for key, x in torch.load(OUT / "init" / "rwkv-init.pth").items()}
for a, b in PAIRS:
    one, other = steps(a), steps(b)
    assert one.keys() == other.keys() and all(one[n]["tokens"] == other[n]["tokens"] for n in one)
    apart = [abs(one[n]["loss"] - other[n]["loss"]) for n in one]
    last = [sum(run[n]["loss"] for n in sorted(run)[-20:]) / 20 for run in (one, other)]
    rates = max(abs(one[n]["lr"] / other[n]["lr"] - 1) for n in one)
    first, second = weights(a), weights(b)
    print(
        f"{a} / {b}: {len(one)} steps, losses {max(apart):.1e} apart at most, {sum(apart) / len(apart):.1e} on average, last 20 steps {last[0]:.5f} {last[1]:.5f}, "
        f"lr {rates:.0e}, weights {norm(first, second) / norm(first, initial):.1e} of the way"
    )
names = dict.fromkeys(name for pair in PAIRS for name in pair)
(Path(__file__).parent / "losses.json").write_text(
    json.dumps({name: [round(steps(name)[n]["loss"], 7) for n in sorted(steps(name))] for name in names}) + "\n"
)
