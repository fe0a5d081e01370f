"""`python make_data.py demo.jsonl 3 4096`: text to {prefix}.bin/.idx, and the flags that train.py then needs."""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ..config import MINI_EPOCH, UserError
from ..data.binidx import BinIdx
from ..data.documents import expand, kind
from ..data.pack import Packed, pack
from ..data.sampler import magic_prime, mini_epochs
from ..data.tokenizer import Tokenizer, load_tokenizer

PREVIEW = 100  # tokens shown from each end of a document
SHOWN = 10  # skipped inputs listed
PAUSE = 5.0  # seconds between lines that say how far it is


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; usage: make_data.py INPUT [INPUT ...] COPIES CTX_LEN (see --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="make_data.py", description="Tokenise text, shuffle it, write PREFIX.bin and PREFIX.idx.")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help='.jsonl (one {"text": ...} a line) or .txt (one document a file), also .gz; files or quoted globs')
    parser.add_argument("epochs", type=int, metavar="COPIES", help="copies of the data in the output, each shuffled anew")
    parser.add_argument("ctx_len", type=int, metavar="CTX_LEN", help="context length that magic_prime is computed for")
    parser.add_argument("--out", default="", metavar="PREFIX", help="output prefix; default: the name of the one input, in the current folder")
    parser.add_argument("--text_key", default="text", help="key of the text in .jsonl (default: text)")
    parser.add_argument("--tokenizer", default="world", help="world, or the path of a Hugging Face tokenizer.json (default: world)")
    parser.add_argument("--val_split", type=float, default=0.0, help="hold out: below 1 a fraction of the tokens, else a number of documents; to PREFIX.val.bin/.idx")
    parser.add_argument("--seed", type=int, default=0, help="seed of shuffling and held-out documents (default: 0)")
    parser.add_argument("--skip_bad", action="store_true", help="pass over bad lines and files, and count them, instead of stopping")
    return parser


def _progress(started: float) -> Callable[[int, int], None]:
    last = started

    def say(documents: int, text_bytes: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= PAUSE:
            last = now
            print(f"{documents} documents, {text_bytes / 1e6:.1f} MB, {text_bytes / 1e6 / (now - started):.1f} MB/s", file=sys.stderr, flush=True)

    return say


def _show(data: BinIdx, tokenizer: Tokenizer, i: int) -> None:
    tokens = data.doc(i)[:-1]
    print(f"--- {data.prefix}, document {i % data.n_docs}: {len(tokens) + 1} tokens")
    if len(tokens) <= PREVIEW:
        text = tokenizer.decode(tokens)
    else:
        text = f"{tokenizer.decode(tokens[:PREVIEW])}\n· · · · ·\n{tokenizer.decode(tokens[-PREVIEW:])}"
    print(text)


def _summary(made: Packed, prefix: str, tokenizer: Tokenizer, ctx_len: int) -> None:
    if made.skipped:
        print(f"skipped {len(made.skipped)} bad inputs:")
        for line in made.skipped[:SHOWN]:
            print(f"  {line}")
    data = BinIdx(prefix)
    _show(data, tokenizer, 0)
    _show(data, tokenizer, -1)
    print("---")
    print(f"{prefix}.bin/idx: {made.tokens} tokens, {made.documents} documents, {made.dtype.name}")
    if made.val_documents:
        print(f"{prefix}.val.bin/idx: {made.val_tokens} tokens, {made.val_documents} documents held out")
    print(f"largest token id {made.largest}, {made.distinct} distinct ones; --vocab_size {tokenizer.vocab_size}")
    try:
        prime = magic_prime(made.tokens, ctx_len)
    except UserError as error:
        print(f"too short to train on: {error}")
        return
    print(f"{mini_epochs(made.tokens, ctx_len)} mini-epochs of {MINI_EPOCH} samples ({made.tokens / (ctx_len * MINI_EPOCH):.3f})")
    print(f"\n--my_exit_tokens {made.tokens} --magic_prime {prime} --ctx_len {ctx_len}\n")


def main(argv: list[str]) -> int:
    """Returns 0; raises UserError for whatever is wrong with arguments or input, and then no output has been made."""
    args = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # it shows texts of any language on terminals of any encoding
    if args.ctx_len < 1:
        raise UserError(f"CTX_LEN {args.ctx_len} must be at least 1")
    if not 0 <= args.seed < 1 << 32:
        raise UserError(f"--seed {args.seed} must lie in 0 to 2^32 - 1")
    files = expand(args.inputs)
    if not args.out and len(files) > 1:
        raise UserError(f"{len(files)} input files need --out PREFIX")
    prefix = str(Path(args.out or files[0].name.removesuffix(".gz").removesuffix(kind(files[0]))))
    tokenizer = load_tokenizer(args.tokenizer)
    started = time.monotonic()
    made = pack(files, prefix, tokenizer, args.epochs, args.text_key, args.val_split, args.seed, args.skip_bad, _progress(started))
    seconds = time.monotonic() - started
    print(f"{made.text_bytes} bytes of text in {seconds:.1f} s ({made.text_bytes / 1e6 / seconds:.1f} MB/s)")
    _summary(made, prefix, tokenizer, args.ctx_len)
    return 0
