"""make_data.py: text to finished binidx, beside the official tool; the tokenizer alone; peak memory.

    python bench/text.py --folder ~/bench-text
    python bench/make_data.py --text ~/bench-text/text.jsonl --official ~/RWKV-LM/RWKV-v5 --out result.json
    python bench/make_data.py --text ~/bench-text/text.jsonl --large 5e9 --out large.json          (peak memory; wants 15 GB of disk)
    python bench/make_data.py --text ~/bench-text/text.jsonl --large 1.5e9 --one_txt --out one_txt.json      (one document of that size)

A whole run is the process `make_data.py TEXT 1 4096`, start-up included; the best of --rounds. The official tool, whose folder holds
its own make_data.py, gets the first --official_bytes of the same text, in the same rounds. Correctness first: the tokenizer's ids
equal the plain one's on a sample, and on the official tool's part both tools must make the same documents.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from environment import ROOT, write_record
from rwkvlm.data.binidx import BinIdx
from rwkvlm.data.documents import parse, read_blocks
from rwkvlm.data.tokenizer import Texts, WorldTokenizer, load_tokenizer, vocabulary_path


def head(text: Path, size: float, to: Path) -> int:
    """Whole lines of the text, about so many bytes (repeated where it has fewer); their size."""
    written = 0
    with open(to, "wb") as out:
        while written < size:
            with open(text, "rb") as file:
                for line in file:
                    if written >= size:
                        break
                    written += out.write(line)
    return written


def one_txt(text: Path, size: float, to: Path) -> int:
    """The texts of the lines one after the other, repeated to at least so many bytes; their size."""
    written = 0
    with open(to, "wb") as out:
        while written < size:
            with open(text, "rb") as file:
                for line in file:
                    written += out.write(json.loads(line)["text"].encode() + b"\n")
    return written


def ours(text: Path, folder: Path, workers: int) -> dict:
    """One run of make_data.py: seconds of the process, and of what it does without its start-up."""
    command = [
        sys.executable,
        str(ROOT / "make_data.py"),
        str(text),
        "1",
        "4096",
        "--out",
        str(folder / "ours"),
        "--report",
        str(folder / "facts.json"),
    ]
    begin = time.perf_counter()
    done = subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.PIPE, text=True)
    out = done.stdout.read()
    _, status, usage = os.wait4(done.pid, 0)
    if status:
        raise SystemExit(f"make_data.py failed: {out}")
    seconds = time.perf_counter() - begin
    facts = json.loads((folder / "facts.json").read_text())
    inner = float(out.split(" bytes of text in ")[1].split(" s ")[0])
    return {
        "seconds": seconds,
        "inner_seconds": inner,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
        "facts": facts,
    }


def official(tool: Path, text: Path, folder: Path) -> float:
    """Seconds of the official make_data.py with one copy."""
    for name in ("src", "tokenizer"):
        if not (folder / name).exists():
            os.symlink((tool / name).resolve(), folder / name)
    shutil.copy(text, folder / "demo.jsonl")
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, str(tool.resolve() / "make_data.py"), "demo.jsonl", "1", "4096"], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - begin


def same_documents(a: BinIdx, b: BinIdx) -> bool:
    return sorted(a.doc(i).tobytes() for i in range(a.n_docs)) == sorted(b.doc(i).tobytes() for i in range(b.n_docs))


def tokenizer_alone(text: Path, rounds: int) -> dict:
    """MB/s of one thread over texts that lie in memory, in batches as make_data has them."""
    world, plain = load_tokenizer(), WorldTokenizer(vocabulary_path())
    batches = [parse(block).texts for block, _ in zip(read_blocks(text), range(126))]
    size = sum(len(batch.data) for batch in batches)
    for batch in batches[::40]:
        sample = Texts.join([batch[k] for k in range(min(20, len(batch)))])
        assert world.encode_batch(sample)[0].tolist() == [t for k in range(len(sample)) for t in [*plain.encode(sample[k]), 0]], (
            "ids differ"
        )
    seconds = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for batch in batches:
            world.encode_batch(batch)
        seconds.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    plain.encode(batches[0].data[:1_000_000].tobytes())
    return {
        "text_bytes": size,
        "MB_per_s": size / 1e6 / min(seconds),
        "rounds_s": seconds,
        "python_trie_MB_per_s": 1 / (time.perf_counter() - begin),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", required=True, type=Path, help="the .jsonl that bench/text.py made")
    parser.add_argument("--official", type=Path, help="folder of the official make_data.py, with its src/ and tokenizer/")
    parser.add_argument("--official_bytes", type=float, default=2e7, help="how much of the text the official tool gets")
    parser.add_argument("--large", type=float, default=0, help="only one run, over so many bytes, by repetition of the text")
    parser.add_argument("--one_txt", action="store_true", help="with --large: a single .txt instead of lines of JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    result = {"cores": os.cpu_count(), "workers": args.workers}
    with tempfile.TemporaryDirectory(dir=args.text.parent) as name:
        folder = Path(name)
        if args.large:
            name = "large.txt" if args.one_txt else "large.jsonl"
            size = (one_txt if args.one_txt else head)(args.text, args.large, folder / name)
            run = ours(folder / name, folder, args.workers)
            result["large"] = {
                f"{'txt' if args.one_txt else 'jsonl'}_bytes": size,
                **run,
                "MB_per_s": run["facts"]["text_bytes"] / 1e6 / run["seconds"],
            }
        else:
            runs, official_runs, part_runs = [], [], []
            if args.official:
                part_bytes = head(args.text, args.official_bytes, folder / "part.jsonl")
            for _ in range(args.rounds):
                runs.append(ours(args.text, folder, args.workers))
                if args.official and len(official_runs) < 2:
                    official_runs.append(official(args.official, folder / "part.jsonl", folder))
            text_bytes = runs[0]["facts"]["text_bytes"]
            best = min(runs, key=lambda run: run["seconds"])
            without_start, peak = min(run["inner_seconds"] for run in runs), max(run["peak_mib"] for run in runs)
            result["whole"] = {
                "jsonl_bytes": args.text.stat().st_size,
                "MB_per_s": text_bytes / 1e6 / best["seconds"],
                "MB_per_s_without_start": text_bytes / 1e6 / without_start,
            }
            result["whole"] |= {
                "peak_mib": peak,
                "rounds_s": [run["seconds"] for run in runs],
                "cpu_s": best["cpu_seconds"],
                "facts": best["facts"],
            }
            result["tokenizer"] = tokenizer_alone(args.text, args.rounds)
            if args.official:
                part_runs = [ours(folder / "part.jsonl", folder, args.workers) for _ in range(2)]
                assert same_documents(BinIdx(folder / "ours"), BinIdx(folder / "demo")), "the two tools make different documents"
                speed = part_runs[0]["facts"]["text_bytes"] / 1e6 / min(official_runs)
                result["official"] = {
                    "jsonl_bytes": part_bytes,
                    "MB_per_s": speed,
                    "rounds_s": official_runs,
                    "ours_is_times": result["whole"]["MB_per_s"] / speed,
                }
    result["bench_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(result, indent=1))
    if args.out:
        write_record(args.out, **result)


if __name__ == "__main__":
    main()
