"""The models of the Phantom ablation, made equal in size, and what came of their runs. bench/ablation_phantom.sh calls it.

    python bench/ablation_phantom.py plan OUT --n_layer 4 --n_embd 128 --vocab_size 2048 ...      variants, a table, flags for train.py
    python bench/ablation_phantom.py result OUT rwkv7-1                                           keeps the result of a finished run
    python bench/ablation_phantom.py report OUT                                                   tables, report.json, curves as SVG
    python bench/ablation_phantom.py tokenizer demo.jsonl --vocab_size 2048 --out bpe.json        byte pairs of the text itself

plan: RWKV-7 has the sizes that are given. Every other variant gets the width n_embd and the dim_ffn with which it has as
many parameters, all but the embedding counted, dim_ffn / n_embd being as near as possible to RWKV-7's; more than 2 % of
difference is an error (exit code 2). FLOPs per token of forward and backward: torch's own count of the matrix products of one
pass over a whole sample (each segment of test-time training included), and the formulas of train/flops.py for the head and
for what the kernels of wkv7 compute.
"""

from __future__ import annotations

import argparse
import html
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as subwords
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from plot_loss import COLOURS, RIGHT, TOP, WIDTH, Frame, read, ticks
from rwkvlm import models
from rwkvlm.config import ModelConfig, UserError, model_config

TOLERANCE = 0.02
GRAIN = 8  # dim_ffn is a multiple
PALETTE = (*COLOURS, "#8c564b", "#17becf", "#7f7f7f")  # one for each variant
OFF = {"core_ratio": 1.0, "ttt_enabled": False}
Curve = list[tuple[float, float]]


def variants(core_ratio: float, ttt_chunk: int, features: int = 64) -> dict[str, dict[str, object]]:
    """Phantom's settings by variant; none is RWKV-7 itself. features are those of memory_wide."""
    ghost = {**OFF, "core_ratio": core_ratio}
    state, memory = ({**OFF, "ttt_enabled": True, "ttt_kind": kind} for kind in ("state", "memory"))
    state["ttt_chunk"] = ttt_chunk
    return {
        "rwkv7": {},
        "ghost": ghost,
        "state": state,
        "memory": memory,
        "memory_wide": memory | {"ttt_features": features},
        "ghost_state": state | ghost | {"ttt_enabled": True},
        "ghost_memory": memory | ghost | {"ttt_enabled": True},
    }


def sized(base: ModelConfig, settings: dict[str, object], n_embd: int, dim_ffn: int) -> ModelConfig:
    own = {"n_layer": base.n_layer, "vocab_size": base.vocab_size, "head_size": base.head_size, "n_embd": n_embd, "dim_ffn": dim_ffn}
    return model_config("phantom", **own, **settings) if settings else model_config(**own)


def parameters(config: ModelConfig) -> int:
    """All but the embedding; the head counts."""
    with torch.device("meta"):
        return models.count_parameters(models.build(config)) - config.vocab_size * config.n_embd


def fitted(base: ModelConfig, settings: dict[str, object]) -> ModelConfig:
    """The variant with as many parameters as `base`. UserError when none is within TOLERANCE."""
    wanted, found = parameters(base), []
    for n_embd in range(base.n_embd, 2 * base.n_embd + 1, base.head_size):
        low, high = 1, 8 * n_embd // GRAIN  # dim_ffn / GRAIN; parameters grow with it
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if parameters(sized(base, settings, n_embd, GRAIN * middle)) < wanted else (low, middle)
        for grains in (low - 1, low):
            if grains:
                config = sized(base, settings, n_embd, GRAIN * grains)
                difference = abs(parameters(config) / wanted - 1)
                found.append(
                    (
                        difference > TOLERANCE,
                        round(abs(config.dim_ffn / n_embd - base.dim_ffn / base.n_embd), 2),
                        difference,
                        n_embd,
                        config,
                    )
                )
    outside, _, difference, _, config = min(found, key=lambda entry: entry[:4])
    if outside:
        raise UserError(
            f"no {settings} has within {TOLERANCE:.0%} the {wanted:,} parameters of RWKV-7 (nearest: {difference:.1%}); "
            "use a larger --n_embd, or a --head_size that divides it more finely"
        )
    return config


