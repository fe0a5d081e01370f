"""Multi-query associative recall: pairs of a key and a value, then every key once more, each to be answered with its value.

    python bench/recall.py make --seed 1 --samples 20000 --out data/recall.npy       for train.py --data_type numpy --ctx_len 4*PAIRS
    python bench/recall.py evaluate out/recall/rwkv7-1 --out recall.json             all rwkv-*.pth of a run, at the answers alone

    k1 v1 k2 v2 ... | k7 v7 k3 v3 ...      a sequence is 4 * PAIRS tokens: PAIRS pairs, then the same in another order

Keys differ within a sequence; which value belongs to a key is drawn anew in each, so that nothing can be learned by heart.
Token 0, the end of a document, does not occur; 1 to KEYS are keys, the next VALUES values. Sequence n of a seed is a pure
function of (seed, n).

What is trained on is a mixture: a sequence begins with PAIRS pairs, or half as many, or a quarter, ... down to 4, each as
likely; then it asks for all of them, and again in another order, until it is 4 * PAIRS tokens long. From whole tasks of 24
pairs alone a small RWKV-7 learned nothing in 4 million tokens; the short ones teach it to recall, and they are full of
answers. What is evaluated is each number of pairs, every key asked for once.

Source: "Zoology" (arXiv 2312.04927). There the loss is taken at the answers alone; the trainer here takes it at all tokens,
of which the keys and the first values cannot be foreseen, so a training loss falls to a floor far above 0. `evaluate` reads
the answers alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from rwkvlm.checkpoint.pth import load_weights, model_from
from rwkvlm.config import UserError
from rwkvlm.models import LanguageModel

HELD_OUT = 1_000_000  # the seed of what is evaluated; seeds of training lie below
BLOCK = 256  # sequences made together
SHORTEST = 4  # pairs of the smallest task in the mixture
QUARTERS = 4


@dataclass(frozen=True)
class Task:
    """pairs in a sequence; keys and values: how many different ones there are."""

    pairs: int = 32
    keys: int = 64
    values: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.keys:
            raise UserError(f"--pairs {self.pairs} must lie between 1 and --keys {self.keys}: keys differ within a sequence")
        if self.values < 2:
            raise UserError(f"--values {self.values} must be at least 2")
        if self.vocabulary > 1 << 16:
            raise UserError(f"--keys {self.keys} and --values {self.values} are more than 65535 tokens; use fewer")

    @property
    def vocabulary(self) -> int:
        return 1 + self.keys + self.values

    @property
    def length(self) -> int:
        return 4 * self.pairs


def sequences(task: Task, seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` sequences of a seed, uint16 [count, task.length].

    And in which place of a sequence's pairs each query's pair stood, [count, task.pairs].
    """
    blocks = [_block(task, seed, n) for n in range(-(-count // BLOCK))]
    tokens, order = (np.concatenate(parts)[:count] for parts in zip(*blocks))
    return tokens, order


def levels(task: Task) -> list[Task]:
    """The tasks of a mixture: task itself, one of half as many pairs, of a quarter, ... while it is a whole number >= SHORTEST."""
    found = [task]
    while found[-1].pairs % 2 == 0 and found[-1].pairs >= 2 * SHORTEST:
        found.append(replace(task, pairs=found[-1].pairs // 2))
    return found


def mixture(task: Task, seed: int, count: int) -> np.ndarray:
    """The first `count` training sequences of a seed, uint16 [count, task.length].

    The pairs of one of levels(task), then questions to the end.
    """
    parts, blocks = levels(task), []
    for n in range(-(-count // BLOCK)):
        drawn = np.random.default_rng([seed, n]).integers(len(parts), size=BLOCK)
        tokens = np.empty((BLOCK, task.length), dtype=np.uint16)
        for level, part in enumerate(parts):
            rows, _ = _block(part, seed, n, level, rounds=(2 << level) - 1)
            tokens[drawn == level] = rows[drawn == level]
        blocks.append(tokens)
    return np.concatenate(blocks)[:count]


def _block(task: Task, *entropy: int, rounds: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Pairs and so many times all questions; and the order of the first time."""
    rng = np.random.default_rng(entropy)
    keys = 1 + rng.random((BLOCK, task.keys)).argsort(1)[:, : task.pairs]
    values = 1 + task.keys + rng.integers(task.values, size=keys.shape)
    pairs = np.stack([keys, values], 2)
    orders = [rng.random(keys.shape).argsort(1) for _ in range(rounds)]
    asked = [np.take_along_axis(pairs, order[..., None], 1) for order in orders]
    return np.concatenate([pairs, *asked], 1).reshape(BLOCK, -1).astype(np.uint16), orders[0]


@torch.inference_mode()
def answers(model: LanguageModel, task: Task, count: int, batch: int = 32) -> dict[str, object]:
    """Of `count` held-out sequences: mean cross entropy and share of right answers, over all tokens of the vocabulary.

    The share also by the quarter of the pairs, first to last, in which the answer stood.
    """
    tokens, order = sequences(task, HELD_OUT, count)
    loss, right = 0.0, np.empty(order.shape, dtype=bool)
    for begin in range(0, count, batch):
        idx = torch.from_numpy(tokens[begin : begin + batch].astype(np.int64))
        logits = model.head(model.features(idx[:, :-1])[:, 2 * task.pairs :: 2])
        answer = idx[:, 2 * task.pairs + 1 :: 2]
        loss += F.cross_entropy(logits.flatten(0, 1), answer.flatten(), reduction="sum").item()
        right[begin : begin + batch] = (logits.argmax(-1) == answer).numpy()
    quarter = order * QUARTERS // task.pairs
    return {
        "loss": loss / right.size,
        "accuracy": float(right.mean()),
        "by_quarter": [float(right[quarter == q].mean()) if (quarter == q).any() else None for q in range(QUARTERS)],
        "sequences": count,
    }


def by_pairs(model: LanguageModel, task: Task, count: int) -> dict[str, object]:
    """answers() to the whole task, and under "by_pairs" loss and accuracy of each number of pairs, fewest first."""
    measured = {part.pairs: answers(model, part, count) for part in reversed(levels(task))}
    return measured[task.pairs] | {
        "by_pairs": {str(pairs): {key: found[key] for key in ("loss", "accuracy")} for pairs, found in measured.items()}
    }


def load(path: Path) -> LanguageModel:
    """The model of a file, its weights, which are bfloat16 there, in fp32."""
    return model_from(load_weights(path), "cpu", torch.float32)


def weights_of(folder: Path) -> list[Path]:
    """rwkv-init.pth, rwkv-0.pth, rwkv-1.pth, ..., rwkv-final.pth."""
    numbered = sorted(folder.glob("rwkv-[0-9]*.pth"), key=lambda path: int(path.stem.removeprefix("rwkv-")))
    return [path for path in (folder / "rwkv-init.pth", *numbered, folder / "rwkv-final.pth") if path.exists()]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make, evaluate = (
        commands.add_parser("make", help="write training data"),
        commands.add_parser("evaluate", help="accuracy of a run at the answers"),
    )
    for command in (make, evaluate):
        for name, default in asdict(Task()).items():
            command.add_argument(f"--{name}", type=int, default=default)
        command.add_argument("--out", type=Path, required=True)
    make.add_argument("--seed", type=int, required=True, help=f"of the mixture; {HELD_OUT}: the whole tasks that are evaluated")
    make.add_argument("--samples", type=int, required=True, help="sequences")
    evaluate.add_argument("run", type=Path, help="folder of a run, or one .pth file")
    evaluate.add_argument("--sequences", type=int, default=128, help="of each number of pairs")
    options = parser.parse_args(argv)
    try:
        task = Task(options.pairs, options.keys, options.values)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.command == "make":
            tokens = (
                sequences(task, options.seed, options.samples)[0]
                if options.seed == HELD_OUT
                else mixture(task, options.seed, options.samples)
            )
            np.save(options.out, tokens.reshape(-1))
            return 0
        paths = weights_of(options.run) if options.run.is_dir() else [options.run]
        if not paths:
            raise UserError(f"{options.run} has no rwkv-*.pth; train there first")
        results = [{"file": path.name, **by_pairs(load(path), task, options.sequences)} for path in paths]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.write_text(json.dumps({"task": asdict(task), "results": results}, indent=1) + "\n")
    last = results[-1]
    print(
        f"{options.run}: {last['accuracy']:.1%} of the answers right, loss {last['loss']:.3f} "
        f"(guessing: {1 / task.values:.1%}, {np.log(task.values):.3f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
