"""`python -m rwkvlm evaluate`: how good a model is: its loss on a text, LAMBADA, tasks of lm-evaluation-harness."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import UserError
from .flags import Parser

if TYPE_CHECKING:
    from ..infer import Engine


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="python -m rwkvlm evaluate", description="Measure a model. Any of --data, --lambada and --tasks may be given together."
    )
    parser.add_argument("--model", required=True, help="checkpoint, for example out/L6-D256-x070/rwkv-final.pth")
    parser.add_argument(
        "--data",
        default="",
        help="a .txt, .jsonl or .parquet (also .gz, .zst), or the PREFIX of a .bin/.idx pair: loss a token, perplexity, bits a byte",
    )
    parser.add_argument(
        "--ctx_len",
        type=int,
        default=0,
        help="0: each document of --data by itself, whole, after a token 0, without the 0 that ends it; "
        "else windows of so many tokens over all documents with their 0, each read anew, as the trainer's validation does [0]",
    )
    parser.add_argument(
        "--lambada", default="", help='a .jsonl with LAMBADA\'s passages as "text": accuracy and perplexity of the last word'
    )
    parser.add_argument(
        "--tasks",
        default="",
        help="tasks of lm-evaluation-harness by name, as piqa,arc_easy; needs the package lm_eval (pip install lm-eval)",
    )
    parser.add_argument("--tasks_path", default="", help="folder with tasks of your own for lm-evaluation-harness")
    parser.add_argument(
        "--few_shots", type=int, default=None, help="examples before each question of --tasks; default: the task's own number"
    )
    parser.add_argument("--text_key", default="text", help="key of the text in a line of JSON, or column of a table [text]")
    parser.add_argument("--limit", type=int, default=0, help="only so many documents, passages, or questions of each task; 0: all [0]")
    parser.add_argument(
        "--batch", type=int, default=8, help="texts read side by side: changes speed and memory, and figures by no more than rounding [8]"
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 on a GPU, fp32 on the CPU [auto]")
    parser.add_argument("--tokenizer", default="", help="world or a Hugging Face tokenizer.json [the one beside the model, else world]")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [auto]")
    parser.add_argument("--out", type=Path, default=None, help="write model, data and figures here as JSON too")
    args = parser.parse_args(argv)

    tasks = [name for name in args.tasks.split(",") if name]
    if not (args.data or args.lambada or tasks):
        raise UserError("there is nothing to measure; give --data, --lambada or --tasks")
    for name, least in (("ctx_len", 0), ("limit", 0), ("batch", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} {getattr(args, name)} must be at least {least}")
    import torch  # takes seconds: wrong flags are answered before

    from ..checkpoint.place import check_file, write_json
    from ..data.tokenizer import tokenizer_of
    from ..eval import lambada, run_tasks, text_loss
    from ..eval.harness import check_library
    from ..infer import load_engine

    if args.out is not None:
        check_file(args.out, "--out")
    if tasks:
        check_library()
    dtype = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    engine = load_engine(args.model, args.tokenizer, args.device, dtype)
    about = _about(engine, args.model, args.tokenizer or tokenizer_of(args.model))
    print(
        f"{about['model']}: {about['model_type']} L{about['n_layer']} D{about['n_embd']}, "
        f"{about['parameters'] / 1e6:.6f} M parameters, {about['dtype']} on {about['device']}"
    )
    results: dict[str, Any] = {}
    for name, measure in (
        ("data", args.data and (lambda: text_loss(engine, args.data, args.ctx_len, args.batch, args.limit, args.text_key))),
        ("lambada", args.lambada and (lambda: lambada(engine, args.lambada, args.batch, args.limit, args.text_key))),
        ("tasks", tasks and (lambda: run_tasks(engine, tasks, args.batch, args.limit, args.tasks_path, args.few_shots))),
    ):
        if measure:
            begun = time.perf_counter()
            results[name] = measure()
            print("\n".join(LINES[name](results[name])) + f"\n{'':16} [{time.perf_counter() - begun:.1f} s]", flush=True)
    if args.out is not None:
        found = {**about, "limit": args.limit, "batch": args.batch, "results": results}
        write_json(args.out, found, "--out", "free some space or choose another place")
    return 0


def _about(engine: Engine, path: str, tokenizer: str) -> dict[str, Any]:
    import torch

    from ..models import count_parameters

    weight, config = engine.model.emb.weight, engine.model.config
    sizes = {name: getattr(config, name) for name in ("model_type", "n_layer", "n_embd", "vocab_size", "head_size")}
    return {
        "model": path,
        **sizes,
        "parameters": count_parameters(engine.model),
        "tokenizer": tokenizer,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": str(weight.device),
        "torch": torch.__version__,
    }


def _data_lines(found: dict[str, Any]) -> list[str]:
    how = f"windows of {found['ctx_len']} tokens" if found["ctx_len"] else "each document by itself"
    size = "" if found["bytes"] is None else f", {found['bytes']:,} bytes"
    no_bytes = "--tokenizer is not this model's" if found["bytes"] is None else "no bytes are predicted"
    lines = [
        "",
        f"{found['data']}: {found['documents']:,} document{'s' * (found['documents'] != 1)}, {found['tokens']:,} tokens{size}; {how}",
        f"{'loss':20} {found['loss']:12.6f}  nats a token",
        f"{'perplexity':20} {_figure(found['perplexity'])}",
        f"{'bits a byte':20} {found['bits_per_byte']:12.6f}"
        if found["bits_per_byte"] is not None
        else f"{'bits a byte':20} {'unknown':>12}  {no_bytes}",
        f"{'tokens read':20} {'loss':>12} {'tokens':>14}",
    ]
    return lines + [
        f"{span['from']:>9,} to {span['to']:>7,} {span['loss']:12.4f} {span['tokens']:14,}" for span in found["loss_by_tokens_read"]
    ]


def _figure(value: float) -> str:
    """With a power of ten where it is large: an untrained model's perplexity of words has dozens of digits."""
    return f"{value:12.{'4f' if value < 1e7 else '4e'}}"


def _lambada_lines(found: dict[str, Any]) -> list[str]:
    return [
        "",
        f"{found['data']}: LAMBADA, {found['passages']:,} passages",
        f"{'accuracy':16} {found['accuracy']:12.2%}",
        f"{'perplexity':16} {_figure(found['perplexity'])}",
    ]


def _task_lines(found: dict[str, Any]) -> list[str]:
    lines = ["", "lm-evaluation-harness"]
    for task, metrics in found.items():
        lines += [f"{task:24} {name.removesuffix(',none'):24} {_figure(value)}" for name, value in metrics.items() if "stderr" not in name]
    return lines


LINES = {"data": _data_lines, "lambada": _lambada_lines, "tasks": _task_lines}