def check_equal(configs: dict[str, ModelConfig]) -> None:
    """UserError when a variant differs from the first by more than TOLERANCE in its parameters."""
    first, *others = configs
    for name in others:
        if abs(parameters(configs[name]) / parameters(configs[first]) - 1) > TOLERANCE:
            raise UserError(
                f"{name} has {parameters(configs[name]):,} parameters and {first} {parameters(configs[first]):,}, "
                f"which is more than {TOLERANCE:.0%} apart"
            )


def flops(config: ModelConfig, ctx_len: int) -> int:
    """Per token, forward and backward."""
    model = models.build(config)
    models.init_weights(model, 0)
    with FlopCounterMode(display=False) as counter:
        model.features(torch.zeros(1, ctx_len, dtype=torch.int64)).sum().backward()
    in_kernels = 27 * config.head_size * config.n_embd + (3 * config.memory_flops // 2 if getattr(config, "has_memory", False) else 0)
    return counter.get_total_flops() // ctx_len + 6 * config.n_embd * config.vocab_size + in_kernels * config.n_layer


def state_numbers(config: ModelConfig) -> int:
    """Floating-point numbers that a sequence's state holds between two tokens."""
    model = models.build(config)
    models.init_weights(model, 0)
    return sum(t.numel() for t in tree_leaves(model.init_state(1)) if t.is_floating_point())


def plan(options: argparse.Namespace) -> None:
    sizes = {name: getattr(options, name) for name in ("n_layer", "n_embd", "vocab_size", "head_size", "dim_ffn")}
    base = ModelConfig(**sizes)
    known = variants(options.core_ratio, options.ttt_chunk, options.features)
    if unknown := set(options.variants) - set(known):
        raise UserError(f"--variants {' '.join(sorted(unknown))} not known; choose of: {' '.join(known)}")
    configs = {"rwkv7": base} | {name: fitted(base, known[name]) for name in options.variants if name != "rwkv7"}
    check_equal(configs)
    whole = {key: value for key, value in vars(options).items() if key not in ("command", "out", "variants", "features")}
    rows = earlier(options.out, whole)
    options.out.mkdir(parents=True, exist_ok=True)
    for name, config in configs.items():
        settings = {key: int(value) if isinstance(value, bool) else value for key, value in known[name].items()}
        flags = {"my_testing": config.model_type, **{key: getattr(config, key) for key in sizes}, **settings}
        if rows.get(name, {"flags": flags})["flags"] != flags:
            raise UserError(f"{options.out} was planned with {name} as {rows[name]['flags']} and now it is {flags}; choose another OUT")
        (options.out / f"{name}.flags").write_text(" ".join(f"--{key} {value}" for key, value in flags.items()) + "\n")
        rows[name] = {
            "n_embd": config.n_embd,
            "dim_ffn": config.dim_ffn,
            "parameters": parameters(config),
            "flops": flops(config, options.ctx_len),
            "state": state_numbers(config),
            "flags": flags,
        }
    print("\n".join(size_table(rows)))
    (options.out / "plan.json").write_text(json.dumps({**whole, "models": rows}, indent=1) + "\n")


def earlier(out: Path, whole: dict[str, object]) -> dict[str, dict]:
    """The models that are planned in this folder already; their seeds are added to the new ones.

    UserError where they were planned differently.
    """
    if not (out / "plan.json").exists():
        return {}
    then = json.loads((out / "plan.json").read_text())
    for key, value in whole.items():
        if key != "seeds" and then[key] != value:
            raise UserError(
                f"{out} was planned with {key} {then[key]!r} and now it is {value!r}: its runs could not be compared; choose another OUT"
            )
    whole["seeds"] = sorted({*then["seeds"], *whole["seeds"]})
    return then["models"]


def train_tokenizer(text: Path, vocab_size: int, out: Path) -> None:
    """Byte pairs over all documents of a .jsonl; token 0 ends a document and stands for no text."""
    engine = Tokenizer(subwords.BPE())
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|end of document|>"], initial_alphabet=alphabet, show_progress=False
    )
    with open(text, encoding="utf-8") as lines:
        engine.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    out.parent.mkdir(parents=True, exist_ok=True)
    engine.save(str(out))


