"""`python make_data.py demo.jsonl 3 4096`: text to {prefix}.bin/.idx, and the flags that train.py then needs."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..checkpoint.place import check_file, write_json
from ..config import MINI_EPOCH, UserError, env
from ..config.volume import volume
from ..data.binidx import BinIdx
from ..data.documents import PACKED, STDIN, expand, kind
from ..data.pack import Packed, Stage, pack
from ..data.sampler import magic_prime
from ..data.tokenizer import Tokenizer, load_tokenizer
from .flags import Parser

PREVIEW = 100  # tokens shown from each end of a document
SHOWN = 10  # skipped inputs listed
PAUSE = 5.0  # seconds between lines that say how far it is
BAR = 30  # characters


class _Parser(Parser):
    cure = "usage: make_data.py INPUT [INPUT ...] COPIES CTX_LEN (see --help)"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="make_data.py", description="Tokenise text, shuffle it, write PREFIX.bin and PREFIX.idx.")
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help='.jsonl (one {"text": ...} a line), .txt (one document a file), either also .gz or .zst, or .parquet; '
        "files, quoted globs, or - for .jsonl from standard input",
    )
    parser.add_argument("epochs", type=int, metavar="COPIES", help="copies of the data in the output, each shuffled anew")
    parser.add_argument("ctx_len", type=int, metavar="CTX_LEN", help="context length that magic_prime is computed for")
    parser.add_argument(
        "--out", default="", metavar="PREFIX", help="output prefix; default: the name of the one input, in the current folder"
    )
    parser.add_argument("--text_key", default="text", help="key of the text in .jsonl, column of it in .parquet (default: text)")
    parser.add_argument("--tokenizer", default="world", help="world, or the path of a Hugging Face tokenizer.json (default: world)")
    parser.add_argument(
        "--val_split",
        type=float,
        default=0.0,
        help="hold out: below 1 a fraction of the tokens, else a number of documents; to PREFIX.val.bin/.idx",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of shuffling and held-out documents (default: 0)")
    parser.add_argument("--skip_bad", action="store_true", help="pass over bad lines and files, and count them, instead of stopping")
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        help="threads that parse and tokenise (default: one for each core); the result does not depend on it",
    )
    parser.add_argument(
        "--report",
        type=Path,
        default=None,
        metavar="FILE",
        help="write the facts of the summary, and the lengths of the documents, as JSON",
    )
    return parser


def _progress(started: float) -> Callable[[Stage], None]:
    """Says now and then how far it is: on a terminal in one line that changes, elsewhere a line each time."""
    last, terminal = started, env.rewrites_lines(sys.stderr)

    def say(stage: Stage) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (PAUSE / 10 if terminal else PAUSE):
            return
        last = now
        line = f"{stage.name} {stage.part:4.0%}  {stage.documents} documents"
        if stage.name == "reading":
            seconds = now - started
            left = (
                f", {datetime.timedelta(seconds=int(seconds / stage.part - seconds))} left" if 0 < stage.part and not stage.resumed else ""
            )
            line += f"  {volume(stage.text_bytes)}, {volume(stage.text_bytes / seconds)}/s{left}"
        if terminal:
            bar = "#" * round(stage.part * BAR)
            line = f"\r\033[K[{bar:.<{BAR}}] {line}"
        print(line, file=sys.stderr, end="" if terminal else "\n", flush=True)

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
        print(f"skipped {made.skipped} bad inputs:")
        for line in made.first_skipped[:SHOWN]:
            print(f"  {line}")
    data = BinIdx(prefix)
    _show(data, tokenizer, 0)
    if data.n_docs > 1:
        _show(data, tokenizer, -1)
    print("---")
    print(f"{prefix}.bin/idx: {made.tokens} tokens, {made.documents} document{'s' * (made.documents != 1)}, {made.dtype}")
    if made.val_documents:
        print(f"{prefix}.val.bin/idx: {made.val_tokens} tokens, {made.val_documents} document{'s' * (made.val_documents != 1)} held out")
        if made.val_tokens <= ctx_len:
            print(
                f"too little to validate with: --ctx_len {ctx_len} needs at least {ctx_len + 1} tokens; "
                "hold out more with a larger --val_split"
            )
    print(f"largest token id {made.largest}, {made.distinct} distinct ones; --vocab_size {tokenizer.vocab_size}")
    try:
        prime = magic_prime(made.tokens, ctx_len)
    except UserError as error:
        print(f"too short to train on: {error}")
        return
    print(f"{made.tokens / (ctx_len * MINI_EPOCH):.3f} mini-epochs of {MINI_EPOCH} samples")
    print(f"\n--my_exit_tokens {made.tokens} --magic_prime {prime} --ctx_len {ctx_len}\n")


def _stem(file: Path) -> str:
    name = file.name
    for suffix in (*PACKED, kind(file)):
        name = name.removesuffix(suffix)
    return name


def main(argv: list[str]) -> int:
    """Returns 0; raises UserError for whatever is wrong with arguments or input, and then no output has been made."""
    args = _parser().parse_args(argv)
    if args.ctx_len < 1:
        raise UserError(f"CTX_LEN {args.ctx_len} must be at least 1")
    if args.ctx_len < 32 and args.epochs >= 128:  # a common slip, and nobody's wish
        raise UserError(f"{args.epochs} COPIES and CTX_LEN {args.ctx_len} look swapped; give {args.ctx_len} {args.epochs}, COPIES first")
    if not 0 <= args.seed < 1 << 32:
        raise UserError(f"--seed {args.seed} must lie in 0 to 2^32 - 1")
    files = expand(args.inputs)
    if args.workers < 0:
        raise UserError(f"--workers {args.workers} must be at least 1, or 0 for one for each core")
    if not args.out and len(files) > 1:
        raise UserError(f"{len(files)} input files need --out PREFIX")
    if not args.out and files == [STDIN]:
        raise UserError("standard input needs --out PREFIX")
    if args.report is not None:
        check_file(args.report, "--report")
    prefix = args.out or _stem(files[0])
    tokenizer = load_tokenizer(args.tokenizer)
    started = time.monotonic()
    try:
        made = pack(
            files, prefix, tokenizer, args.epochs, args.text_key, args.val_split, args.seed, args.skip_bad, args.workers, _progress(started)
        )
    except KeyboardInterrupt:
        kept = f"the same command goes on where this one stopped (or remove {prefix}.unfinished)"
        print(
            f"\ninterrupted; {'what came from standard input is gone, so that nothing is kept' if STDIN in files else kept}",
            file=sys.stderr,
            flush=True,
        )
        raise
    if env.rewrites_lines(sys.stderr):
        print("\r\033[K", end="", file=sys.stderr)
    seconds = time.monotonic() - started
    print(f"{made.text_bytes} bytes of text in {seconds:.1f} s ({volume(made.text_bytes / seconds)}/s)")
    _summary(made, prefix, tokenizer, args.ctx_len)
    if args.report is not None:
        write_json(args.report, asdict(made), "--report", f"the tokens are in {prefix}.bin, choose another name")
    return 0
