"""bench/ablation_phantom: variants of equal size, and a whole ablation in miniature."""

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from rwkvlm import models
from rwkvlm.config import ModelConfig, TrainConfig, UserError
from rwkvlm.data.tokenizer import load_tokenizer
from rwkvlm.train.flops import flops_per_token

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import ablation_phantom as tool

sys.path.pop(0)
BASE = ModelConfig(n_layer=2, n_embd=64, head_size=16, vocab_size=193)


def test_variants_are_equal_in_parameters():
    for name, settings in tool.variants(0.5, 32).items():
        config = tool.fitted(BASE, settings) if settings else BASE
        model = models.build(config)
        counted = sum(p.numel() for p in model.parameters()) - model.emb.weight.numel()
        unused = 2 * config.n_embd * config.rank_v + config.n_embd  # block 0's value residual, which files have
        assert counted + unused == pytest.approx(tool.parameters(BASE), rel=0.02), name
        assert config.head_size == 16 and config.n_layer == 2 and config.dim_ffn % 8 == 0


def test_variants_are_what_they_are_called():
    def parts(settings):
        config = tool.fitted(BASE, settings)
        return config.has_ghosts, config.steps_on_state, config.has_memory

    found = {name: parts(settings) for name, settings in tool.variants(0.5, 32).items() if settings}
    assert found == {
        "ghost": (True, False, False),
        "state": (False, True, False),
        "memory": (False, False, True),
        "memory_wide": (False, False, True),
        "ghost_state": (True, True, False),
        "ghost_memory": (True, False, True),
    }
    given = tool.variants(0.5, 32, 128)
    default, wide = (tool.fitted(BASE, given[name]) for name in ("memory", "memory_wide"))
    assert (default.ttt_features, wide.ttt_features) == (32, 128) and wide.dim_ffn < default.dim_ffn


def test_unequal_variants_are_refused(capsys, tmp_path):
    with pytest.raises(UserError, match="more than 2%"):
        tool.check_equal({"rwkv7": BASE, "ghost": BASE.with_(dim_ffn=288)})
    tool.check_equal({"rwkv7": BASE, "ghost": BASE.with_(dim_ffn=264)})
    tiny = "--n_layer 1 --n_embd 16 --head_size 16 --vocab_size 20 --dim_ffn 16 --ctx_len 32 --ttt_chunk 16 --variants memory".split()
    assert tool.main(["plan", str(tmp_path), *tiny]) == 2
    assert capsys.readouterr().err.startswith("error: no ") and not list(tmp_path.iterdir())


def test_flops_of_rwkv7_are_those_of_the_formula():
    assert tool.flops(BASE, 64) == pytest.approx(flops_per_token(BASE), rel=0.03)  # block 0's value residual is not computed
    for name in ("memory", "memory_wide"):
        memory = tool.fitted(BASE, tool.variants(0.5, 32)[name])
        # of one segment more
        assert 3 * tool.flops(memory, 96) - 2 * tool.flops(memory, 64) == pytest.approx(flops_per_token(memory), rel=1e-4)


def test_a_folder_takes_one_plan(capsys, tmp_path):
    sizes = "--n_layer 1 --n_embd 32 --head_size 16 --vocab_size 20 --ctx_len 32 --ttt_chunk 16".split()
    assert tool.main(["plan", str(tmp_path), *sizes, "--variants", "rwkv7", "state", "--seeds", "1"]) == 0
    for line in (tmp_path / "state.flags", tmp_path / "rwkv7.flags"):
        words = line.read_text().split()
        config = TrainConfig(
            **{
                name.removeprefix("--"): type(getattr(TrainConfig(), name.removeprefix("--")))(value)
                for name, value in zip(words[::2], words[1::2])
            }
        )
        assert config.n_embd == 32 and not config.flags_without_effect()
    assert tool.main(["plan", str(tmp_path), *sizes, "--variants", "memory", "--seeds", "2"]) == 0
    planned = json.loads((tmp_path / "plan.json").read_text())
    assert [*planned["models"]] == ["rwkv7", "state", "memory"] and planned["seeds"] == [1, 2]
    capsys.readouterr()
    assert tool.main(["plan", str(tmp_path), *sizes, "--conditions", "lr 1"]) == 2
    assert "could not be compared" in capsys.readouterr().err
    assert tool.main(["plan", str(tmp_path), *sizes, "--variants", "memory_wide", "--features", "32"]) == 0
    assert tool.main(["plan", str(tmp_path), *sizes, "--variants", "memory_wide", "--features", "64"]) == 2
    assert "was planned with memory_wide as" in capsys.readouterr().err


