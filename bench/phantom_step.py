"""Training steps of a Phantom with test-time training on and off, side by side, and of RWKV-7: the price of the steps.

    python bench/phantom_step.py --layers 4 --width 256 --shapes 8x256,2x1024 --out phantom_step.json

Correctness first: with TTT off and no Ghost layers the loss and all gradients are RWKV-7's to the bit, and with TTT on the
logits of the whole sequence are those of its pieces; nothing is timed otherwise. A step is features, fused head and loss, and
the backward pass, without the optimizer. The environment is that of the demo's training. Rounds of all models alternate, so
that a busy machine hits them alike; the ratio is the median over rounds, and of the fastest rounds beside it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

from environment import as_in_the_demo, seconds, write_record
from rwkvlm.config import ModelConfig, model_config
from rwkvlm.models import LanguageModel, build, init_weights
from rwkvlm.ops.cross_entropy import head_cross_entropy

BAR = 1.25  # TTT on / off


def make(config: ModelConfig, dtype: torch.dtype) -> LanguageModel:
    """Away from its initial values, at which half of the model is zero."""
    model = build(config).to(dtype)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((0.2 * torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5).to(dtype))
    return model


def step(model: LanguageModel, idx: torch.Tensor) -> torch.Tensor:
    """One forward and backward; returns the cross entropy."""
    model.zero_grad(set_to_none=True)
    x, terms = model.for_training(idx[:, :-1])
    loss = head_cross_entropy(x, model.head.weight, idx[:, 1:])
    sum((weight * value for weight, value in terms.values()), start=loss).backward()
    return loss.detach()


def wrong() -> str:
    """What is not as it must be, "" if nothing; on a small model."""
    sizes = dict(n_layer=2, n_embd=64, vocab_size=64, head_size=32)
    idx = torch.randint(64, (2, 101), generator=torch.Generator().manual_seed(0))
    plain, off = (
        make(ModelConfig(**sizes), torch.float32),
        make(model_config("phantom", **sizes, core_ratio=1.0, ttt_enabled=False), torch.float32),
    )
    if step(plain, idx) != step(off, idx) or any(not torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), off.parameters())):
        return "a Phantom with all switches off is not RWKV-7"
    on = make(model_config("phantom", **sizes, ttt_chunk=16), torch.float32).eval()
    with torch.no_grad():
        whole, (head, state) = on(idx), on(idx[:, :37], return_state=True)
        pieces = torch.cat([head, on(idx[:, 37:], state)], 1)
    return "" if (pieces - whole).abs().max() < 1e-4 * whole.abs().max() else "pieces do not give the logits of the whole sequence"


def measure(B: int, T: int, options: argparse.Namespace) -> dict:
    sizes = dict(n_layer=options.layers, n_embd=options.width, vocab_size=options.vocab, head_size=options.head_size)
    phantom = dict(core_ratio=options.core_ratio, ttt_chunk=options.chunk, ttt_kind=options.kind)
    models = {
        "rwkv7": ModelConfig(**sizes),
        "ttt_off": model_config("phantom", **sizes, **phantom | {"ttt_enabled": False}),
        "ttt_on": model_config("phantom", **sizes, **phantom),
    }
    if options.kind == "state":
        models["ttt_meta"] = model_config("phantom", **sizes, **phantom, ttt_meta=True)
    models = {name: make(config, getattr(torch, options.dtype)) for name, config in models.items()}
    idx = torch.randint(options.vocab, (B, T + 1), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        step(model, idx)
    for _ in range(options.rounds):
        for name, model in models.items():
            times[name].append(seconds(lambda: step(model, idx)))
    ratios = [on / off for on, off in zip(times["ttt_on"], times["ttt_off"])]
    return {
        "B": B,
        "T": T,
        **vars(options) | {"out": None, "shapes": None},
        "ms": {name: round(statistics.median(t) * 1e3, 2) for name, t in times.items()},
        "ms_fastest": {name: round(min(t) * 1e3, 2) for name, t in times.items()},
        "ttt_on/ttt_off": round(statistics.median(ratios), 3),
        "ttt_on/ttt_off_fastest": round(min(times["ttt_on"]) / min(times["ttt_off"]), 3),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="8x256,2x1024", help="BxT, comma-separated")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--head_size", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--chunk", type=int, default=64, help="ttt_chunk, of steps on the state")
    parser.add_argument("--kind", choices=("state", "memory"), default="state")
    parser.add_argument("--core_ratio", type=float, default=1.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    as_in_the_demo()
    torch.set_num_threads(options.threads)
    if reason := wrong():
        print(f"error: {reason}; nothing is timed on wrong results", file=sys.stderr)
        return 1
    rows = []
    for shape in options.shapes.split(","):
        row = measure(*map(int, shape.split("x")), options)
        rows.append(row)
        for label, key in (("median", "ms"), ("fastest", "ms_fastest")):
            print(f"(B,T)=({row['B']},{row['T']}) {label:7}  " + "  ".join(f"{name} {ms:8.2f} ms" for name, ms in row[key].items()))
        print(f"{'':15} TTT on / off {row['ttt_on/ttt_off']:.3f} (fastest {row['ttt_on/ttt_off_fastest']:.3f}; bar {BAR})", flush=True)
    if options.out:
        write_record(options.out, threads=options.threads, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
