"""A whole run on the CPU through the command line: what it writes, and that stopping and going on changes nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkvlm.checkpoint.pth import load_weights
from rwkvlm.data.sampler import order_hash
from rwkvlm.train.logs.metrics import Metrics
from rwkvlm.train.module import TrainModule
from rwkvlm.train.run import PlannedModule


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_weights(a: Path, b: Path) -> bool:
    left, right = load_weights(a), load_weights(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_a_run_writes_what_the_ecosystem_knows(whole, losses):
    assert files(whole) == [
        ".holder",
        "metrics.jsonl",
        "report.html",
        "rwkv-0.pth",
        "rwkv-2.pth",
        "rwkv-final.pth",
        "rwkv-init.pth",
        "state",
        "train_log.txt",
    ]
    assert len(losses(whole)) == 30
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_weights(whole / "rwkv-final.pth").values())
    assert same_weights(whole / "rwkv-2.pth", whole / "rwkv-final.pth")


def test_the_loss_falls(whole, losses, records):
    curve = losses(whole)
    assert curve[0] == pytest.approx(5.6, abs=0.2) and sum(curve[-5:]) / 5 < 4.6
    held_out = records(whole, "val_loss")
    assert list(held_out) == [0, 10, 20, 30] and held_out[30]["val_loss"] < held_out[0]["val_loss"] - 0.8


def test_train_log_is_in_the_official_format(whole, losses):
    lines = (whole / "train_log.txt").read_text().splitlines()
    assert re.fullmatch(r"NEW RUN \d{4}(-\d\d){5}", lines[0])
    settings = eval(lines[1])
    assert settings["n_layer"] == 2 and (settings["magic_prime"], settings["order_hash"]) == (617, order_hash(617))
    curve = losses(whole)
    for n, line in enumerate(lines[2:]):
        epoch, loss, perplexity, lr, date, time, in_this_run = line.split()
        assert int(epoch) == int(in_this_run) == n
        assert float(loss) == pytest.approx(sum(curve[10 * n : 10 * n + 10]) / 10, abs=1e-6)
        assert float(perplexity) == pytest.approx(2.718281828 ** float(loss), rel=1e-4)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date) and re.fullmatch(r"\d\d:\d\d:\d\d\.\d+", time)
    assert n == 2 and re.fullmatch(r"0\.000[23]\d{4}", lr)


def test_metrics_say_everything_about_a_step(whole, records):
    for step, record in records(whole).items():
        assert set(record) == {
            "step",
            "tokens",
            "loss",
            "lr",
            "grad_norm",
            "grad_norms",
            "tokens_per_s",
            "tflops",
            "mfu",
            "seconds",
            "memory_mb",
        }
        assert set(record["grad_norms"]) == {"emb", "ln", "att", "ffn", "head"}
        assert sum(norm**2 for norm in record["grad_norms"].values()) == pytest.approx(record["grad_norm"] ** 2, rel=1e-3)
        assert record["tokens"] == step * 128 and record["grad_norm"] > 0 and record["tokens_per_s"] > 0 and record["memory_mb"] > 10


def test_rates_follow_the_schedule(whole, records):
    lrs = [record["lr"] for _, record in sorted(records(whole).items())]
    assert lrs[0] == pytest.approx(2e-5) and max(lrs) == lrs[5] == 2e-3 and lrs[5:] == sorted(lrs[5:], reverse=True) and lrs[-1] > 2e-4


@pytest.mark.parametrize("closed", ["0", "1", "2", "0, 1, 2"])
def test_a_run_whose_standard_streams_are_closed(tiny, losses, tmp_path, closed):
    """As with `>&-`: nothing is printed, least of all into the run's files."""
    code = (
        f"import os, sys; [os.close(n) for n in ({closed},)]; "
        "os.execv(sys.executable, [sys.executable, '-m', 'rwkvlm', 'train', *sys.argv[1:]])"
    )
    argv = [sys.executable, "-c", code, *tiny.argv(tmp_path / "out", max_steps=3, enable_progress_bar=True)]
    done = subprocess.run(argv, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(losses(tmp_path / "out")) == 3
    for file in ("train_log.txt", "metrics.jsonl"):
        assert "step 3" not in (tmp_path / "out" / file).read_text() and "output " not in (tmp_path / "out" / file).read_text()
    assert ("output    " in done.stdout) == ("1" not in closed)


def test_a_finished_run_says_so(whole, run, capsys):
    before = {name: (whole / name).stat().st_mtime_ns for name in files(whole)}
    assert run(whole) == 0
    told = capsys.readouterr().err
    assert "this run is finished" in told and "(a larger --my_exit_tokens trains longer)" in told
    assert before == {name: (whole / name).stat().st_mtime_ns for name in files(whole)}


@pytest.mark.parametrize("damaged", [False, True], ids=["missing", "damaged"])
def test_only_the_final_weights_lost_are_written_from_the_state(whole, run, tmp_path, capsys, damaged):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    final = copy / "rwkv-final.pth"
    if damaged:
        final.write_bytes(final.read_bytes()[:1000])
    else:
        final.unlink()
    assert run(copy) == 0
    assert same_weights(final, whole / "rwkv-final.pth")
    err = capsys.readouterr().err
    assert (f"{final} was damaged, is now rwkv-final.pth.damaged, and is written again\n" in err) == damaged
    assert [path.stat().st_size for path in copy.glob("*.damaged")] == [1000] * damaged
    assert err.endswith(f"finished at step 30: the weights are {copy}/rwkv-final.pth, the curves {copy}/report.html\n")


def test_damaged_final_weights_stay_where_they_are_in_a_dry_run(whole, run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(whole, copy)
    (copy / "rwkv-final.pth").write_bytes(b"no weights")
    before = files(copy)
    assert run(copy, dry_run=True) == 0
    assert "rwkv-final.pth is damaged; without --dry_run it is written again\n" in capsys.readouterr().err
    assert files(copy) == before and (copy / "rwkv-final.pth").read_bytes() == b"no weights"


@pytest.mark.parametrize("stops", [[10], [1, 17]], ids=str)
def test_max_steps_and_going_on_change_nothing(run, whole, losses, tmp_path, stops):
    """Exactly: at the end of a mini-epoch, in the middle of one, within the warm-up."""
    for stop in stops:
        assert run(tmp_path / "out", max_steps=stop) == 0
        assert not (tmp_path / "out" / "rwkv-final.pth").exists()
    assert run(tmp_path / "out") == 0
    assert losses(tmp_path / "out") == losses(whole)
    assert same_weights(tmp_path / "out" / "rwkv-final.pth", whole / "rwkv-final.pth")
    fields = [
        line.split()[:4]
        for f in (whole, tmp_path / "out")
        for line in (f / "train_log.txt").read_text().splitlines()
        if line[0].isdecimal()
    ]
    assert fields[:3] == fields[3:]  # mean losses of mini-epochs too


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_signals_save_and_stop(run, whole, losses, tmp_path, monkeypatch, capsys, name, code):
    write = Metrics.step

    def step(self, record):
        write(self, record)
        if record["step"] == 7:
            os.kill(os.getpid(), getattr(signal, name))

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "step", step)
        assert run(tmp_path / "out") == code
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert (tmp_path / "out" / "state" / "latest").read_text() == "step7"
    assert f"stopped by {name} at step 7; the training state is saved, the same command goes on from it" in capsys.readouterr().err
    assert run(tmp_path / "out") == 0
    assert losses(tmp_path / "out") == losses(whole)


def test_a_signal_stops_validation_between_batches(run, whole, losses, records, tmp_path, monkeypatch, capsys):
    """It is made when the run goes on, before the next step; that at the end of a run goes to its own. Two batches each."""
    step, passes = TrainModule.validation_step, []

    def stopping(self, batch, batch_idx):
        passes.append(1)
        if len(passes) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TrainModule, "validation_step", stopping)
    for at, code, made, saved in ((1, 143, 1, None), (3, 143, 3, "step10"), (1, 143, 1, "step10"), (5, 0, 6, "step30")):
        passes.clear()
        assert run(tmp_path / "out") == code and len(passes) == made
        latest = tmp_path / "out" / "state" / "latest"
        assert (latest.read_text() if latest.exists() else None) == saved
    assert not json.loads((latest.parent / saved / "manifest.json").read_text())["content"]["meta"]["position"]["unvalidated"]
    said = capsys.readouterr().err
    assert (
        said.count("by SIGTERM at step 0; no step has been made, the same command goes on from it") == 1
        and said.count("at step 10; no step has been made") == 1
    )
    assert losses(tmp_path / "out") == losses(whole) and same_weights(tmp_path / "out" / "rwkv-final.pth", whole / "rwkv-final.pth")
    assert records(tmp_path / "out", "val_loss") == records(whole, "val_loss")
    assert (tmp_path / "out" / "metrics.jsonl").read_text().count('"val_loss"') == 4, "of one that was stopped nothing is told"


