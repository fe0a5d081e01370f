"""Which chunk of the data the n-th sample of a training run is: a closed formula in exact integers.

The data are cut into chunks of ctx_len tokens. With a prime p, p mod 3 = 2, about the number of chunks, the map
ii -> ii^3 permutes the integers modulo p, so the samples ii = 1, 2, 3, ... visit every chunk once per pass over the data,
in an order that depends on p alone: not on GPUs, workers or restarts.
Source: RWKV-LM, RWKV-v7/train_temp/src/dataset.py, whose order this reproduces.
"""

from __future__ import annotations

import hashlib
from math import isqrt

import numpy as np

from ..config import MINI_EPOCH, UserError

LARGEST_PRIME = 1 << 40  # above, the vectorised products below could overflow 64 bits
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(n: int) -> bool:
    """Miller-Rabin with the first twelve primes as bases: exact for n < 3.18e23 (Sorenson and Webster, 2015)."""
    if n < 2:
        return False
    for p in _WITNESSES:
        if n % p == 0:
            return n == p
    twos = ((n - 1) & (1 - n)).bit_length() - 1
    odd = (n - 1) >> twos
    for base in _WITNESSES:
        x = pow(base, odd, n)
        if x in (1, n - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def _prime_at_most(bound: int) -> int:
    """The largest prime p <= bound with p mod 3 = 2; 0 if there is none."""
    bound -= (bound - 2) % 3
    while bound >= 2 and not is_prime(bound):
        bound -= 3
    return max(bound, 0)


def _officially_legal(prime: int, n_tokens: int, ctx_len: int) -> bool:
    slots = n_tokens // ctx_len
    fits = prime * ctx_len + 1 <= n_tokens  # the last chunk reads one token more than ctx_len
    return prime % 3 == 2 and fits and 10 * prime > 9 * slots and is_prime(prime)


def magic_prime(n_tokens: int, ctx_len: int) -> int:
    """The prime that orders `n_tokens` of data: the largest p <= n_tokens // ctx_len - 1 with p mod 3 = 2.

    Below some 230 chunks that prime can miss more than a tenth of the data, or not exist; then it is the largest one whose chunks
    lie inside the file. UserError when not even two chunks do.
    """
    prime = _prime_at_most(n_tokens // ctx_len - 1)
    if not _officially_legal(prime, n_tokens, ctx_len):
        prime = _prime_at_most((n_tokens - 1) // ctx_len)
    if not prime:
        raise UserError(
            f"--ctx_len {ctx_len} needs at least {2 * ctx_len + 1} tokens and the data have {n_tokens}; give more data or a smaller ctx_len"
        )
    if prime > LARGEST_PRIME:
        raise UserError(f"{n_tokens} tokens at --ctx_len {ctx_len} are more than {LARGEST_PRIME} chunks; use a larger ctx_len")
    return prime


def check_magic_prime(prime: int, n_tokens: int, ctx_len: int) -> None:
    """UserError, with the right value, for a prime that the official trainer would refuse or that leaves the file.

    The one that `magic_prime` chooses always passes.
    """
    chosen = magic_prime(n_tokens, ctx_len)
    if prime == chosen or _officially_legal(prime, n_tokens, ctx_len):
        return
    slots = n_tokens // ctx_len
    if prime * ctx_len + 1 > n_tokens:
        why = f"reads past the end of the data ({n_tokens} tokens)"
    elif not is_prime(prime):
        why = "is not a prime"
    elif prime % 3 != 2:
        why = f"leaves {prime % 3} modulo 3, not 2"
    else:
        why = f"leaves out more than a tenth of the {slots} chunks"
    raise UserError(f"--magic_prime {prime} {why}; for {n_tokens} tokens at --ctx_len {ctx_len} use --magic_prime {chosen}")


def _factor(prime: int) -> int:
    """floor(prime * (sqrt(5) - 1) / 2), exactly."""
    return (isqrt(5 * prime * prime) - prime) // 2


def chunk_of(ii: int, prime: int) -> int:
    """The chunk, 0 to prime - 1, of global sample number ii = 1, 2, 3, ..."""
    return _factor(prime) * pow(ii, 3, prime) % prime


def chunks_of(ii: np.ndarray, prime: int) -> np.ndarray:
    """chunk_of for an integer array of any shape; int64, exact for primes up to 2^40."""
    if not 2 <= prime <= LARGEST_PRIME:
        raise ValueError(f"prime {prime} outside 2 to 2^40")

    def times(a: np.ndarray, b: np.ndarray | np.int64) -> np.ndarray:
        # a, b < 2^40: with b in two halves of 20 bits no term reaches 2^61
        return ((a * (b >> 20) % prime << 20) + a * (b & 0xFFFFF)) % prime

    ii = np.asarray(ii, dtype=np.int64) % prime
    return times(times(times(ii, ii), ii), np.int64(_factor(prime)))


def order_hash(prime: int) -> str:
    """Sixteen hex digits that name the order of the first official mini-epoch's samples, for logs: equal means equal order."""
    chunks = chunks_of(np.arange(1, MINI_EPOCH + 1), prime)
    return hashlib.sha256(chunks.astype("<i8").tobytes()).hexdigest()[:16]
