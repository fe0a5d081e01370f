"""What a model thinks of given tokens: the logarithm of each one's probability, and whether it is the likeliest."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..infer.engine import Engine, check_finite
from ..ops.cross_entropy import head_scores

READ_AT_ONCE = 8192  # tokens of all rows together: bounds the memory of long texts, changes no number beyond rounding
# contexts that reach the same multiple of this are read side by side up to it; the rest of each with its continuation
STEP = 16

Tokens = Sequence[int] | np.ndarray


class Scores(NamedTuple):
    """Some predicted tokens, one entry for each.

    row, place: where it stands; nats: minus the logarithm of its probability; likeliest: whether no other is likelier.
    """

    row: np.ndarray
    place: np.ndarray
    nats: np.ndarray
    likeliest: np.ndarray


def scores(engine: Engine, rows: Sequence[Tokens], first: Sequence[int], state: list | None = None) -> Iterator[Scores]:
    """Of each row's tokens from its `first` (1 or more) on, after those before them and the state; in parts, from front to back.

    Rows of any length stand side by side: what pads the shorter ones comes behind them, where nothing sees it. Logits
    exist for a chunk of tokens at a time.
    """
    lengths = np.array([len(row) for row in rows])
    width = max(int(lengths.max()), 2)
    table = np.zeros((len(rows), width), dtype=np.int64)
    for row, tokens in zip(table, rows):
        row[: len(tokens)] = tokens
    wanted = (np.arange(width) < lengths[:, None]) & (np.arange(width) >= np.asarray(first)[:, None])
    model, step = engine.model, max(1, READ_AT_ONCE // len(rows))
    weight = model.head.weight
    for begin in range(0, width - 1, step):
        stop = min(width - 1, begin + step)
        row, place = np.nonzero(wanted[:, begin + 1 : stop + 1])
        with torch.inference_mode():
            x = model.features(torch.from_numpy(table[:, begin:stop]).to(weight.device), state, return_state=stop < width - 1)
            x, state = x if stop < width - 1 else (x, None)
            if not len(row):
                continue
            targets = torch.from_numpy(table[row, begin + 1 + place]).to(weight.device)
            nats, likeliest = head_scores(x[torch.from_numpy(row).to(x.device), torch.from_numpy(place).to(x.device)], weight, targets)
            check_finite(nats)
        yield Scores(row, begin + 1 + place, nats.cpu().numpy(), (likeliest == targets).cpu().numpy())


def continuations(engine: Engine, pairs: Sequence[tuple[list[int], list[int]]], batch: int) -> list[tuple[float, bool]]:
    """For each (context, continuation): the logarithm of the continuation's probability, and whether all of its tokens are the likeliest.

    A context has one token or more. One that several continuations share is read once, into a state from which all of
    them begin; `batch` contexts are read side by side.
    """
    sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (context, _) in enumerate(pairs):
        sharing[tuple(context)].append(number)
    alike: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for context in sharing:
        alike[(len(context) - 1) // STEP * STEP].append(context)
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    for shared, contexts in sorted(alike.items()):
        contexts.sort(key=lambda context: len(sharing[context]))  # where one has more continuations than another, its neighbours have too
        for at in range(0, len(contexts), batch):
            side_by_side = contexts[at : at + batch]
            state = read(engine, [context[:shared] for context in side_by_side]) if shared else None
            for turn in range(max(len(sharing[context]) for context in side_by_side)):
                numbers = [sharing[context][turn] if turn < len(sharing[context]) else None for context in side_by_side]
                rows = [[0] if n is None else [*pairs[n][0][shared:], *pairs[n][1]] for n in numbers]
                first = [1 if n is None else len(pairs[n][0]) - shared for n in numbers]
                sums, all_likeliest = np.zeros(len(rows)), np.ones(len(rows), dtype=bool)
                for part in scores(engine, rows, first, state):
                    np.add.at(sums, part.row, part.nats)
                    np.logical_and.at(all_likeliest, part.row, part.likeliest)
                for n, nats, likeliest in zip(numbers, sums, all_likeliest):
                    if n is not None:
                        found[n] = -float(nats), bool(likeliest)
    return found


@torch.inference_mode()
def read(engine: Engine, rows: Sequence[Tokens]) -> list:
    """The state after rows of one length."""
    state = None
    for piece in torch.tensor(rows, device=engine.model.emb.weight.device).split(max(1, READ_AT_ONCE // len(rows)), dim=1):
        state = engine.model.features(piece, state, return_state=True)[1]
    return state