def size_table(rows: dict[str, dict]) -> list[str]:
    first = next(iter(rows.values()))
    lines = [
        "| variant | n_embd | dim_ffn | parameters without embedding | FLOPs per token | numbers in the state |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        more, work = row["parameters"] / first["parameters"] - 1, row["flops"] / first["flops"]
        lines.append(
            f"| {name} | {row['n_embd']} | {row['dim_ffn']} | {row['parameters']:,} ({more:+.2%}) "
            f"| {row['flops']:,} ({work:.2f}x) | {row['state']:,} |"
        )
    return lines


def finished(out: Path, name: str) -> dict[int, dict]:
    """What a variant's runs reached, those that have come to their end, by seed."""
    paths = sorted(out.glob(f"{name}-[0-9]*.json"), key=lambda path: int(path.stem.removeprefix(f"{name}-")))
    return {int(path.stem.removeprefix(f"{name}-")): json.loads(path.read_text()) for path in paths}


def keep_result(out: Path, run: str) -> None:
    """Writes OUT/RUN.json, all that a report needs of a run: its weights and logs may be deleted then.

    FileNotFoundError where the run has not ended.
    """
    if not (out / run / "rwkv-final.pth").exists():
        raise FileNotFoundError(f"{out / run} has no rwkv-final.pth; the run has not come to its end")
    found = result(out / run, json.loads((out / "plan.json").read_text()))
    (out / f"{run}.part").write_text(json.dumps(found) + "\n")
    (out / f"{run}.part").rename(out / f"{run}.json")


def result(folder: Path, planned: dict) -> dict[str, object]:
    """What a run reached: held-out loss, and where the task is recall the accuracy at the answers; and their curves over tokens."""
    steps, held_out = read(folder / "metrics.jsonl")
    found: dict[str, object] = {"tokens": steps[-1][0], "val_loss": held_out[-1][1], "val_loss_curve": held_out}
    rates = [
        record["tokens_per_s"]
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if (record := json.loads(line)).get("tokens_per_s")
    ]
    found["tokens_per_s"] = statistics.median(rates) if rates else None
    if (folder / "recall.json").exists():
        measured = json.loads((folder / "recall.json").read_text())["results"]
        of_mini_epoch = planned["epoch_samples"] * planned["ctx_len"]
        at = {"rwkv-init.pth": 0, "rwkv-final.pth": steps[-1][0]}
        found["accuracy_curve"] = [
            (at[m["file"]] if m["file"] in at else (int(m["file"][5:-4]) + 1) * of_mini_epoch, m["accuracy"]) for m in measured
        ]
        found |= {"accuracy": measured[-1]["accuracy"], "answer_loss": measured[-1]["loss"], "by_quarter": measured[-1]["by_quarter"]}
        found["by_pairs"] = {pairs: part["accuracy"] for pairs, part in measured[-1]["by_pairs"].items()}
    return found


def report(out: Path) -> list[str]:
    """Writes report.json, val_loss.svg and, for recall, accuracy.svg and by_pairs.svg; returns the lines of the tables.

    A run that is missing is named.
    """
    planned = json.loads((out / "plan.json").read_text())
    runs = {name: finished(out, name) for name in planned["models"]}
    missing = [f"{name}-{seed}" for name, seeds in runs.items() for seed in planned["seeds"] if seed not in seeds]
    keys = (
        ["accuracy", "answer_loss", "val_loss"]
        if any("accuracy" in run for seeds in runs.values() for run in seeds.values())
        else ["val_loss"]
    )
    lines = [*size_table(planned["models"]), "", f"| variant | seeds | {' | '.join(keys)} |", "|---" * (2 + len(keys)) + "|"]
    for name, seeds in runs.items():
        if seeds:
            cells = [_spread([run[key] for run in seeds.values() if key in run]) for key in keys]
            lines.append(f"| {name} | {' '.join(map(str, seeds))} | {' | '.join(cells)} |")
    lines += pairs_table(runs)
    lines += ["", f"not run: {' '.join(missing)}" if missing else "all runs are finished"]
    (out / "report.json").write_text(json.dumps({"plan": planned, "runs": runs, "missing": missing}, indent=1) + "\n")
    (out / "report.md").write_text("\n".join(lines) + "\n")
    for key, label in (("val_loss", "validation loss"), ("accuracy", "share of answers that are right")):
        curves = {name: [run[f"{key}_curve"] for run in seeds.values() if f"{key}_curve" in run] for name, seeds in runs.items()}
        curves = {name: found for name, found in curves.items() if found}
        if curves:
            (out / f"{key}.svg").write_text(picture(curves, label))
    across = {
        name: [[(math.log2(int(pairs)), share) for pairs, share in run["by_pairs"].items()] for run in seeds.values() if "by_pairs" in run]
        for name, seeds in runs.items()
    }
    if any(across.values()):
        marks = {x: f"{2**x:g}" for found in across.values() for curve in found for x, _ in curve}
        (out / "by_pairs.svg").write_text(
            picture({name: found for name, found in across.items() if found}, "share of answers that are right", "pairs", marks)
        )
    return lines


def pairs_table(runs: dict[str, dict[int, dict]]) -> list[str]:
    """Right answers by number of pairs: every run, and each variant's mean."""
    measured = {name: {seed: run["by_pairs"] for seed, run in seeds.items() if "by_pairs" in run} for name, seeds in runs.items()}
    pairs = next((found for seeds in measured.values() for found in seeds.values()), None)
    if pairs is None:
        return []
    lines = ["", f"| right answers, pairs: | seed | {' | '.join(pairs)} |", "|---" * (2 + len(pairs)) + "|"]
    for name, seeds in measured.items():
        rows = {str(seed): [found[n] for n in pairs] for seed, found in seeds.items()}
        if len(rows) > 1:
            rows["mean"] = [statistics.mean(column) for column in zip(*rows.values())]
        lines += [f"| {name} | {seed} | {' | '.join(f'{100 * share:.1f}%' for share in row)} |" for seed, row in rows.items()]
    return lines


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.4f}" + (f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else "")