@pytest.mark.parametrize("at, code, said", [(10, 143, "stopped by SIGTERM at step 10"), (15, 0, "finished at step 15")])
def test_a_signal_at_an_end_of_a_mini_epoch_and_of_the_run(run, data, tmp_path, monkeypatch, capsys, at, code, said):
    """Nothing is held out: no validation asks for the signal again."""
    write = Metrics.step

    def step(self, record):
        write(self, record)
        if record["step"] == at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Metrics, "step", step)
    for kind in ("bin", "idx"):
        (tmp_path / f"alone.{kind}").symlink_to(f"{data}.{kind}")
    assert run(tmp_path / "out", data_file=tmp_path / "alone", my_exit_tokens=15 * 4 * 32) == code
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("stage, goes_on", [(0, "the same command with --train_stage 3"), (3, "the same command")])
@pytest.mark.parametrize("kind", ["GPU", "CPU", "numpy"])
def test_memory_that_runs_out_is_one_line(run, tmp_path, monkeypatch, capsys, kind, stage, goes_on):
    def loss(self, batch, grad_cp=False):
        if kind == "GPU":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of it")
        return torch.empty(10**15) if kind == "CPU" else np.empty(10**15)

    monkeypatch.setattr(TrainModule, "loss", loss)
    assert run(tmp_path / "out", train_stage=stage) == 1
    err = capsys.readouterr().err
    line = r"error: out of memory: [^\n]*allocate[^\n]*; --dry_run tells what fits \(less --micro_bsz, or --grad_cp 1\), and {} goes on\n"
    assert re.fullmatch(line.format(goes_on), err), err