def test_report_of_runs(tmp_path):
    tool.main(
        f"plan {tmp_path} --n_layer 1 --n_embd 32 --head_size 16 --vocab_size 20 --ctx_len 32 --ttt_chunk 16 --epoch_samples 10 "
        "--variants rwkv7 memory --seeds 1 2".split()
    )
    for name, losses in (("rwkv7-1", (4.0, 3.0)), ("rwkv7-2", (4.0, 2.0)), ("memory-1", (4.0, 1.0)), ("memory-2", (4.0, 1.0))):
        (tmp_path / name).mkdir()
        lines = [
            {"step": 0, "tokens": 0, "val_loss": losses[0]},
            {"step": 1, "tokens": 320, "loss": 3.5, "tokens_per_s": 10},
            {"step": 1, "tokens": 320, "val_loss": losses[1]},
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        measured = [
            {
                "file": file,
                "accuracy": share,
                "loss": 1.0,
                "by_quarter": [share] * 4,
                "by_pairs": {"4": {"accuracy": 1.0, "loss": 0.1}, "8": {"accuracy": share, "loss": 1.0}},
            }
            for file, share in (("rwkv-init.pth", 0.1), ("rwkv-0.pth", 0.4), ("rwkv-final.pth", 0.5))
        ]
        (tmp_path / name / "recall.json").write_text(json.dumps({"results": measured}))
        if name != "memory-2":
            (tmp_path / name / "rwkv-final.pth").touch()
        assert tool.main(["result", str(tmp_path), name]) == (2 if name == "memory-2" else 0)  # not finished: does not count
        shutil.rmtree(tmp_path / name)  # a report needs the result alone
    lines = tool.report(tmp_path)
    assert any(line.startswith("| rwkv7 | 1 2 |") and "2.5000 (2.0000 to 3.0000)" in line for line in lines)
    assert "not run: memory-2" in lines
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["runs"]["memory"]["1"]["accuracy_curve"] == [[0, 0.1], [320, 0.4], [320, 0.5]]
    assert [line for line in lines if line.startswith("| rwkv7 | mean |")] == [
        "| rwkv7 | mean | 100.0% | 50.0% |"
    ] and "| memory | 1 | 100.0% | 50.0% |" in lines
    for name in ("accuracy", "val_loss", "by_pairs"):
        drawn = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        assert len(drawn.findall("{http://www.w3.org/2000/svg}polyline")) == 3


def test_byte_pairs_of_a_text(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"the ghost of the {n}th théâtre\n" * 9}) + "\n" for n in range(20)))
    tool.main(["tokenizer", str(tmp_path / "text.jsonl"), "--vocab_size", "280", "--out", str(tmp_path / "bpe.json")])
    tokenizer = load_tokenizer(str(tmp_path / "bpe.json"))
    ids = tokenizer.encode("the théâtre, and what it never saw: 字")
    assert tokenizer.decode(ids) == "the théâtre, and what it never saw: 字" and 0 not in ids and tokenizer.vocab_size == 280


@pytest.mark.parametrize(
    "knobs, cure",
    [(dict(TASKS="sums"), "use corpus, recall or both"), (dict(CORPUS_TOKENS="100"), "use more tokens or a smaller MINI_EPOCHS")],
)
def test_knobs_that_cannot_be_are_refused_with_the_cure(tmp_path, knobs, cure):
    done = subprocess.run(
        [ROOT / "bench/ablation_phantom.sh"],
        env=os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path)} | knobs,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.endswith(f"; {cure}\n") and done.stderr.count("\n") == 1
    )


@pytest.mark.slow
def test_both_ablations_in_miniature(tmp_path):
    """A few steps of two variants each; started again, it trains nothing."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"def f{n}(x):\n    return x * {n} + {n * n}\n" * 60}) + "\n" for n in range(60)))
    knobs = {
        "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "OUT": str(tmp_path / "out"), "SEEDS": "1", "VARIANTS": "rwkv7 memory_wide",
        "MEMORY_FEATURES": "32", "MINI_EPOCHS": "2", "CORPUS_TEXT": str(text), "CORPUS_TOKENS": "8192", "CORPUS_BATCH": "2",
        "CORPUS_VOCAB": "300", "CORPUS_MODEL": "--n_layer 1 --n_embd 32 --head_size 16 --ttt_chunk 64", "RECALL_TOKENS": "4096",
        "RECALL_MODEL": "--n_layer 1 --n_embd 32 --head_size 16 --ttt_chunk 16", "PAIRS": "8", "KEYS": "16", "VALUES": "8",
        "SEQUENCES": "8",
    }  # fmt: skip
    command = [ROOT / "bench/ablation_phantom.sh"]
    first = subprocess.run(command, env=os.environ | knobs, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stdout + first.stderr
    for task, drawn in (("corpus", ["val_loss.svg"]), ("recall", ["accuracy.svg", "by_pairs.svg", "val_loss.svg"])):
        saved = json.loads((tmp_path / "out" / task / "report.json").read_text())
        assert saved["missing"] == [] and [*saved["runs"]] == ["rwkv7", "memory_wide"]
        assert len({run["1"]["tokens"] for run in saved["runs"].values()}) == 1  # equal tokens
        assert all((tmp_path / "out" / task / name).exists() for name in drawn)
    for task in ("corpus", "recall"):  # what is recorded is taken over
        kept = [path for path in (tmp_path / "out" / task).glob("*.json") if path.stem in ("plan", "rwkv7-1", "memory_wide-1")]
        assert len(kept) == 3
        (tmp_path / "new" / task).mkdir(parents=True)
        for path in kept:
            shutil.copy(path, tmp_path / "new" / task)
    again = subprocess.run(command, env=os.environ | knobs | {"OUT": str(tmp_path / "new")}, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0 and "--- " not in again.stdout
    assert (tmp_path / "new/recall/report.json").read_text() == (tmp_path / "out/recall/report.json").read_text()
    other = subprocess.run(command, env=os.environ | knobs | {"CORPUS_LR": "1e-3 1e-4"}, capture_output=True, text=True, timeout=600)
    assert other.returncode != 0 and "choose another OUT" in other.stderr
