"""Training data from one file or several: which file, and which of its samples, the n-th sample of a run is, as a closed formula.

    --data_file data/a:0.7,data/b:0.3       seven samples in ten come from data/a
    --data_file data/a,data/b               each in proportion to its size: one pass reads every chunk of both once

Of the first n samples floor(n * 7 / 10) come from data/a, and they are its samples 1, 2, 3, ... in its own order (sampler.py), pass after
pass; the others are divided among the remaining files likewise. So every batch is mixed as evenly as whole samples allow.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ..config import UserError
from .binidx import BinIdx, idx_path
from .dataset import HeldOutSamples, Samples, TrainingSamples
from .sampler import check_magic_prime, magic_prime
from .tokens import SCAN_LIMIT, TokenRange, Tokens

Places = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
FINEST = 1 << 31  # largest denominator of a share: products below stay under 2^62
LEAST = Fraction(1, 10**6)


def prefixes(names: str, flag: str = "--data_file") -> dict[str, Fraction | None]:
    """The files that a flag names, in order, each with its weight if one is given. UserError for what cannot be meant."""
    if os.path.exists(idx_path(names)) or os.path.exists(names):  # Path.exists raises for a list that is longer than a name may be
        return {names: None}  # whatever its name looks like
    found: dict[str, Fraction | None] = {}
    for piece in names.split(","):
        prefix, weight = _weighted(piece)
        if not prefix:
            raise UserError(f"{flag} {names!r} has an empty name in it; name a file there, or take the comma out")
        if prefix in found:
            raise UserError(f"{flag} names {prefix} twice; name it once and add up its weights")
        if weight is not None and weight <= 0:
            raise UserError(f"{flag} gives {prefix} the weight {float(weight):g}; a weight must be above 0 (leave the file out instead)")
        found[prefix] = weight
    without = [prefix for prefix, weight in found.items() if weight is None]
    if without and len(without) < len(found):
        raise UserError(f"{flag} gives {without[0]} no weight, and others one; give each a weight, or none (then sizes count)")
    return found


def _weighted(piece: str) -> tuple[str, Fraction | None]:
    prefix, colon, text = piece.rpartition(":")
    try:
        return (prefix.strip(), Fraction(text)) if colon else (piece.strip(), None)
    except (ValueError, ZeroDivisionError):
        return piece.strip(), None  # a colon in the name


class Turns:
    """Whose turn the n-th sample is, for shares that sum to 1. UserError for one below a millionth."""

    def __init__(self, shares: Sequence[Fraction]) -> None:
        if min(shares) < LEAST:
            raise UserError(f"--data_file gives a file {float(min(shares)):.1e} of the samples; below {float(LEAST):g} leave it out")
        self._of_rest = [(share / sum(shares[k:])).limit_denominator(FINEST) for k, share in enumerate(shares)]

    def __call__(self, ii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For sample numbers ii = 1, 2, 3, ... of any shape: the file, and the number of the sample in that file, 1, 2, 3, ..."""
        rest = np.asarray(ii, dtype=np.int64)
        file, number = np.full(rest.shape, -1), rest
        for k, share in enumerate(self._of_rest):
            taken = _part(rest, share)
            mine = (file < 0) & (taken > _part(rest - 1, share))
            file, number = np.where(mine, k, file), np.where(mine, taken, number)
            rest = rest - taken
        return file, number


def _part(n: np.ndarray, share: Fraction) -> np.ndarray:
    """floor(n * share), exactly."""
    p, q = share.numerator, share.denominator
    return n // q * p + n % q * p // q