def test_an_error_of_another_kind_keeps_its_traceback(run, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainModule, "loss", lambda self, batch, grad_cp=False: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "out")


def test_mini_epochs_of_another_size_are_said(run, tmp_path, capsys):
    assert run(tmp_path / "out", max_steps=22, epoch_samples=40) == 0
    assert run(tmp_path / "out", max_steps=1, epoch_samples=20) == 0
    said = "--epoch_samples 20 from here on, and 40 before: mini-epochs and rwkv-{n}.pth are counted anew, step 22 is in mini-epoch 4\n"
    assert said in capsys.readouterr().err
    assert run(tmp_path / "out", max_steps=1, epoch_samples=20) == 0 and "--epoch_samples" not in capsys.readouterr().err


def test_the_line_of_a_stop_is_true_without_a_train_stage_too(run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "step", lambda self, record: os.kill(os.getpid(), signal.SIGTERM))
        assert run(tmp_path / "out", train_stage=0) == 143
    assert "the same command with --train_stage 3 goes on from it" in capsys.readouterr().err
    assert run(tmp_path / "out", train_stage=0) == 2 and "continue it with --train_stage 3" in capsys.readouterr().err


def test_ctrl_c_before_the_first_step_just_ends(run, tmp_path, monkeypatch):
    monkeypatch.setattr(PlannedModule, "train_dataloader", lambda self: signal.raise_signal(signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    assert run(tmp_path / "out") == 130
    assert signal.getsignal(signal.SIGINT) is before  # Lightning has it ignored
    assert files(tmp_path / "out") == [".holder", "rwkv-init.pth", "state"]


def test_sigusr1_saves_and_goes_on(run, whole, losses, tmp_path, monkeypatch):
    write = Metrics.step

    def step(self, record):
        write(self, record)
        if record["step"] == 7:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(Metrics, "step", step)
    assert run(tmp_path / "out", keep_last=9) == 0
    assert {"step7", "step10", "step20", "step30"} <= set(files(tmp_path / "out" / "state"))
    assert losses(tmp_path / "out") == losses(whole)


EARLY = """
import signal, sys
from rwkvlm.cli import main
from rwkvlm.train import run
make_plan, train_dataloader = run.make_plan, run.PlannedModule.train_dataloader
run.make_plan = lambda config: signal.raise_signal(signal.SIGUSR1) or make_plan(config)
run.PlannedModule.train_dataloader = lambda module: signal.raise_signal(signal.SIGUSR1) or train_dataloader(module)
code = main(sys.argv[1:])
assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
sys.exit(code)
"""


def test_sigusr1_before_the_first_step_ends_nothing(run, losses, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EARLY, "train", *run.argv(tmp_path / "out", max_steps=2)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert len(losses(tmp_path / "out")) == 2 and files(tmp_path / "out" / "state") == ["latest", "step2", "weights.json"]


def test_from_weights_alone_the_warm_up_comes_again(run, whole, records, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(whole / "rwkv-0.pth", out)
    for stop in (4, None):  # in the middle of it
        assert run(out, warmup_steps=-1, max_steps=stop) == 0
    steps = records(out)
    assert min(steps) == 11 and steps[11]["tokens"] == 11 * 128 and max(steps) == 30
    assert steps[11]["lr"] == pytest.approx(0.01 * 2e-3) and steps[11]["lr"] < steps[15]["lr"] < steps[20]["lr"] > steps[21]["lr"]
    assert not (out / "rwkv-init.pth").exists()


def test_new_weights_from_elsewhere_outrank_the_state(run, whole, losses, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(out, max_steps=13) == 0
    (out / "rwkv-5.pth").write_bytes((whole / "rwkv-final.pth").read_bytes())
    assert run(out, max_steps=1, my_exit_tokens=60000) == 0
    said = capsys.readouterr().err
    assert "rwkv-5.pth is newer and was not written by this run" in said and "state.aside-1" in said
    assert (out / "state.aside-1" / "step13").is_dir()


def test_stage_1_writes_the_weights_with_which_stage_3_begins(run, whole, losses, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(out, train_stage=1, epoch_samples=99) == 0
    assert files(out) == [".holder", "rwkv-init.pth", "state"] and "166528 M parameters" in capsys.readouterr().out
    assert same_weights(out / "rwkv-init.pth", whole / "rwkv-init.pth")
    sizes = dict.fromkeys(("n_layer", "n_embd", "head_size", "vocab_size"))
    assert run(out, max_steps=3, **sizes) == 0  # sizes come from the checkpoint
    assert losses(out) == losses(whole)[:3]


def test_sizes_and_low_ranks_come_from_the_checkpoint(run, tmp_path):
    sizes = dict.fromkeys(("n_layer", "n_embd", "head_size", "vocab_size"))
    assert run(tmp_path / "a", train_stage=1, rank_w=64, dim_ffn=96) == 0
    assert run(tmp_path / "b", train_stage=0, load_model=tmp_path / "a" / "rwkv-init.pth", max_steps=1, **sizes) == 0
    assert run(tmp_path / "b", max_steps=1, **sizes) == 0  # and from the state
    assert run(tmp_path / "c", train_stage=0, load_model=tmp_path / "a" / "rwkv-init.pth", max_steps=1, rank_w=32) == 2


def test_fine_tuning_with_a_longer_context(run, whole, losses, records, tmp_path):
    """Weights of a run with 32 tokens go on with 128; the loss begins where they left off, far below that of fresh weights."""
    tune = dict(train_stage=0, load_model=whole / "rwkv-final.pth", ctx_len=128, micro_bsz=2, my_exit_tokens=8 * 256, lr_init=1e-3)
    assert run(tmp_path / "out", **tune) == 0
    assert len(losses(tmp_path / "out")) == 8 and losses(tmp_path / "out")[0] < losses(whole)[0] - 0.8
    assert records(tmp_path / "out")[1]["tokens"] == 256


def test_load_model_0_means_none(run, whole, losses, tmp_path):
    assert run(tmp_path / "out", load_model=0, max_steps=2) == 0
    assert losses(tmp_path / "out") == losses(whole)[:2]


def test_one_pass_over_the_data_is_the_default_length(run, records, tmp_path):
    """20000 tokens: magic_prime 617, 617 chunks, 10 steps of 64 samples; epoch_samples 40 does not divide by 64."""
    assert run(tmp_path / "out", my_exit_tokens=None, micro_bsz=64, epoch_save=0, val_every=7) == 0
    assert max(records(tmp_path / "out")) == 10
    assert list(records(tmp_path / "out", "val_loss")) == [0, 7, 10]


def test_mini_epochs_that_do_not_divide_by_the_batch_keep_their_numbers(run, tmp_path):
    """48 samples a mini-epoch, 20 a step: they end at the first step at or past 48, 96, 144 samples."""
    assert run(tmp_path / "out", epoch_samples=48, micro_bsz=20, my_exit_tokens=9 * 20 * 32, epoch_save=1, keep_last=9) == 0
    found = files(tmp_path / "out")
    assert [n for n in found if re.fullmatch(r"rwkv-\d+\.pth", n)] == ["rwkv-0.pth", "rwkv-1.pth", "rwkv-2.pth"]
    log = [line.split()[0] for line in (tmp_path / "out" / "train_log.txt").read_text().splitlines() if line[0].isdecimal()]
    assert log == ["0", "1", "2", "3"]  # the last ends with the run
    assert sorted(n for n in os.listdir(tmp_path / "out" / "state") if n.startswith("step")) == ["step3", "step5", "step8", "step9"]


@pytest.mark.parametrize("flags", [{"micro_bsz": 2, "accumulate_grad_batches": 2}, {"micro_bsz": 1, "accumulate_grad_batches": 4}], ids=str)
def test_accumulation_gives_the_same_curve(run, whole, losses, records, tmp_path, flags):
    assert run(tmp_path / "out", **flags) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(whole), rel=1e-5)
    assert [r["lr"] for r in records(tmp_path / "out").values()] == [r["lr"] for r in records(whole).values()]
    assert files(tmp_path / "out") == files(whole)


@pytest.mark.parametrize("flags", [{"grad_cp": 1}, {"head_chunk": 24}], ids=str)
def test_memory_savers_change_no_number_beyond_rounding(run, whole, losses, tmp_path, flags):
    assert run(tmp_path / "out", **flags) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(whole), rel=1e-5)


def test_bf16_trains_with_fp32_masters_and_resumes_exactly(run, losses, tmp_path):
    assert run(tmp_path / "a", precision="bf16") == 0
    curve = losses(tmp_path / "a")
    assert sum(curve[-5:]) / 5 < 4.6
    assert run(tmp_path / "b", precision="bf16", max_steps=13) == 0 and run(tmp_path / "b", precision="bf16") == 0
    assert losses(tmp_path / "b") == curve


def test_progress_is_plain_lines_where_there_is_no_terminal(run, tmp_path, capsys):
    assert run(tmp_path / "out", enable_progress_bar=True) == 0
    out = capsys.readouterr().out
    assert "\r" not in out
    assert re.search(r"step 30/30  mini-epoch 2 100%  loss \d\.\d{4}  lr \d\.\d\de-0\d  \d+\.\d\d kt/s  left 0:00\n", out)
    assert re.search(r"validation loss \d\.\d{4} at step 20\n", out)
    assert "x070 L2 D64, 2 heads of 32, vocabulary 256, 0.166528 M parameters" in out
