"""Flags are made from the dataclass; what is wrong is said in one line, before anything heavy is imported."""

import math
import os
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest

from rwkvlm import cli
from rwkvlm.cli import commands, main
from rwkvlm.cli.flags import parse_flags
from rwkvlm.config import TrainConfig, UserError
from rwkvlm.config.kinds import OWNERS
from rwkvlm.config.train import flag

ROOT = Path(__file__).resolve().parents[2]

# What the four official scripts (RWKV-LM, RWKV-v7/train_temp/demo-training-*.sh) pass, one string each.
OFFICIAL = {
    "prepare": """--wandb "" --proj_dir out/L12-D768-x070 --data_file data/minipile --data_type binidx --vocab_size 65536
        --my_testing x070 --ctx_len 512 --train_stage 1 --epoch_count 1 --epoch_begin 0 --epoch_save 1 --weight_decay 0
        --head_size 64 --num_nodes 1 --micro_bsz 1 --n_layer 12 --n_embd 768 --my_exit_tokens 1498226207 --magic_prime 2926181
        --lr_init 1e-5 --lr_final 1e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --accelerator cpu --devices 1
        --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1""",
    "run": """--load_model 0 --wandb Test --proj_dir out/L12-D768-x070 --my_testing x070 --ctx_len 512 --train_stage 3
        --epoch_count 999999 --epoch_begin 0 --data_file data/minipile --my_exit_tokens 1498226207 --magic_prime 2926181
        --num_nodes 1 --micro_bsz 16 --n_layer 12 --n_embd 768 --kernel @rwkv3 --lr_init 6e-4 --lr_final 6e-5 --warmup_steps 10
        --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --data_type binidx --vocab_size 65536 --weight_decay 0.001 --epoch_save 10
        --head_size 64 --head_chunk 0 --accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1
        --enable_progress_bar True""",
    "pile": """--load_model 0 --wandb RWKV-7-Pile --proj_dir out/L12-D768-x070 --my_testing x070 --ctx_len 4096 --train_stage 3
        --epoch_count 999999 --epoch_begin 0 --data_file /mnt/nvme0n1/pile/pile_20B_tokenizer_text_document
        --my_exit_tokens 332115325534 --magic_prime 81082817 --num_nodes 1 --micro_bsz 30 --n_layer 12 --n_embd 768
        --lr_init 8e-4 --lr_final 3e-5 --warmup_steps 10 --beta1 0.9 --beta2 0.99 --adam_eps 1e-18 --data_type binidx
        --vocab_size 50304 --weight_decay 0.1 --epoch_save 50 --head_size 64 --accelerator gpu --devices 8
        --precision bf16 --strategy deepspeed_stage_2 --grad_cp 1 --enable_progress_bar True""",
    "older": """--my_pile_stage 3 --my_pile_edecay 0 --pre_ffn 0 --head_qk 0 --head_size_a 64 --epoch_steps 1000
        --accumulate_grad_batches 4""",
}


def words(text: str) -> list[str]:
    return [word.replace('""', "") for word in text.split()]


@pytest.mark.parametrize("script", OFFICIAL)
def test_official_scripts_parse(script):
    config = parse_flags(TrainConfig, words(OFFICIAL[script]), "train.py")
    given = words(OFFICIAL[script])
    for name, text in zip(given[::2], given[1::2]):
        value = getattr(config, name.removeprefix("--"))
        if name not in ("--load_model", "--my_pile_stage", "--head_size_a"):
            assert value == type(value)(text) or (text == "True" and value is True), name
    assert config.load_model == ""
    if script == "older":
        assert config.train_stage == 3 and config.head_size == 64


def test_flags_without_effect_are_named():
    config = parse_flags(TrainConfig, words(OFFICIAL["run"]), "train.py")
    assert [re.match(r"--\w+", line)[0] for line in config.flags_without_effect()] == ["--epoch_count"]


