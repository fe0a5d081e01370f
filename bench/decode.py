"""Recurrent inference on the CPU against the PyPI package rwkv, on the same file in one run: tokens/s of decoding and of reading a prompt.

    python bench/decode.py --model L12-D768.pth --threads 2 --json decode.json

The file is made when it does not exist: initial values, with the matrices that start at zero filled, for else nothing would
reach the logits. The package runs at its best on a CPU: RWKV_V7_ON=1 RWKV_JIT_ON=1, strategy "cpu fp32" (TorchScript; it reads a
prompt with whole matrix products around a loop over tokens). Correctness first: logits after a prompt and after tokens fed one by
one agree within 2e-4, and nothing is timed on wrong results. All forms share a setting of fp32 matrix products, the fastest that
keeps fp32's error here. Batch 1; rounds of all forms alternate, so that a busy machine hits them alike. Sampling is left out.

Decoding reads every weight once a token, so that memory sets its limit: in every round a sum over as many bytes as the form
reads is timed too, and "of memory" is that time divided by the token's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from environment import seconds, write_record
from rwkvlm.checkpoint.pth import save_weights
from rwkvlm.config import ModelConfig
from rwkvlm.infer import Engine, load_engine
from rwkvlm.models import build, init_weights
from rwkvlm.ops.precision import fp32_matmul_choice
from rwkvlm.ops.rwkv7_step import on_large_pages

TOLERANCE = {"package fp32": 2e-4, "ours fp32": 2e-4, "ours bf16": 5e-2}  # of the logits, whose deviation is about 0.5
BAR = {"decode": 1.5, "prefill": 2.0}  # ours fp32 over the package, tokens/s
CHECKED = 16  # tokens fed one by one in the check


@dataclass(frozen=True)
class Form:
    """read(tokens, state) -> logits [V], state after them; weights: the bytes that a token reads."""

    read: Callable[[list[int], list | None], tuple[torch.Tensor, list]]
    weights: int


def make_model(path: Path, config: ModelConfig) -> None:
    model = build(config)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.emb.weight.normal_(std=0.5, generator=generator)
        for name, p in model.named_parameters():
            if p.dim() == 2 and not p.any():
                p.normal_(std=0.3 / p.shape[-1] ** 0.5, generator=generator)
    save_weights(path, model.state_dict())


def package_form(path: Path) -> Form:
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0"}
    from rwkv.model import RWKV

    model = RWKV(str(path.with_suffix("")), "cpu fp32")
    return Form(model.forward, sum(4 * t.numel() for name, t in model.z.items() if name != "emb.weight"))


def our_form(path: Path, dtype: torch.dtype) -> Form:
    engine: Engine = load_engine(path, device="cpu", dtype=dtype)

    def read(tokens: list[int], state: list | None) -> tuple[torch.Tensor, list]:
        logits, state = engine.read(tokens, state)
        return logits[0], state

    step = engine._step
    read_once = engine.model.state_dict().items() if step is None else enumerate([*step.matrices, *step.vectors, step.head])
    return Form(read, sum(t.numel() * t.element_size() for name, t in read_once if name != "emb.weight"))


def one_by_one(form: Form, tokens: list[int], state: list | None) -> tuple[torch.Tensor, list]:
    """Logits after each token, [T, V], and the last state."""
    logits = []
    for token in tokens:
        x, state = form.read([token], state)
        logits.append(x.float().clone())
    return torch.stack(logits), state


def errors(forms: dict[str, Form], tokens: list[int]) -> tuple[dict[str, float], float]:
    """Of each form's logits the largest difference from the package's, after the prompt and token by token; their deviation."""
    results = {}
    for name, form in forms.items():
        after_prompt, state = form.read(tokens[CHECKED:], None)
        results[name] = torch.cat([after_prompt.float()[None], one_by_one(form, tokens[:CHECKED], state)[0]])
    expected = results["package fp32"]
    return {name: (x - expected).abs().max().item() for name, x in results.items()}, expected.std().item()


def measure(forms: dict[str, Form], options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Seconds a token of each round: {"decode" | "prefill" | "memory": {form: [...]}}; "memory" is a sum over the bytes of its weights."""
    vocabulary = forms["package fp32"].read([0], None)[0].numel()
    prompt = torch.randint(vocabulary, (options.prompt,), generator=torch.Generator().manual_seed(2)).tolist()
    (buffer,) = on_large_pages([torch.ones(max(form.weights for form in forms.values()) // 4)], torch.float32)
    states = {name: form.read(prompt, None)[1] for name, form in forms.items()}
    for name, form in forms.items():  # TorchScript specialises during the first calls
        form.read(prompt, None)
        for _ in range(3):
            one_by_one(form, prompt[:2], states[name])
    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in forms} for kind in ("decode", "prefill", "memory")}
    for _ in range(options.rounds):
        for name, form in forms.items():
            times["prefill"][name].append(seconds(lambda: form.read(prompt, None)) / len(prompt))
            part = buffer[: form.weights // 4]
            times["memory"][name].append(seconds(lambda: [part.sum() for _ in range(4)]) / 4)
            times["decode"][name].append(seconds(lambda: one_by_one(form, prompt[: options.tokens], states[name])) / options.tokens)
    return times


def report(forms: dict[str, Form], times: dict[str, dict[str, list[float]]]) -> dict:
    rows: dict = {}
    for kind in ("decode", "prefill"):
        for label, pick in (("median", statistics.median), ("fastest", min)):
            rate = {name: 1 / pick(t) for name, t in times[kind].items()}
            row = {name: {"tokens_per_s": round(r, 1), "of_package": round(r / rate["package fp32"], 2)} for name, r in rate.items()}
            if kind == "decode":
                for name, form in forms.items():
                    memory = pick(times["memory"][name])
                    row[name] |= {"of_memory": round(memory * rate[name], 2), "memory_gb_per_s": round(form.weights / memory / 1e9, 1)}
            rows[f"{kind}_{label}"] = row
            cells = []
            for name, cell in row.items():
                memory = f", {cell['of_memory']:.0%} of memory at {cell['memory_gb_per_s']} GB/s" if "of_memory" in cell else ""
                cells.append(f"{name} {cell['tokens_per_s']:.1f} ({cell['of_package']:.2f}x{memory})")
            print(f"{kind:7} {label:7} tokens/s  " + "  ".join(cells), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=Path("bench-decode.pth"), help="official-format .pth file; made with the sizes below when missing"
    )
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens decoded in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--bar", action="store_true", help=f"exit 1 where ours in fp32 is below {BAR['decode']}x decoding or {BAR['prefill']}x prefill"
    )
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not options.model.exists():
        print(f"making {options.model}", file=sys.stderr)
        make_model(options.model, ModelConfig(n_layer=options.n_layer, n_embd=options.n_embd, vocab_size=options.vocab_size))

    try:
        package = package_form(options.model)
    except ModuleNotFoundError as error:
        print(f"error: {error}; pip install rwkv", file=sys.stderr)
        return 2
    forms = {
        "package fp32": package,
        "ours fp32": our_form(options.model, torch.float32),
        "ours bf16": our_form(options.model, torch.bfloat16),
    }
    setting, line = fp32_matmul_choice()
    torch.set_float32_matmul_precision(setting)  # the package has allowed itself TF32
    print(line)

    found, deviation = errors(forms, list(range(1, 3 * CHECKED)))
    print(f"largest difference of logits (deviation {deviation:.2f}): " + ", ".join(f"{name} {error:.1e}" for name, error in found.items()))
    if deviation < 0.1 or any(not found[name] <= tolerance for name, tolerance in TOLERANCE.items()):
        print(f"error: above {TOLERANCE}, or trivial logits; nothing is timed on wrong results", file=sys.stderr)
        return 1
    rows = report(forms, measure(forms, options))
    if options.json:
        results = {"fp32_matmul": line, "errors": found, "weights_bytes": {name: form.weights for name, form in forms.items()}, **rows}
        write_record(options.json, threads=options.threads, rwkv=importlib.metadata.version("rwkv"), **results)
    below = [kind for kind, bar in BAR.items() if rows[f"{kind}_median"]["ours fp32"]["of_package"] < bar]
    if options.bar and below:
        print(f"error: below the bar: {', '.join(below)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