def picture(curves: dict[str, list[Curve]], label: str, below: str = "million tokens", marks: dict[float, str] | None = None) -> str:
    """One colour for each variant, one line for each of its seeds, a dot at each line's end.

    marks: what is written where on the axis below, from its first to its last; otherwise x are tokens from 0 on.
    """
    everything = [point for seeds in curves.values() for curve in seeds for point in curve]
    marks = marks or {value: f"{value / 1e6:g}" for value in ticks(0, max(x for x, _ in everything) or 1)}
    frame = Frame(everything, marks, f"{below} (upwards: {label})", RIGHT + 110)  # room for the names
    for i, (name, seeds) in enumerate(curves.items()):
        colour = PALETTE[i % len(PALETTE)]
        for curve in seeds:
            frame.line(curve, colour, 1.5)
            frame.dot(*curve[-1], colour)
        frame.parts.append(f'<text x="{WIDTH - frame.right + 12}" y="{TOP + 16 * (i + 1)}" fill="{colour}">{html.escape(name)}</text>')
    return frame.svg()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make, keep, tell, byte_pairs = (commands.add_parser(name) for name in ("plan", "result", "report", "tokenizer"))
    for command in (make, keep, tell):
        command.add_argument("out", type=Path, help="folder of the task")
    keep.add_argument("run", help="VARIANT-SEED")
    for name, default in (
        ("n_layer", 4),
        ("n_embd", 128),
        ("vocab_size", 2048),
        ("head_size", 32),
        ("dim_ffn", 0),
        ("ctx_len", 512),
        ("ttt_chunk", 64),
        ("epoch_samples", 0),
        ("tokens", 0),
    ):
        make.add_argument(f"--{name}", type=int, default=default)
    make.add_argument("--core_ratio", type=float, default=0.5, help="of the Ghost variants")
    make.add_argument("--features", type=int, default=64, help="of each key of memory_wide")
    make.add_argument("--variants", nargs="+", default=list(variants(0.5, 64)))
    make.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    make.add_argument("--conditions", default="", help="what else all runs have in common; a folder takes only one")
    byte_pairs.add_argument("text", type=Path)
    byte_pairs.add_argument("--vocab_size", type=int, default=2048)
    byte_pairs.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    try:
        if options.command == "plan":
            plan(options)
        elif options.command == "result":
            keep_result(options.out, options.run)
        elif options.command == "tokenizer":
            train_tokenizer(options.text, options.vocab_size, options.out)
        else:
            print("\n".join(report(options.out)))
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