@pytest.mark.parametrize(
    "idle, used, line",
    [
        (dict(ds_bucket_mb=2), dict(strategy="deepspeed_stage_2"), "--ds_bucket_mb 2 has no effect: --strategy auto is not DeepSpeed's"),
        (
            dict(lr_final=1e-4, lr_schedule="constant"),
            dict(lr_schedule="wsd"),
            "--lr_final 0.0001 has no effect: --lr_schedule constant stays at lr_init",
        ),
        (dict(wsd_decay=0.1), dict(lr_schedule="wsd"), "--wsd_decay 0.1 has no effect: --lr_schedule is cosine"),
        (dict(wsd_decay=0.1, lr_schedule="constant"), dict(lr_schedule="wsd"), "--wsd_decay 0.1 has no effect: --lr_schedule is constant"),
        (dict(spike_snapshot=5), dict(spike_guard=6.0), "--spike_snapshot 5 has no effect: --spike_guard is off"),
        (dict(load_partial=1), dict(load_model="x.pth"), "--load_partial 1 has no effect: there is no --load_model"),
        (dict(load_partial=1, train_stage=1), dict(train_stage=2), "--load_partial 1 has no effect: there is no --load_model"),
    ],
)
def test_flags_without_effect_beside_others_are_named(idle, used, line):
    assert TrainConfig(**idle).flags_without_effect() == [line] and TrainConfig(**idle | used).flags_without_effect() == []


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--micro_bs", "3"], "unknown flag --micro_bs; did you mean --micro_bsz?"),
        (["--lr", "1e-4"], "unknown flag --lr; did you mean --lr_init?"),
        (["--micro_bs=3"], "unknown flag --micro_bs; did you mean --micro_bsz?"),
        (["--qqqqq", "3"], "unknown flag --qqqqq; --help lists all flags"),
        (["--seed", "3"], "unknown flag --seed; did you mean --random_seed?"),
        (["--head_size_divisor", "8"], "unknown flag --head_size_divisor; --help lists all flags"),  # of RWKV-5 and 6, as the next one
        (["--layerwise_lr", "1"], "unknown flag --layerwise_lr; --help lists all flags"),
        (["--micro_bsz", "3x"], "argument --micro_bsz: '3x' is not a whole number"),
        (["--lr_init", "fast"], "argument --lr_init: 'fast' is not a number"),
        (["--enable_progress_bar", "maybe"], "'maybe' is not True or False"),
        (["--micro_bsz"], "argument --micro_bsz: expected one argument; --help lists all flags"),
        (
            ["--proj_dir", "-x", "--micro_bsz", "2"],
            "argument --proj_dir: expected one argument; write --proj_dir=-x, since -x looks like a flag; a path may also be ./-x",
        ),
        (["--random_seed", "-1", "--micro_bsz"], "argument --micro_bsz: expected one argument; --help lists all flags"),
        (["--random_seed", "-1", "--lr_init", "fast"], "argument --lr_init: 'fast' is not a number; --help lists all flags"),
        (["stray"], "unexpected argument 'stray'"),
        (["--micro_bsz", "0"], "--micro_bsz 0 must be at least 1"),
        (["--my_exit_tokens", "-5"], "--my_exit_tokens -5 must be at least 0"),
        (["--warmup_steps", "-2"], "--warmup_steps -2 must be at least -1"),
        (["--random_seed", "-2"], "--random_seed -2 must be at least -1"),
        (["--lr_init", "nan"], "--lr_init nan is not a finite number"),
        (["--load_partial", "2"], "--load_partial 2 is not known; use 0 or 1"),
        (["--my_testing", "x060"], "--my_testing 'x060' is not known; choose one of: x070"),
        (["--strategy", "fsdp"], "--strategy 'fsdp' is not known; choose one of: auto, ddp, deepspeed_stage_1"),
        (["--precision", "fp8"], "--precision 'fp8' is not known; choose one of: auto, fp32, tf32, fp16, bf16"),
        (["--data_type", "utf8"], "--data_type 'utf8' is not known; choose one of: binidx, numpy, utf-8, bytes"),
        (["--accelerator", "tpu"], "--accelerator 'tpu' is not known"),
        (["--devices", "two"], "--devices 'two' is not a number of devices"),
        (["--dim_att", "64", "--n_embd", "128"], "--dim_att 64 differs from --n_embd 128"),
        (["--my_pile_stage", "2", "--train_stage", "3"], "contradict each other"),
    ],
)
def test_wrong_flags_are_one_line_and_code_2(argv, said, capsys):
    assert main(["train", *argv]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err and out == ""


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_help_fits_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    assert min(columns, 140) - 20 < max(map(len, out.splitlines())) < min(columns, 141)
    assert "one of binidx, numpy, utf-8, bytes [binidx]" in " ".join(out.split())


def test_a_line_is_written_whole():
    """Not its text and then its end, between which another process of the run could speak."""
    here, there = os.pipe2(os.O_DIRECT)  # what is read is what one write has written
    done = subprocess.run([sys.executable, "-m", "rwkvlm", "report", "nowhere"], stderr=there, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    os.close(there)
    with open(here, "rb", buffering=0) as said:
        assert done.returncode == 2 and re.fullmatch(rb"error: .*\n", said.read(4096))


@pytest.mark.parametrize(
    "argv",
    [["make_data", "{}.txt", "1", "16"], ["report", "{}"], ["download", "--out", "{}"], ["generate", "--model", "{}"]],
    ids=lambda argv: argv[0],
)
def test_a_path_that_cannot_be_looked_at_is_one_line_and_code_2(argv, capsys):
    """As in a folder that may not be entered, which root always may. From 3.14 on pathlib takes it for a path where nothing is."""
    assert main([word.format("a" * 300) for word in argv]) == 2
    told = (
        r"error: .*a{300}.*" if sys.version_info >= (3, 14) else r"error: a{300}\S*: File name too long; check the name and its permissions"
    )
    assert re.fullmatch(told + r"\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "least, names",
    [
        (
            1,
            "ctx_len micro_bsz accumulate_grad_batches num_nodes epoch_samples keep_last val_batches max_skips spike_snapshot ds_bucket_mb",
        ),
        (
            0,
            "dim_att dim_ffn n_layer n_embd vocab_size head_size magic_prime epoch_begin epoch_save weight_decay grad_clip head_chunk "
            "save_steps save_minutes val_every max_steps",
        ),
        (0, "spike_guard lr_init lr_final adam_eps my_exit_tokens"),
        (-1, "warmup_steps random_seed"),
    ],
)
def test_the_least_that_a_number_may_be(least, names):
    for name in names.split():
        assert getattr(TrainConfig(**{name: least}), name) == least
        with pytest.raises(UserError, match=f"^--{name} {least - 1} must be at least {least}$"):
            TrainConfig(**{name: least - 1})


@pytest.mark.parametrize(
    "name, taken, refused",
    [
        ("beta1", (0.0, 0.5), (-0.1, 1.0)),
        ("beta2", (0.0, 0.5), (-0.1, 1.0)),
        ("wsd_decay", (0.1, 1.0), (0.0, 1.1)),
        ("dist_timeout", (0.1,), (0.0, -1.0)),
        ("devices", ("auto", "1", "8"), ("0", "-1", "1.5")),
        ("train_stage", (0, 1, 2, 3), (-1, 4)),
        ("grad_cp", (-1, 0, 1), (-2, 2)),
        ("cuda_graphs", (-1, 0, 1), (-2, 2)),
        ("lr_init", (1.0,), (math.inf, math.nan, 6e4)),
        ("lr_final", (0.0, 1.0), (1e5,)),
        *((switch, (0, 1), (-1, 2)) for switch in ("compile", "tensorboard", "doc_reset", "load_partial", "check_kernels")),
    ],
)
def test_the_ends_of_what_a_flag_takes(name, taken, refused):
    for value in taken:
        assert getattr(TrainConfig(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(UserError, match=f"^--{name} "):
            TrainConfig(**{name: value})


def test_a_switch_of_a_model_is_one():
    """Models say that with True and False, and so do the files that they are compared with."""
    for value in (0, 1):
        assert TrainConfig(my_testing="phantom", ttt_enabled=value).own_settings()["ttt_enabled"] is bool(value)


def test_defaults_are_those_of_the_official_trainer():
    """Of scripts that leave them out."""
    official = dict(
        ctx_len=1024,
        micro_bsz=12,
        epoch_save=5,
        lr_init=6e-4,
        lr_final=1e-5,
        warmup_steps=-1,
        beta1=0.9,
        beta2=0.99,
        adam_eps=1e-18,
        weight_decay=0,
        grad_clip=1.0,
        grad_cp=0,
        ds_bucket_mb=200,
    )
    assert TrainConfig().as_dict().items() >= official.items()


@pytest.mark.parametrize("command", sorted(commands().keys() - {"train"}))
def test_every_command_names_a_mistake_in_one_line(command, capsys):
    assert main([command, "--no_such_flag"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and out == ""


def test_a_misspelt_flag_of_any_command_gets_the_nearest(capsys):
    assert main(["generate", "--model", "m.pth", "--promt", "def "]) == 2
    assert capsys.readouterr().err == "error: unknown flag --promt; did you mean --prompt?\n"
    assert main(["generate", "--modle", "m.pth"]) == 2
    assert capsys.readouterr().err == "error: unknown flag --modle; did you mean --model?\n"
    assert main(["data", "merge", "a", "--ou=b"]) == 2
    assert capsys.readouterr().err == "error: unknown flag --ou; did you mean --out?\n"
    assert main(["data", "verify", "a", "--vocabsize", "3"]) == 2
    assert capsys.readouterr().err == "error: unknown flag --vocabsize; did you mean --vocab_size?\n"
    assert main(["data", "mrge", "a", "--out", "b"]) == 2
    assert "invalid choice: 'mrge' (choose from " in capsys.readouterr().err, "its flags are none of `data`, and right"


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for f in fields(TrainConfig):
        assert f"--{f.name} " in text


def test_help_says_what_flags_of_some_models_are_when_they_are_not_given():
    """The models' own defaults, where these are numbers or words."""
    texts = {"ttt_lr": "0.01 (memory: 0.5)", "ttt_features": "twice head_size, at most 128"}
    for f in fields(TrainConfig):
        said = f.metadata["unset"]
        if texts.pop(f.name, "") != said:
            own = {of_type.name: of_type.default for of_type in fields(OWNERS[f.metadata["of"]][0])}[f.name]
            assert (float(said) if isinstance(own, (bool, int, float)) else said) == own, f.name
    assert not texts


def test_types_come_from_the_dataclass():
    @dataclass(frozen=True)
    class Settings:
        whole: int = flag(1, "a whole number, 50% of it")
        ratio: float = flag(0.5, "a number")
        on: bool = flag(False, "a switch")
        name: str = flag("", "a name", ("", "a", "b"))

    assert parse_flags(Settings, ["--whole=-3", "--ratio", "1e-4", "--on", "1"], "x") == Settings(-3, 1e-4, True, "")
    assert parse_flags(Settings, ["--on", "--whole", "2"], "x") == Settings(2, on=True)  # a switch alone means True
    with pytest.raises(UserError):
        parse_flags(Settings, ["--who", "3"], "x")  # no abbreviations: a mistyped flag must not become another one


def test_commands_are_found_by_name(capsys):
    assert {"train", "generate"} <= set(commands())
    assert main([]) == 2 and main(["--help"]) == 0
    assert "\n  generate     text from a checkpoint, token by token.\n" in capsys.readouterr().out
    assert all(commands().values()), "each says what it is for"
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'trian'; did you mean train?\n"
    assert main(["xyz"]) == 2
    assert capsys.readouterr().err == f"error: unknown command 'xyz'; choose one of: {', '.join(commands())}\n"


PARSED = """
import sys
from rwkvlm import cli
from rwkvlm.cli import commands, main

for name in commands():
    assert main([name, "--wrong_flag"]) == 2
    try:
        main([name, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
    assert "torch" not in sys.modules, name
"""


def test_flags_are_answered_without_importing_torch():
    done = subprocess.run([sys.executable, "-c", PARSED], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_train_py_runs_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--train_stage", "9"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (
        done.returncode == 2
        and done.stderr == "error: --train_stage 9 is not known; use 0 (begin a run), 1 (write rwkv-init.pth), 2 or 3 (train)\n"
    )


def test_a_reader_that_has_enough_is_no_error():
    """`python -m rwkvlm ... | head -1`: no traceback."""
    code = (
        "import sys; from rwkvlm import cli; cli._command = lambda name: lambda argv: print('x' * 10**7); sys.exit(cli.main(['generate']))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141


@pytest.mark.parametrize(
    "error, line",
    [
        (MemoryError(), "error: out of memory; free some, or give the command less at a time (its --help says how)"),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried 2 GiB.\nmore"),
            "error: out of memory: CUDA out of memory. Tried 2 GiB.; free some, or ",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            "error: out of memory: [enforce fail] DefaultCPUAllocator: can't allocate memory; free some",
        ),
        (
            RuntimeError("can't start new thread"),
            "error: no further thread or process may be started (can't start new thread); raise the limit (ulimit -u, or the container's",
        ),
        (
            RuntimeError("Resource temporarily unavailable"),  # of gloo
            "error: no further thread or process may be started (Resource temporarily unavailable); raise",
        ),
        (
            BlockingIOError(11, "Resource temporarily unavailable"),
            "error: no further thread or process may be started ([Errno 11] Resource temporarily unavailable); raise",
        ),
        (
            OSError(28, "No space left on device"),
            "error: cannot write standard output, or a file: No space left on device; "
            "free some space, or choose another place, then start again\n",
        ),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            f"error: {sys.executable} has no torch; use .venv/bin/python, which ",
        ),
        (
            OSError(122, "Disk quota exceeded", "x.json"),
            "error: cannot write x.json: Disk quota exceeded; free some space, or choose another place, then start again\n",
        ),
    ],
)
def test_what_the_machine_lacks_is_one_line(monkeypatch, capsys, error, line):
    def command(argv):
        raise error

    monkeypatch.setattr(cli, "_command", lambda name: command)
    assert main(["generate"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'pkg_resources'", name="pkg_resources"),
        TypeError("unexpected keyword"),
        AttributeError("no such"),
    ],
)
@pytest.mark.parametrize(
    "needed, at_hand, said",
    [
        ("numpy>=1.0", True, ""),
        ("nothing-of-this-name>=2", True, ""),
        ("numpy<1.0", True, "has other versions than are needed: numpy<1.0 (installed: "),
        ("numpy<1.0", False, ""),
    ],
)
def test_other_versions_than_are_needed_are_one_line(monkeypatch, capsys, tmp_path, error, needed, at_hand, said):
    """The official trainer wants Lightning 1.9.5, which fails here while it is imported, or in a call. at_hand: of the code that fails."""
    place = {"error": error} | ({"np": np} if at_hand else {})
    exec("def command(argv):\n    raise error.with_traceback(None)", place)
    monkeypatch.setattr(cli, "_command", lambda name: place["command"])
    (tmp_path / "requirements.txt").write_text(needed)
    monkeypatch.setattr("rwkvlm.cli.doctor.REQUIREMENTS", tmp_path / "requirements.txt")
    if said or (needed == "numpy<1.0" and isinstance(error, ImportError)):
        assert main(["generate"]) == 1
        line = capsys.readouterr().err
        assert said in line and str(error) in line and "use .venv/bin/python" in line and line.count("\n") == 1
    else:
        with pytest.raises(type(error)):
            main(["generate"])


def test_what_every_command_may_lack_is_what_is_required():
    required = {re.match("[a-z-]+", line)[0].replace("-", "_") for line in (ROOT / "requirements.txt").read_text().splitlines()}
    assert cli.REQUIRED <= required


@pytest.mark.parametrize("size", [1, 10**5])
def test_a_full_disk_under_the_output_is_one_line(size):
    """`python -m rwkvlm ... > log`, also where nothing is written before the end."""
    code = (
        "import sys; from rwkvlm import cli; "
        f"cli._command = lambda name: lambda argv: print('x' * {size}); sys.exit(cli.main(['generate']))"
    )
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, env=buffered)
    assert (
        done.returncode == 1
        and done.stderr.startswith("error: cannot write standard output, or a file: No space left on device; ")
        and done.stderr.count("\n") == 1
    )


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "_command", lambda name: lambda argv: {}["missing"])
    with pytest.raises(KeyError):
        main(["generate"])


def test_a_slow_reader_is_no_lack_of_processes(monkeypatch):
    """Of output that does not wait, as of a terminal that another program has set so: a write that is cut short tells how much it wrote."""

    def command(argv):
        raise BlockingIOError(11, "write could not complete without blocking", 4096)

    monkeypatch.setattr(cli, "_command", lambda name: command)
    with pytest.raises(BlockingIOError):
        main(["generate"])
