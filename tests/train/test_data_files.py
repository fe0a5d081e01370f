"""Runs on several files and on data that are not binidx: what they say, that they resume exactly, what they refuse."""

import io
import json
import os
import random
import shutil

import numpy as np
import pytest

from rwkvlm.cli import main
from rwkvlm.cli.flags import parse_flags
from rwkvlm.config import TrainConfig
from rwkvlm.data.binidx import BinIdx, BinIdxWriter
from rwkvlm.data.sampler import order_hash
from rwkvlm.train.plan import make_plan


@pytest.fixture(scope="module")
def mixed(data, tmp_path_factory) -> str:
    """Two files and their held-out ones, as --data_file names them."""
    folder = tmp_path_factory.mktemp("mixed")
    tokens = BinIdx(data).tokens
    for name, part in (("a", tokens[:9000]), ("b", tokens[9000:] // 2), ("a.val", tokens[:500]), ("b.val", tokens[-700:])):
        with BinIdxWriter(folder / name) as out:
            out.add(part)
    return f"{folder}/a:0.7,{folder}/b:0.3"


def test_a_mixture_resumes_to_the_same_losses(run, mixed, losses, tmp_path, capfd):
    assert run(tmp_path / "whole", data_file=mixed, my_exit_tokens=12 * 128) == 0
    told = capfd.readouterr().out
    a, b = (piece.rpartition(":")[0] for piece in mixed.split(","))
    lines = told[told.index("data  ") :].splitlines()
    assert lines[0].startswith(f"data      {a}: 70% of the samples, 0.125 passes, 9,000 tokens, token ids ") and lines[0].endswith(
        " (all checked),"
    )
    assert lines[1].startswith(f"          {b}: 30% of the samples, 0.0454 passes, 11,000 tokens, token ids ")
    assert f"held out {a}.val, {b}.val" in told and "586 chunks of 32 tokens, mini-epochs" in told
    settings = make_plan(parse_flags(TrainConfig, run.argv(tmp_path / "parts", data_file=mixed), "train.py")).settings()
    assert settings["order_hash"] == f"{order_hash(269)}, {order_hash(317)}"
    for steps in (5, 4, 0):
        assert run(tmp_path / "parts", data_file=mixed, my_exit_tokens=12 * 128, max_steps=steps) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 12
    capfd.readouterr()
    assert run(tmp_path / "parts", data_file=mixed.replace("0.7", "0.6")) == 2
    err = capfd.readouterr().err
    assert (
        err.count("\n") == 1
        and f"--data_file {mixed.replace('0.7', '0.6')} means 269 chunks x 2/3, 317 chunks x 1/3, but" in err
        and "use the data of that run" in err
    )
    assert run(tmp_path / "parts", data_file=a) == 2
    assert f"--data_file {a} means magic_prime 269, but" in capfd.readouterr().err


@pytest.mark.parametrize("data_type", ["utf-8", "bytes"])
def test_a_text_by_characters_and_by_bytes(run, records, tmp_path, capfd, monkeypatch, data_type):
    rng = random.Random(0)
    (tmp_path / "text.txt").write_text("".join(rng.choice(["der ", "die ", "das ", "größte ", "→\n"]) for _ in range(3000)))
    (tmp_path / "val.txt").write_text("der größte→\n" * 20)
    flags = dict(
        data_file=tmp_path / "text.txt",
        data_type=data_type,
        val_file=tmp_path / "val.txt",
        vocab_size=None,
        my_exit_tokens=8 * 128,
        n_embd=32,
    )
    assert run(tmp_path / "out", **flags) == 0
    vocabulary = 1 + len(set((tmp_path / "text.txt").read_text())) if data_type == "utf-8" else 256
    told = capfd.readouterr().out
    assert f"vocabulary {vocabulary}, " in told and f"held out {tmp_path}/val.txt" in told and records(tmp_path / "out", "val_loss")
    model, tokenizer = str(tmp_path / "out" / "rwkv-final.pth"), str(tmp_path / "out" / "tokenizer.json")
    assert (
        main(
            ["generate", "--model", model, "--tokenizer", tokenizer, "--prompt", "größ", "--length", "5", "--seed", "1", "--device", "cpu"]
        )
        == 0
    )
    told = capfd.readouterr()
    assert told.out.startswith("größ") and "does not know" not in told.err
    (tmp_path / "newest.pth").symlink_to(model)
    for path in (model, str(tmp_path / "newest.pth")):
        assert main(["generate", "--model", path, "--prompt", "größ", "--length", "5", "--seed", "1", "--device", "cpu"]) == 0
        assert capfd.readouterr().out == told.out, "what lies beside the model is its tokenizer"
    val, found = str(tmp_path / "val.txt"), tmp_path / "found.json"
    assert main(["evaluate", "--model", model, "--data", val, "--out", str(found), "--device", "cpu"]) == 0
    assert json.loads(found.read_text())["tokenizer"] == tokenizer
    assert main(["evaluate", "--model", model, "--data", val, "--tokenizer", "world", "--device", "cpu"]) == 2, (
        "none is taken if one is given"
    )
    capfd.readouterr()
    assert main(["generate", "--model", model, "--tokenizer", tokenizer, "--prompt", "größ€", "--length", "5", "--device", "cpu"]) == 0
    assert ("the tokenizer does not know all of the prompt: the model reads 'größ" in capfd.readouterr().err) == (data_type == "utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("größ\ndas €\n"))
    assert main(["chat", "--model", model, "--tokenizer", tokenizer, "--length", "5", "--device", "cpu", "--system", "die €"]) == 0
    misread = [line for line in capfd.readouterr().err.splitlines() if "does not know" in line]
    assert misread == [f"[the tokenizer does not know all of this: the model reads {read!r}]" for read in ("die", "das")] * (
        data_type == "utf-8"
    )


def test_other_characters_are_not_mixed_into_a_run(run, tmp_path, capfd):
    """As many as before, so that only their meaning has changed."""
    text = tmp_path / "text.txt"
    text.write_text("der die das größte→\n" * 300)
    flags = dict(data_file=text, data_type="utf-8", vocab_size=None, my_exit_tokens=2 * 128, n_embd=32)
    assert run(tmp_path / "out", **flags) == 0
    text.write_text(text.read_text().replace("d", "x"))
    assert run(tmp_path / "out", **flags | dict(my_exit_tokens=9 * 128)) == 2
    assert (
        f"text.txt has other characters than {tmp_path}/out/tokenizer.json, with which this run began; use another --proj_dir"
        in capfd.readouterr().err
    )


def test_numpy_gives_the_run_of_the_same_tokens(run, data, losses, whole, tmp_path):
    np.save(tmp_path / "tokens.npy", BinIdx(data).tokens.astype(np.int64))
    assert run(tmp_path / "out", data_file=tmp_path / "tokens.npy", data_type="numpy", max_steps=4) == 0
    assert losses(tmp_path / "out") == losses(whole)[:4]


def swapped(prefix: str, folder) -> str:
    """The same documents in another order: as many tokens, so the same magic_prime."""
    data = BinIdx(prefix)
    with BinIdxWriter(folder / "swapped", data.dtype) as out:
        for i in reversed(range(data.n_docs)):
            out.add(data.doc(i))
    return str(folder / "swapped")


def test_other_tokens_of_the_same_length_are_not_mixed_into_a_run(run, data, losses, whole, tmp_path, capfd):
    own = str(tmp_path / "own")
    for end in (".bin", ".idx"):
        shutil.copyfile(data + end, own + end)
    assert run(tmp_path / "out", data_file=own, max_steps=2) == 0
    other = swapped(data, tmp_path)
    capfd.readouterr()
    for file, name in ((other, f" (then {own})"), (own, "")):
        if file == own:
            shutil.copyfile(other + ".bin", own + ".bin")
        assert run(tmp_path / "out", data_file=file) == 2
        out, err = capfd.readouterr()
        assert out == "" and err == (
            f"error: --data_file: {file} does not hold the tokens that {tmp_path}/out/state/step2 was trained with{name}: "
            "the order of the data would break; use the data of that run, or another --proj_dir with --load_model to begin anew\n"
        )
    assert run(tmp_path / "new", data_file=other, load_model=tmp_path / "out" / "rwkv-init.pth", max_steps=1) == 0, "the cure"
    moved = str(tmp_path / "moved")
    with BinIdxWriter(moved, np.int32) as file:  # other files, another dtype, younger: the same tokens
        for i in range(BinIdx(data).n_docs):
            file.add(BinIdx(data).doc(i))
    assert run(tmp_path / "out", data_file=moved, max_steps=2) == 0
    os.utime(f"{data}.bin")
    assert run(tmp_path / "out", max_steps=2) == 0
    assert losses(tmp_path / "out") == losses(whole)[:6]


def test_each_file_of_a_mixture_is_known_by_what_it_holds(run, data, tmp_path, capfd):
    for name, seed in (("a", 1), ("b", 2)):
        with BinIdxWriter(tmp_path / name) as out:
            out.add(np.random.default_rng(seed).integers(1, 256, size=9000))
    a, b = tmp_path / "a", tmp_path / "b"
    assert run(tmp_path / "out", data_file=f"{a},{b}", max_steps=1) == 0
    capfd.readouterr()
    assert run(tmp_path / "out", data_file=f"{b},{a}") == 2
    assert (
        f"--data_file: {b} does not hold the tokens that {tmp_path}/out/state/step1 was trained with (then {a}): " in capfd.readouterr().err
    )
    assert run(tmp_path / "out", data_file=f"{a},{b}", max_steps=1) == 0


def test_other_ends_of_documents_count_where_the_model_begins_anew_with_each(run, data, tmp_path, capfd):
    with BinIdxWriter(tmp_path / "one") as out:
        out.add(BinIdx(data).tokens)
    assert run(tmp_path / "out", max_steps=1) == 0
    assert run(tmp_path / "out", data_file=tmp_path / "one", max_steps=1) == 0, "nothing depends on them"
    capfd.readouterr()
    assert run(tmp_path / "out", doc_reset=1, kernel="torch") == 2
    assert (
        f"{data} divides its tokens into 20 documents, and {tmp_path}/out/state/step2 was trained with 1 (then {tmp_path}/one): "
        in capfd.readouterr().err
    )
