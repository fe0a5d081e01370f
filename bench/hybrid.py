"""A hybrid's attention beside RWKV-7's time mixing: one block's mixer, forward and backward, by length of the text.

    python bench/hybrid.py --width 256 --tokens 2048,2048,4096 --lengths 256,1024,4096 --window 512 --out hybrid.json

Correctness first: attention reading a text at once must give what it gives in pieces; nothing is timed otherwise. A mixer is
norm, token shift, projections and what is between them. The environment is that of the demo's training. Rounds of all mixers
alternate, so that a busy machine hits them alike; medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

from environment import as_in_the_demo, seconds, write_record
from rwkvlm.config import HybridConfig
from rwkvlm.models import LanguageModel, build, init_weights
from rwkvlm.train.strategy import DTYPES

ROUNDS = 9  # and one to warm up


def make(width: int, dtype: torch.dtype, window: int = 0, heads: int = 0) -> LanguageModel:
    """Block 0 and 1 are RWKV-7's, block 2 has attention."""
    model = build(
        HybridConfig(n_layer=3, n_embd=width, vocab_size=64, attention_layers="2", attention_window=window, attention_kv_heads=heads)
    )
    init_weights(model, 0)
    for block in model.blocks:
        torch.nn.init.normal_(block.att.output.weight, std=width**-0.5)
    return model.to(dtype)


def wrong() -> str:
    """What is not as it must be, "" if nothing; on a small model."""
    idx = torch.randint(64, (2, 101), generator=torch.Generator().manual_seed(0))
    for window in (0, 16):
        model = make(128, torch.float32, window)
        with torch.no_grad():
            whole, (head, state) = model(idx), model(idx[:, :37], return_state=True)
            if (torch.cat([head, model(idx[:, 37:], state)], 1) - whole).abs().max() > 1e-4 * whole.abs().max():
                return f"pieces do not give the logits of the whole text, window {window}"
    return ""


def step(model: LanguageModel, block: int, x: torch.Tensor, v_first: torch.Tensor) -> float:
    x = x.detach().requires_grad_()
    return seconds(lambda: model.blocks[block].att(x, model.blocks[block].ln1, v_first)[1].sum().backward())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 256), ("window", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("lengths", "256,1024,4096"), ("tokens", "2048,2048,4096")):
        parser.add_argument(f"--{name}", type=lambda text: [int(word) for word in text.split(",")], default=default)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    if problem := wrong():
        print(f"error: {problem}", file=sys.stderr)
        return 1
    results = []
    for precision in ("fp32", "bf16"):
        dtype = DTYPES[precision]
        for length, tokens in zip(options.lengths, options.tokens, strict=True):
            forms = {
                "time mixing": (make(options.width, dtype), 1),
                "attention": (make(options.width, dtype), 2),
                "attention, one head of keys": (make(options.width, dtype, heads=1), 2),
            }
            if options.window < length:
                forms["attention, window"] = (make(options.width, dtype, options.window), 2)
            x, v_first = (torch.randn(tokens // length, length, options.width).to(dtype) for _ in range(2))
            rounds = [{name: step(*form, x, v_first) for name, form in forms.items()} for _ in range(ROUNDS + 1)][1:]
            ms = {name: round(1e3 * statistics.median(times[name] for times in rounds), 1) for name in forms}
            results.append({"precision": precision, "length": length, "tokens": tokens, "ms": ms})
            print(f"{precision} {tokens // length} x {length}: " + ", ".join(f"{name} {time} ms" for name, time in ms.items()), flush=True)
    write_record(options.out, width=options.width, window=options.window, threads=torch.get_num_threads(), results=results)
    return 0


if __name__ == "__main__":
    as_in_the_demo()
    sys.exit(main())
