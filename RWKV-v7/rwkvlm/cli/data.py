"""`python -m rwkvlm data info|verify|merge|split|sample PREFIX`: what is in PREFIX.bin and PREFIX.idx, and new pairs from them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable

from ..config import MINI_EPOCH, UserError
from ..data.binidx import BinIdx
from ..data.download import KNOWN, check_is
from ..data.rewrite import merge, split
from ..data.sampler import magic_prime
from ..data.survey import Survey, guess_tokenizer, survey
from ..data.tokenizer import END_OF_DOCUMENT, load_tokenizer
from .flags import Parser

INFO_BYTES = 1 << 30  # of tokens that `info` looks at: about a second
BAR = 40
PAUSE = 5.0  # seconds between lines that say how far it is


class _Parser(Parser):
    cure = "usage: python -m rwkvlm data info|verify|merge|split|sample ... (see --help)"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m rwkvlm data", description="Look at binidx pairs (PREFIX.bin, PREFIX.idx), check them, make new ones from them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="info|verify|merge|split|sample")
    info = commands.add_parser("info", help="counts, lengths, token range, magic_prime, probable tokenizer; large files by samples")
    info.add_argument(
        "--ctx_len", type=int, nargs="+", default=[512, 4096], help="context lengths that magic_prime is computed for (default: 512 4096)"
    )
    info.add_argument("--json", action="store_true", help="one JSON object instead of text")
    verify = commands.add_parser(
        "verify", help="check the index, the size and every token; exit code 2 and one line at the first thing that is wrong"
    )
    verify.add_argument("--vocab_size", type=int, default=65536, help="every token must be below (default: 65536)")
    verify.add_argument(
        "--expect", choices=sorted(KNOWN), help="the pair must be this data set: number of documents and tokens, vocabulary"
    )
    joined = commands.add_parser("merge", help="the documents of several pairs in one, each pair whole or weighted")
    joined.add_argument(
        "prefix", nargs="+", metavar="PREFIX[:COPIES]", help="a:2 takes a twice, b:0.5 half of b's documents, drawn by --seed"
    )
    divided = commands.add_parser("split", help="hold documents out: OUT and OUT.val")
    divided.add_argument("--val", type=float, required=True, help="below 1 about this share of the documents, from 1 on their number")
    for each in (joined, divided):
        each.add_argument("--out", required=True, metavar="PREFIX", help="the new pair")
        each.add_argument("--seed", type=int, default=0, help="of the documents drawn (default: 0)")
    sample = commands.add_parser("sample", help="documents as text")
    for each in (info, verify, divided, sample):
        each.add_argument("prefix", metavar="PREFIX")
    sample.add_argument("numbers", nargs="*", type=int, metavar="N", help="documents, 0 the first, -1 the last (default: these two)")
    sample.add_argument("--tokenizer", default="world", help="world, or the path of a Hugging Face tokenizer.json (default: world)")
    sample.add_argument("--tokens", type=int, default=500, help="at most so many tokens of each (default: 500; 0: all)")
    return parser


def _progress() -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= PAUSE and done:
            last = now
            print(f"{done} of {total} tokens, {(now - started) * (total - done) / done:.0f} s left", file=sys.stderr, flush=True)

    return say


def _line(data: BinIdx) -> str:
    return f"{data.prefix}.bin/idx: {data.n_tokens} tokens, {data.n_docs} document{'s' * (data.n_docs != 1)}, {data.dtype.name}"


def _found(seen: Survey) -> str:
    how = "all checked" if seen.whole else f"{seen.tokens} tokens of {seen.documents} documents looked at, evenly spread"
    return (
        f"token ids {seen.smallest} to {seen.largest} ({how}); "
        f"token {END_OF_DOCUMENT} ends {seen.ended} of {seen.documents} documents and stands {seen.inside} times inside"
    )


def _orders(n_tokens: int, ctx_lens: list[int]) -> dict[int, int | str]:
    """magic_prime for each context length, or why there is none."""
    found: dict[int, int | str] = {}
    for ctx_len in ctx_lens:
        if ctx_len < 1:
            raise UserError(f"--ctx_len {ctx_len} must be at least 1")
        try:
            found[ctx_len] = magic_prime(n_tokens, ctx_len)
        except UserError as error:
            found[ctx_len] = str(error)
    return found


def _info(args: argparse.Namespace) -> None:
    data = BinIdx(args.prefix)
    seen = survey(data, INFO_BYTES, _progress())
    guess = guess_tokenizer(data, seen, load_tokenizer("world"))
    orders = _orders(data.n_tokens, args.ctx_len)
    if args.json:
        whole = {"prefix": data.prefix, "tokens": data.n_tokens, "documents": data.n_docs, "dtype": data.dtype.name}
        print(json.dumps(whole | {"survey": dataclasses.asdict(seen), "tokenizer": guess, "magic_prime": orders}))
        return
    print(_line(data))
    print(_found(seen))
    print(f"tokenizer: {guess}")
    print(f"tokens in a document: {seen.shortest} to {seen.longest}, {data.n_tokens / data.n_docs:.1f} on average")
    for bits, count in enumerate(seen.lengths):
        if count:
            sizes = f"{1 << bits >> 1} to {(1 << bits) - 1}" if bits > 1 else str(bits)
            print(f"  {sizes:>22}  {count:>12}  {'#' * -(-BAR * count // max(seen.lengths))}")
    for ctx_len, prime in orders.items():
        known = (
            f"--magic_prime {prime}, {data.n_tokens / (ctx_len * MINI_EPOCH):.3f} mini-epochs of {MINI_EPOCH} samples"
            if isinstance(prime, int)
            else f"too short: {prime}"
        )
        print(f"ctx_len {ctx_len}: {known}")


def _verify(args: argparse.Namespace) -> None:
    data = BinIdx(args.prefix)
    vocab_size = args.vocab_size
    if args.expect:
        vocab_size = min(vocab_size, KNOWN[args.expect].vocab_size)
        check_is(data, KNOWN[args.expect])
    seen = survey(data, None, _progress())
    if seen.smallest < 0 or seen.largest >= vocab_size:
        data.check_token_range(vocab_size, 1 << 62)  # says where
    print(_line(data))
    print(_found(seen))
    print(
        "ok: header, sizes, pointers and documents of the index agree with each other "
        f"and with {data.bin_path}, and every token is below {vocab_size}"
    )


def _merge(args: argparse.Namespace) -> None:
    inputs = []
    for name in args.prefix:
        prefix, colon, copies = name.rpartition(":")
        try:
            inputs.append((prefix, float(copies)) if colon else (name, 1.0))
        except ValueError:
            inputs.append((name, 1.0))  # a colon in the name
    print(_line(merge(inputs, args.out, args.seed, _progress())))


def _split(args: argparse.Namespace) -> None:
    for data in split(args.prefix, args.out, args.val, args.seed, _progress(), lambda text: print(text, file=sys.stderr, flush=True)):
        print(_line(data))


def _sample(args: argparse.Namespace) -> None:
    data, tokenizer = BinIdx(args.prefix), load_tokenizer(args.tokenizer)
    for number in args.numbers or sorted({0, data.n_docs - 1}):
        if not -data.n_docs <= number < data.n_docs:
            raise UserError(
                f"{args.prefix} has no document {number}; it has {data.n_docs}, 0 to {data.n_docs - 1} (or -1, -2, ... from the end)"
            )
        document = data.doc(number)
        shown = document[: args.tokens] if args.tokens > 0 else document
        ended = len(shown) and int(shown[-1]) == END_OF_DOCUMENT
        cut = (
            f", the first {len(shown)} shown" if len(shown) < len(document) else "" if ended else f", not ended by token {END_OF_DOCUMENT}"
        )
        print(f"--- {data.prefix}, document {number % data.n_docs}: {len(document)} tokens{cut}")
        print(tokenizer.decode(shown[:-1] if ended else shown))


def main(argv: list[str]) -> int:
    """Returns 0; raises UserError for the first thing that is wrong with a pair or with the arguments."""
    args = _parser().parse_args(argv)
    if not 0 <= getattr(args, "seed", 0) < 1 << 32:
        raise UserError(f"--seed {args.seed} must lie in 0 to 2^32 - 1")
    {"info": _info, "verify": _verify, "merge": _merge, "split": _split, "sample": _sample}[args.command](args)
    return 0