class OneByOne:
    """All `lengths[0]` samples of the first file, then those of the next; after the last the first again."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._ends = np.cumsum(lengths)

    def __call__(self, ii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chunk = (np.asarray(ii) - 1) % self._ends[-1]
        file = np.searchsorted(self._ends, chunk, side="right")
        return file, 1 + chunk - np.concatenate(([0], self._ends))[file]


class MixedSamples(Samples):
    """Samples of several files; `places` (Turns, OneByOne) says for sample numbers which file, and which sample of it."""

    def __init__(self, parts: Sequence[Samples], places: Places) -> None:
        self.parts, self.places = parts, places
        self.name = ", ".join(part.name for part in parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def ask_for(self, ii: np.ndarray) -> None:
        file, number = self.places(ii)
        for k, part in enumerate(self.parts):
            part.ask_for(number[file == k])

    def where(self, ii: int) -> str:
        file, number = self.places(np.asarray(ii))
        return self.parts[int(file)].where(int(number))

    def starts(self, ii: np.ndarray) -> np.ndarray:
        return self._of_parts(ii, lambda part, number: part.starts(number))

    def windows(self, ii: np.ndarray) -> np.ndarray:
        return self._of_parts(ii, lambda part, number: part.windows(number))

    def _of_parts(self, ii: np.ndarray, read: Callable[[Samples, np.ndarray], np.ndarray]) -> np.ndarray:
        file, number = self.places(ii)
        found = [(file == k, read(part, number[file == k])) for k, part in enumerate(self.parts) if (file == k).any()]
        rows = np.empty((*ii.shape, found[0][1].shape[-1]), dtype=np.result_type(*(row for _, row in found)))
        for mine, part in found:
            rows[mine] = part
        return rows


@dataclass(frozen=True)
class Part:
    """prime: its chunks, in the order that this prime gives; share: of all samples."""

    data: Tokens
    prime: int
    share: Fraction


@dataclass(frozen=True)
class Mixture:
    """The training data as the disk holds them."""

    parts: tuple[Part, ...]
    ctx_len: int

    @property
    def order(self) -> int | str:
        """What decides the order of the samples: the magic_prime of one file, chunks and shares of several."""
        return self.parts[0].prime if len(self.parts) == 1 else ", ".join(f"{part.prime} chunks x {part.share}" for part in self.parts)

    @property
    def chunks(self) -> int:
        return sum(part.prime for part in self.parts)

    def identity(self) -> list[dict[str, object]]:
        """What a training state remembers of each file: a hash of the tokens that are read, and its documents; the name is for people."""
        return [
            {"file": part.data.prefix, "tokens": part.data.fingerprint(part.prime * self.ctx_len + 1), "documents": part.data.n_docs}
            for part in self.parts
        ]

    def samples(self, vocab_size: int) -> Samples:
        """In their order, without end; a token outside the vocabulary is a UserError. len() is the number of chunks in all files."""
        each = [TrainingSamples(part.data, self.ctx_len, part.prime, vocab_size) for part in self.parts]
        return each[0] if len(each) == 1 else MixedSamples(each, Turns([part.share for part in self.parts]))

    def check_token_range(self, vocab_size: int, limit: int = SCAN_LIMIT) -> tuple[TokenRange, ...]:
        return tuple(part.data.check_token_range(vocab_size, limit // len(self.parts)) for part in self.parts)


def open_mixture(data_file: str, ctx_len: int, prime: int = 0, form: type[Tokens] = BinIdx) -> Mixture:
    """The files that --data_file names, opened; a `prime` other than 0 is the --magic_prime of one file."""
    weights = prefixes(data_file)
    first, *others = weights
    data = [form(first)]
    data += [data[0].like(prefix) for prefix in others]
    if prime and len(data) > 1:
        raise UserError(f"--magic_prime {prime} orders one file, and --data_file names {len(data)}; leave it out: each file gets its own")
    if prime:
        check_magic_prime(prime, data[0].n_tokens, ctx_len)
    primes = [prime or magic_prime(one.n_tokens, ctx_len) for one in data]
    sizes = [Fraction(p) if weight is None else weight for p, weight in zip(primes, weights.values())]
    mixture = Mixture(tuple(Part(*part) for part in zip(data, primes, (size / sum(sizes) for size in sizes))), ctx_len)
    Turns([part.share for part in mixture.parts])  # refuses shares that are too small
    return mixture


def held_out(files: Sequence[Tokens], ctx_len: int, vocab_size: int) -> Samples:
    """Validation data: the files one after the other, from front to back."""
    each = [HeldOutSamples(data, ctx_len, vocab_size) for data in files]
    return each[0] if len(each) == 1 else MixedSamples(each, OneByOne([*map(len, each)]))
