"""bench/decode.py on a tiny model: it makes the file, checks the logits and reports; speed is not tested."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SIZES = "--n_layer 2 --n_embd 64 --vocab_size 100 --prompt 8 --tokens 2 --rounds 2 --threads 1".split()


def bench(*arguments):
    return subprocess.run([sys.executable, ROOT / "bench/decode.py", *SIZES, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_report_and_refusal(tmp_path):
    model, results = tmp_path / "tiny.pth", tmp_path / "decode.json"
    done = bench("--model", model, "--json", results)
    assert done.returncode == 0, done.stderr
    found = json.loads(results.read_text())
    assert found["errors"]["ours fp32"] < 2e-4
    assert found["weights_bytes"]["ours fp32"] < 0.6 * found["weights_bytes"]["package fp32"], "a bf16 file is read as bf16"
    for kind in ("decode_median", "decode_fastest", "prefill_median", "prefill_fastest"):
        assert set(found[kind]) == {"package fp32", "ours fp32", "ours bf16"}
        assert all(cell["tokens_per_s"] > 0 for cell in found[kind].values())
    weights = torch.load(model)
    weights["head.weight"].zero_()
    torch.save(weights, model)
    done = bench("--model", model)
    assert done.returncode == 1 and "trivial logits" in done.stderr, "nothing is timed on logits that prove nothing"
