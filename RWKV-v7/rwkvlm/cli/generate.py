"""`python -m rwkvlm generate`: text from a checkpoint, token by token."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from .flags import Parser


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m rwkvlm generate", description="Continue a prompt with a trained model.")
    parser.add_argument("--model", required=True, help="checkpoint, for example out/L6-D256-x070/rwkv-final.pth")
    parser.add_argument("--prompt", default="", help='text to continue; "" starts a new document')
    parser.add_argument("--length", type=int, default=100, help="tokens to generate [100]")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token [1]")
    parser.add_argument("--top_p", type=float, default=0.7, help="keep the likeliest tokens up to this probability; 1: all [0.7]")
    parser.add_argument("--top_k", type=int, default=0, help="keep this many of the likeliest tokens; 0: all [0]")
    parser.add_argument("--seed", type=int, default=None, help="same seed, same text; default: a new one each time")
    parser.add_argument("--tokenizer", default="", help="world or a Hugging Face tokenizer.json [the one beside the model, else world]")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [auto]")
    args = parser.parse_args(argv)
    from ..infer import load_engine  # torch takes seconds to import: wrong flags are answered before

    engine = load_engine(args.model, args.tokenizer, args.device)
    tokens = engine.tokens(args.prompt, args.length, temperature=args.temperature, top_p=args.top_p, top_k=args.top_k, seed=args.seed)
    engine.prepare()
    if (read := engine.misread(args.prompt)) is not None:
        print(f"the tokenizer does not know all of the prompt: the model reads {read!r}", file=sys.stderr)
    made = 0

    def counted() -> Iterator[int]:
        nonlocal made
        for token in tokens:
            made += 1
            yield token

    start = time.perf_counter()
    print(args.prompt, end="", flush=True)
    for text in engine.text(counted()):
        print(text, end="", flush=True)
    print()
    ended = f"the model ended the text after {made} of {args.length} tokens, " if made < args.length else ""
    print(f"[{ended}{time.perf_counter() - start:.1f} s]", file=sys.stderr)
    return 0
