"""What ROSA is for, as tasks that a CPU trains in minutes, each with the figure that it must reach.

    python bench/rosa_tasks.py --out out/rosa-tasks.json             all that take minutes
    python bench/rosa_tasks.py --out copy.json recall copy           those whose names begin so

counting  consecutive integers, digit by digit: what follows the longest known suffix is the number before, and where it
          differs from the next one only learned bits can say. The toy models of the official files (RWKV-LM, RWKV-v8), with
          the starting values and the schedule there: an embedding of what ROSA of the tokens expects; 1-bit layers behind it,
          or four of 4 bits at twice the learning rate, trained by exact flips
recall    pairs of a key and a value, keys coming again and again in one sequence, each with its value of this sequence: asked
          are the values of keys seen before. The pure ROSA model with one block, whose keys begin as its queries; and with
          keys that begin apart from them, trained, and with q, k, v left so, which together show that the bits are learned
copy      random symbols, then the same once more: asked is the second half
reverse   a number of up to 60 digits, then its digits the other way round, by the official model of 40 thousand parameters. 16 minutes on
          one thread, with which it has 0.942 right, not the 0.995 of the official file (records/2026-11-27-rosa-toys): only by its name

Everything is drawn from --seed. A task's figure is measured on fresh sequences after the training.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from environment import write_record
from rwkvlm.config import UserError, model_config
from rwkvlm.models import build, init_weights, param_groups
from rwkvlm.ops.rosa import rosa_self, rosa_tokens

SEPARATOR = 10  # behind the digits
HELD_OUT = 128  # sequences


class Batch(NamedTuple):
    """idx, targets: [B, T]; asked: [B, T], which targets count."""

    idx: torch.Tensor
    targets: torch.Tensor
    asked: torch.Tensor


Draw = Callable[..., Batch]  # of how many sequences, and random numbers; where a task is gradual, of how much of the training is over too


def integer(least: int, most: int, rng: torch.Generator) -> int:
    return int(torch.randint(least, most + 1, (), generator=rng))


def counting(B: int, rng: torch.Generator, length: int = 128) -> Batch:
    """The official sequences: they begin with a number of one to three digits, each count of digits as likely."""
    rows = []
    for _ in range(B):
        digits = integer(1, 3, rng)
        number, row = integer(0 if digits == 1 else 10 ** (digits - 1), 10**digits - 1, rng), [SEPARATOR]
        while len(row) < length:
            row += [*map(int, str(number)), SEPARATOR]
            number += 1
        rows.append(row[:length])
    tokens = torch.tensor(rows)
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.ones_like(tokens[:, 1:], dtype=torch.bool))


def recall(B: int, rng: torch.Generator, length: int = 64, keys: int = 16, values: int = 16) -> Batch:
    """k v k v ...: `length` tokens, keys 0 to keys - 1, then the values; a value is asked for where its key has been there before."""
    pairs = length // 2
    key = torch.randint(keys, (B, pairs), generator=rng)
    value = keys + torch.randint(values, (B, keys), generator=rng)
    tokens = torch.stack([key, value.gather(1, key)], 2).flatten(1)
    before = (key.unsqueeze(2) == key.unsqueeze(1)).tril(-1).any(2)
    asked = torch.stack([before, torch.zeros_like(before)], 2).flatten(1)
    return Batch(tokens, tokens.roll(-1, 1), asked)


def copy(B: int, rng: torch.Generator, length: int = 64, symbols: int = 16) -> Batch:
    half = torch.randint(symbols, (B, length // 2), generator=rng)
    tokens = torch.cat([half, half], 1)
    asked = torch.zeros_like(tokens, dtype=torch.bool)
    asked[:, length // 2 : -1] = True  # the first symbol of the second half is there to be read
    return Batch(tokens, tokens.roll(-1, 1), asked)


def reverse(B: int, rng: torch.Generator, done: float | None = None, most: int = 60) -> Batch:
    """`12,21#`, filled up with `#`: asked are the digits behind the comma, and the first `#`.

    Numbers of 1 to `most` digits, each count as likely.

    done: the share of the training that is over. Then those of a batch are as long, up to a limit that grows from 4 digits to
    `most` in two fifths of the training; two batches in five have the longest, and shorter ones are up to four times as many.
    """
    if done is None:
        digits = [integer(1, most, rng) for _ in range(B)]
    else:
        limit = min(most, 4 + int((most - 4) * done / 0.4))
        length = limit if torch.rand((), generator=rng) < 0.4 else integer(1, limit, rng)
        digits = [length] * (B * min(4, limit // length))
    tokens = torch.full((len(digits), 2 * max(digits) + 2), 11)
    asked = torch.zeros(len(digits), tokens.shape[1] - 1, dtype=torch.bool)
    for row, ask, n in zip(tokens, asked, digits):
        number = torch.randint(10, (n,), generator=rng)
        number[0] = integer(0 if n == 1 else 1, 9, rng)
        row[: 2 * n + 1] = torch.cat([number, torch.tensor([10]), number.flip(0)])
        ask[n : 2 * n + 1] = True
    return Batch(tokens[:, :-1], tokens[:, 1:], asked)


class RosaSelf(nn.Module):
    """The official self layer: the input's own symbols as queries, keys and values, [B, T, C] -> [B, T, C].

    emb0 or emb1 for each bit of what followed; a miss gives 0 (1 bit) or emb0 (4 bits).
    """

    def __init__(self, width: int, bits: int) -> None:
        super().__init__()
        self.settings = dict(bits=bits, miss="zero" if bits == 1 else "low")
        self.emb0 = nn.Parameter(torch.full((1, 1, width), -1e-5))
        self.emb1 = nn.Parameter(torch.full((1, 1, width), 1e-5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rosa_self(x, self.emb0.flatten(), self.emb1.flatten(), **self.settings)


class RosaEmbedding(nn.Module):
    """The embedding of the token that ROSA of the tokens themselves expects, [B, T] -> [B, T, C]; 0 on a miss."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(vocab_size, width)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        expected = rosa_tokens(idx)
        return self.emb(expected.clamp(min=0)).masked_fill((expected < 0).unsqueeze(-1), 0.0)


