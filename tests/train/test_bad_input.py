"""Everything a user can get wrong at the start of a run: one line with the cure on stderr, exit code 2, nothing trained."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkvlm.checkpoint.pth import save_weights
from rwkvlm.config import ModelConfig, cgroups
from rwkvlm.data.binidx import bin_path, idx_path
from rwkvlm.models import build, init_weights

NEW = dict(train_stage=0)


def copied(data: str, folder: Path) -> str:
    prefix = folder / "data"
    for path in (bin_path, idx_path):
        path(prefix).write_bytes(path(data).read_bytes())
    return str(prefix)


def large_held_out_token(data, folder):
    return dict(val_file=large_token(data, folder)["data_file"])


def text(data, folder):
    (folder / "my.data.jsonl").write_text('{"text": "x"}\n')
    return dict(data_file=folder / "my.data.jsonl")


def truncated(data, folder):
    prefix = copied(data, folder)
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:-100])
    return dict(data_file=prefix)


def mismatched_val(data, folder):
    prefix = copied(data, folder)
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:-100])
    return dict(val_file=prefix)


def cut_index(data, folder):
    prefix = copied(data, folder)
    idx_path(prefix).write_bytes(idx_path(prefix).read_bytes()[:50])
    return dict(data_file=prefix)


def large_token(data, folder):
    prefix = copied(data, folder)
    tokens = np.fromfile(bin_path(prefix), dtype=np.uint16)
    tokens[1234] = 300
    tokens.tofile(bin_path(prefix))
    return dict(data_file=prefix)


def weights(folder: Path, name: str = "model.pth", **sizes) -> Path:
    model = build(ModelConfig(**(dict(n_layer=2, n_embd=32, head_size=16, vocab_size=256) | sizes)))
    init_weights(model, 0)
    save_weights(folder / name, model.state_dict())
    return folder / name


def without(folder: Path, name: str) -> Path:
    path = weights(folder)
    tensors = torch.load(path)
    del tensors[name]
    save_weights(path, tensors)
    return path


def broken_file(folder: Path) -> Path:
    path = weights(folder)
    path.write_bytes(path.read_bytes()[:1000])
    return path


def held(folder: Path, name: str) -> dict:
    weights(folder, name)
    return dict(proj_dir=folder, n_embd=32, head_size=16)


def regular_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file"


def link_to_nowhere(folder: Path) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / "state").symlink_to(folder / "disk")
    return folder / "out"


CASES = {
    "no data_file": (lambda d, f: dict(data_file=None), "--data_file is missing; give the path without .bin/.idx"),
    "missing data file": (lambda d, f: dict(data_file=f / "none"), "none.idx does not exist; give the path without .bin/.idx"),
    "a text as data": (
        text,
        "python make_data.py {folder}/my.data.jsonl 1 512 --out {folder}/my makes one of a .jsonl, .txt or .parquet: then give {folder}/my",
    ),
    "JSON as characters": (
        lambda d, f: text(d, f) | dict(data_type="utf-8"),
        "not on the texts in it; python make_data.py {folder}/my.data.jsonl 1 512 --out {folder}/my makes tokens of these: "
        "then give --data_file {folder}/my with --data_type binidx",
    ),
    "the .bin as data": (lambda d, f: dict(data_file=f"{d}.bin"), "tiny.bin.idx does not exist; give {data}, without .bin"),
    "truncated .bin": (truncated, "data.bin is truncated:"),
    "truncated .idx": (cut_index, "copy or make it again"),
    "token >= vocab_size": (large_token, "holds token 300 at position 1234, outside the vocabulary (--vocab_size 256)"),
    "held-out token >= vocab_size": (large_held_out_token, "holds token 300 at position 1234, outside the vocabulary (--vocab_size 256)"),
    "epoch_begin behind the end": (
        lambda d, f: dict(epoch_begin=7, my_exit_tokens=1000),
        "--epoch_begin 7 begins after 8960 tokens, and the training ends at 1000: nothing would be trained; use --epoch_begin 0, or",
    ),
    "vocab_size too small": (lambda d, f: dict(vocab_size=200), "outside the vocabulary (--vocab_size 200)"),
    "ctx_len > data": (lambda d, f: dict(ctx_len=30000), "--ctx_len 30000 needs at least 60001 tokens and the data have 20000"),
    "ctx_len > half the data": (lambda d, f: dict(ctx_len=15000), "--ctx_len 15000 needs at least 30001 tokens"),
    "magic_prime not prime": (lambda d, f: dict(magic_prime=620), "use --magic_prime 617"),
    "magic_prime 1 mod 3": (lambda d, f: dict(magic_prime=619), "use --magic_prime 617"),
    "magic_prime too large": (lambda d, f: dict(magic_prime=641), "reads past the end of the data"),
    "magic_prime too small": (lambda d, f: dict(magic_prime=101), "use --magic_prime 617"),
    "magic_prime of another ctx_len, at stage 1": (lambda d, f: dict(magic_prime=1249, train_stage=1), "reads past the end of the data"),
    "missing val_file": (lambda d, f: dict(val_file=f / "held"), "held.idx does not exist"),
    "nameless val_file": (lambda d, f: dict(val_file=",,"), "--val_file ',,' has an empty name in it"),
    "weighed val_file": (
        lambda d, f: dict(val_file=f"{d}:0.5"),
        "held-out files are read one after the other, and have no weights; leave them out",
    ),
    "truncated val_file": (mismatched_val, "is truncated"),
    "missing load_model": (lambda d, f: NEW | dict(load_model=f / "none.pth"), "none.pth does not exist"),
    "broken load_model": (lambda d, f: NEW | dict(load_model=broken_file(f)), "is truncated or not a PyTorch weights file"),
    "load_model is no model": (lambda d, f: NEW | dict(load_model=d + ".bin"), "is truncated or not a PyTorch weights file"),
    "checkpoint of another width": (lambda d, f: NEW | dict(load_model=weights(f)), "--n_embd 64, but"),
    "checkpoint of another depth": (
        lambda d, f: NEW | dict(load_model=weights(f), n_embd=32, head_size=16, n_layer=3),
        "or add --load_partial 1, which begins the blocks above anew",
    ),
    "checkpoint of another vocabulary": (
        lambda d, f: NEW | dict(load_model=weights(f, vocab_size=300), n_embd=32, head_size=16),
        "has 300; use --vocab_size 300 or leave it out",
    ),
    "checkpoint lacks a tensor": (
        lambda d, f: NEW | dict(load_model=without(f, "blocks.1.ln1.weight"), n_embd=32, head_size=16),
        "the checkpoint lacks blocks.1.ln1.weight (1 missing in all); use --load_partial 1",
    ),
    "RWKV-7 for a Phantom lacks a matrix": (
        lambda d, f: (
            NEW | dict(load_model=without(f, "blocks.1.att.key.weight"), n_embd=32, head_size=16, my_testing="phantom", ttt_enabled=0)
        ),
        "the checkpoint lacks blocks.1.att.key.order (3 missing in all); use --load_partial 1",
    ),
    "checkpoint in proj_dir of another width": (lambda d, f: held(f, "rwkv-3.pth") | dict(n_embd=64), "--n_embd 64, but"),
    "unknown my_testing": (lambda d, f: dict(my_testing="x060"), "choose one of: x070"),
    "unknown strategy": (lambda d, f: dict(strategy="ddp_spawn"), "choose one of: auto, ddp, deepspeed_stage_1"),
    "unknown precision": (lambda d, f: dict(precision="8"), "choose one of: auto, fp32, tf32, fp16, bf16"),
    "fp16 on a CPU": (lambda d, f: dict(precision="fp16"), "--precision fp16 needs a GPU"),
    "CUDA graphs on a CPU": (lambda d, f: dict(cuda_graphs=1), "--cuda_graphs 1 needs a GPU; leave --cuda_graphs out"),
    "compiled CUDA graphs and micro batches": (
        lambda d, f: dict(cuda_graphs=1, compile=1, kernel="auto", accumulate_grad_batches=2, micro_bsz=2),
        "use --accumulate_grad_batches 1, or leave --compile out",
    ),
    "compiled CUDA graphs and recomputing": (
        lambda d, f: dict(cuda_graphs=1, compile=1, kernel="auto", grad_cp=1),
        "use --grad_cp 0, or leave --compile out",
    ),
    "CUDA graphs and documents": (
        lambda d, f: dict(cuda_graphs=1, doc_reset=1),
        "with --doc_reset 1 they differ; leave one of the two out",
    ),
    "nodes without a place to meet": (
        lambda d, f: dict(num_nodes=2),
        "--num_nodes 2: no place to meet is given; set MASTER_ADDR (node 0), ",
    ),
    "a batch beyond all memory": (
        lambda d, f: dict(micro_bsz=10**9),
        "--micro_bsz 1000000000: a step takes ",
    ),
    "a model beyond all memory": (
        lambda d, f: dict(n_layer=300, n_embd=65536),
        "--n_layer 300 --n_embd 65536: a step takes ",
    ),
    "initial weights beyond all memory": (
        lambda d, f: dict(n_layer=300, n_embd=65536, train_stage=1),
        "--n_layer 300 --n_embd 65536: the weights alone take ",
    ),
    "a timeout beyond all clocks": (lambda d, f: dict(dist_timeout=1e12), "--dist_timeout 1e+12 must be above 0 and at most 1e8 seconds"),
    "CUDA graphs and ZeRO-3": (
        lambda d, f: dict(cuda_graphs=1, strategy="deepspeed_stage_3"),
        "use deepspeed_stage_2 or ddp, or leave --cuda_graphs out",
    ),
    "CUDA graphs and dropout": (
        lambda d, f: dict(cuda_graphs=1, my_testing="phantom", ttt_chunk=16, dropout=0.1),
        "use --dropout 0, or leave --cuda_graphs out",
    ),
    "CUDA graphs and the meta loss": (
        lambda d, f: dict(cuda_graphs=1, my_testing="phantom", ttt_chunk=16, ttt_meta=1),
        "use --ttt_meta 0, or leave --cuda_graphs out",
    ),
    "CUDA graphs and passes": (
        lambda d, f: dict(
            cuda_graphs=1, my_testing="phantom", ttt_chunk=16, max_depth_iter=2, precision="bf16", accumulate_grad_batches=2, micro_bsz=2
        ),
        "use --accumulate_grad_batches 1, or leave --cuda_graphs out",
    ),
    "CUDA graphs 2": (lambda d, f: dict(cuda_graphs=2), "--cuda_graphs 2 is not known; use 0, 1, or -1 (where it helps)"),
    "kernel that cannot run": (lambda d, f: dict(kernel="cuda"), "--kernel cuda: "),
    "width and head size": (lambda d, f: dict(n_embd=80), "--n_embd 80 is not a multiple of --head_size 32"),
    "documents of data without any": (
        lambda d, f: dict(data_file=f"{d}.bin", data_type="bytes", doc_reset=1),
        "tiny.bin does not say where documents begin; use --data_type binidx",
    ),
    "dim_att": (lambda d, f: dict(dim_att=32), "--dim_att 32 differs from --n_embd 64"),
    "proj_dir below a file": (lambda d, f: dict(proj_dir=regular_file(f) / "out"), "cannot be written: "),
    "proj_dir is a file": (lambda d, f: dict(proj_dir=regular_file(f)), "cannot be written: "),
    "proj_dir that is not UTF-8": (lambda d, f: dict(proj_dir=f / "\udce9"), "PyTorch opens no file in a folder whose name is not UTF-8"),
    "training states on a disk that is not mounted": (
        lambda d, f: dict(proj_dir=link_to_nowhere(f)),
        "out cannot be written: {folder}/out/state is a link to {folder}/disk, which is not there; choose another folder",
    ),
    "stage 1 over a run": (lambda d, f: held(f, "rwkv-3.pth") | dict(train_stage=1), "would overwrite the run in"),
    "stage 0 over a run": (lambda d, f: held(f, "rwkv-3.pth") | NEW, "continue it with --train_stage 3"),
    "stage 0 over a finished run": (
        lambda d, f: held(f, "rwkv-final.pth") | NEW,
        "(it holds rwkv-final.pth: it is finished); train it longer with --train_stage 3 and a larger",
    ),
    "stage 1 over a finished run": (
        lambda d, f: held(f, "rwkv-final.pth") | dict(train_stage=1),
        "(it holds rwkv-final.pth: it is finished); train it",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_with_the_cure(run, data, tmp_path, capfd, monkeypatch, case):
    monkeypatch.delenv("MASTER_PORT", raising=False)  # runs of several processes before these leave theirs
    monkeypatch.setattr(cgroups, "swap_free", lambda: 0)  # macOS has any amount
    make, said = CASES[case]
    said = said.replace("{folder}", str(tmp_path)).replace("{data}", data)
    flags = dict(proj_dir=tmp_path / "out") | make(data, tmp_path)
    there = sorted(tmp_path.rglob("*"))
    assert run(flags.pop("proj_dir"), **flags) == 2
    assert sorted(tmp_path.rglob("*")) == there, "a refused run leaves nothing"
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0] and said in lines[0], err
    assert "Traceback" not in err and "\nstep " not in out
    assert not list((tmp_path / "out").glob("rwkv-[0-9f]*.pth"))


def test_deepspeed_where_there_is_none(run, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert run(tmp_path / "out", strategy="deepspeed_stage_2") == 2
    assert capfd.readouterr() == (
        "",
        f"error: --strategy deepspeed_stage_2: deepspeed is not installed; run: {sys.executable} -m pip install deepspeed, "
        "or use --strategy ddp or auto\n",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_gpu_where_there_is_none(run, tmp_path, capfd):
    assert run(tmp_path / "out", accelerator="gpu") == 2
    assert "PyTorch sees no GPU here; use --accelerator cpu" in capfd.readouterr().err


def test_another_order_of_the_data_is_not_mixed_into_a_run(run, tmp_path, capfd):
    assert run(tmp_path / "out", max_steps=1) == 0
    assert run(tmp_path / "out", ctx_len=16) == 2
    assert "was trained with 32: the order of the data would break; use --ctx_len 32" in capfd.readouterr().err
    for more in {}, {"load_partial": 1}:  # a state does not grow
        assert run(tmp_path / "out", n_layer=3, **more) == 2
        assert "use --n_layer 2 or leave it out, or use another --load_model or --proj_dir\n" in capfd.readouterr().err
    assert run(tmp_path / "out", data_file=f"{run.data}.val") == 2
    err = capfd.readouterr().err
    assert f"--data_file {run.data}.val means magic_prime 59, but" in err and "; use the data of that run, or another --proj_dir" in err
    assert run(tmp_path / "out", magic_prime=593) == 2
    assert "--magic_prime is 593, but" in capfd.readouterr().err


def test_the_newest_checkpoint_unreadable_the_one_before_is_used(run, tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()
    sizes = dict(n_embd=64, head_size=32)
    weights(out, "rwkv-1.pth", **sizes)
    weights(out, "rwkv-2.pth", **sizes)
    (out / "rwkv-2.pth").write_bytes((out / "rwkv-2.pth").read_bytes()[:1000])
    assert run(out, max_steps=1, my_exit_tokens=60000) == 0
    out_text, err = capfd.readouterr()
    assert "rwkv-2.pth is truncated" in err and "looking for an older one" in err and "rwkv-1.pth; " in out_text
    assert " steps to go, 1 of them now (--max_steps)\n" in out_text


def test_flags_without_effect_are_one_line_each(run, tmp_path, capfd):
    assert run(tmp_path / "out", max_steps=1, epoch_count=999999, pre_ffn=1, epoch_begin=1) == 0
    err = capfd.readouterr().err
    assert "--epoch_count 999999 has no effect: the end is set by my_exit_tokens\n--pre_ffn 1 has no effect" in err
    assert "--val_batches" not in err


def test_flags_of_validation_without_held_out_data_have_no_effect(run, tmp_path, capfd):
    assert run(tmp_path / "out", data_file=copied(run.data, tmp_path), max_steps=1, val_every=1) == 0
    err = capfd.readouterr().err
    assert (
        f"--val_every 1 has no effect: nothing is held out; give --val_file, or put {tmp_path}/data.val beside the data" in err
        and err.count("has no effect") == 2
    )