class Stack(nn.Module):
    """The official toy: `x = e(x) + emb_rosa(x); x += rosa1(x); x += lin(x); x += rosa2(x); ...; o(x)`."""

    def __init__(self, layers: int, bits: int = 1, width: int = 64) -> None:
        super().__init__()
        self.e, self.emb_rosa = nn.Embedding(11, width), RosaEmbedding(11, width)
        self.rosa = nn.ModuleList(RosaSelf(width, bits) for _ in range(layers))
        self.lin = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.o = nn.Linear(width, 11)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = self.e(idx) + self.emb_rosa(idx)
        for n, rosa in enumerate(self.rosa):
            if n:
                x = x + self.lin[n - 1](x)
            x = x + rosa(x)
        return self.o(x)


def language_model(vocab_size: int, seed: int, apart: bool = False, frozen: bool = False) -> nn.Module:
    """apart: keys begin with random numbers of their own; frozen: what makes queries, keys and values stays as it begins."""
    model = build(model_config("rosa", n_layer=1, n_embd=32, vocab_size=vocab_size, rosa_bits=4))
    init_weights(model, seed)
    mix, rng = model.blocks[0].rosa, torch.Generator().manual_seed(seed)
    if apart:
        for parameter in mix.k.parameters():
            nn.init.uniform_(parameter, -(32**-0.5), 32**-0.5, generator=rng)
    if frozen:
        for name, parameter in mix.named_parameters():
            parameter.requires_grad_(not name.startswith(("q.", "k.", "v.", "x_")))
    return model


def small_x080(seed: int) -> nn.Module:
    """Of the sizes of the official models that turn numbers round."""
    sizes = dict(n_layer=2, n_embd=32, vocab_size=12, head_size=16, rank_w=8, rank_a=8, rank_v=8, rank_g=8)
    model = build(model_config("x080", **sizes, rosa_bits=1))
    init_weights(model, seed)
    return model


def train(model: nn.Module, groups: list[dict], task: Task, steps: int, rng: torch.Generator, device: str) -> list[float]:
    """AdamW with a cosine from the first learning rate to the second; returns the loss of each step."""
    optimizer = torch.optim.AdamW(groups, lr=task.lr[0], betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=task.lr[1])
    curve = []
    for step in range(steps):
        loss = loss_of(model, Batch(*(t.to(device) for t in task.draw(task.batch, rng, *([step / steps] if task.gradual else [])))))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if task.clip:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        schedule.step()
        curve.append(loss.item())
        if (step + 1) % max(1, steps // 10) == 0:
            print(f"  step {step + 1}/{steps}  loss {curve[-1]:.4f}", flush=True)
    return curve


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch.idx)[batch.asked].float(), batch.targets[batch.asked])


@torch.no_grad()
def measured(model: nn.Module, draw: Draw, rng: torch.Generator, device: str) -> dict[str, float]:
    """Loss and right answers on fresh sequences."""
    batch = Batch(*(t.to(device) for t in draw(HELD_OUT, rng)))
    logits = model(batch.idx)[batch.asked].float()
    targets = batch.targets[batch.asked]
    return {"loss": F.cross_entropy(logits, targets).item(), "accuracy": (logits.argmax(-1) == targets).float().mean().item()}


class Task(NamedTuple):
    """What is trained, and when it counts as learned.

    make(seed) -> model; figure: "loss", at most the bar, or "accuracy", at least it, or with `at_most` at most it; clip: of
    the gradient's norm, 0: none; gradual: the draw is told how much of the training is over; long: runs only if its name is
    given.
    """

    draw: Draw
    make: Callable[[int], nn.Module]
    batch: int
    steps: int
    lr: tuple[float, float]
    figure: str
    bar: float
    at_most: bool = True
    clip: float = 0.0
    gradual: bool = False
    long: bool = False

    def met(self, found: float) -> bool:
        return math.isfinite(found) and (found <= self.bar if self.at_most else found >= self.bar)


def _stack(layers: int, bits: int = 1) -> Callable[[int], nn.Module]:
    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Stack(layers, bits)

    return make


OFFICIAL = (1e-3, 1e-6)
QUICK = (1e-2, 2e-4)
TASKS = {
    "counting, embedding only": Task(counting, _stack(0), 32, 1000, OFFICIAL, "loss", 0.66),
    "counting, one layer": Task(counting, _stack(1), 32, 1000, OFFICIAL, "loss", 0.47),
    "counting, two layers": Task(counting, _stack(2), 8, 1000, OFFICIAL, "loss", 0.43),
    "counting, four layers of 4 bits": Task(counting, _stack(4, 4), 8, 1500, (2e-3, 1e-6), "loss", 0.25),
    "recall": Task(recall, functools.partial(language_model, 32), 16, 400, QUICK, "accuracy", 0.99, at_most=False),
    "recall, k apart": Task(recall, functools.partial(language_model, 32, apart=True), 16, 400, QUICK, "accuracy", 0.99, at_most=False),
    "recall, k apart, q k v frozen": Task(
        recall, functools.partial(language_model, 32, apart=True, frozen=True), 16, 400, QUICK, "accuracy", 0.6
    ),
    "copy": Task(copy, functools.partial(language_model, 16), 16, 100, (1e-2, 1e-2), "accuracy", 0.94, at_most=False),
    "reverse": Task(reverse, small_x080, 32, 10000, (3e-3, 1e-5), "accuracy", 0.995, at_most=False, clip=1.0, gradual=True, long=True),
}


def run(name: str, seed: int, device: str = "cpu", steps: int = 0) -> dict[str, object]:
    """Trains one task, for so many steps in the place of its own, and says what came of it."""
    task, rng = TASKS[name], torch.Generator().manual_seed(seed)
    model = task.make(seed).to(device)
    # torch's, as officially
    groups = param_groups(model, 0.0) if hasattr(model, "config") else [{"params": list(model.parameters()), "weight_decay": 0.01}]
    groups = [{key: value for key, value in group.items() if key in ("params", "weight_decay")} for group in groups]
    begin = time.perf_counter()
    curve = train(model, groups, task, steps or task.steps, rng, device)
    found = measured(model, task.draw, rng, device)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "task": name,
        "seed": seed,
        "parameters": parameters,
        "steps": len(curve),
        "seconds": round(time.perf_counter() - begin, 1),
        **found,
        "figure": task.figure,
        "bar": task.bar,
        "met": task.met(found[task.figure]),
        "losses_of_10_steps": [round(sum(ten) / len(ten), 4) for ten in (curve[at : at + 10] for at in range(0, len(curve), 10))],
    }


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Tasks that show what ROSA is for.")
    parser.add_argument("names", nargs="*", help="beginnings of the names of tasks; none: all that take minutes")
    parser.add_argument("--out", required=True, help="JSON file of the results")
    parser.add_argument("--seeds", default="1", help="seeds, separated by commas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=0, help="another number of steps; 0: each task's own")
    args = parser.parse_args(argv)
    names = [name for name in TASKS if (name.startswith(tuple(args.names)) if args.names else not TASKS[name].long)]
    if not names:
        raise UserError(f"no task is called {' '.join(args.names)}; choose of: {', '.join(TASKS)}")
    results = []
    for seed in map(int, args.seeds.split(",")):
        for name in names:
            print(f"{name}, seed {seed}", flush=True)
            results.append(run(name, seed, args.device, args.steps))
            r = results[-1]
            print(f"  {r['figure']} {r[r['figure']]:.4f}, bar {r['bar']}: {'met' if r['met'] else 'NOT MET'}, {r['seconds']} s", flush=True)
            write_record(Path(args.out), results=results)
    return 0 if all(r["met"] for r in results) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
