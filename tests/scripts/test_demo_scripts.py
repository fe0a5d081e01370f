"""The demo and Pile scripts: which commands they give, with which flags. A train.py that only writes down its flags stands in."""

import fcntl
import os
import re
import subprocess

import pytest

from rwkvlm.cli.flags import parse_flags
from rwkvlm.config import TrainConfig
from rwkvlm.config.model import MODEL_TYPES


@pytest.fixture
def demo(world):
    world.add_scripts()
    return world


def flags(call):
    return dict(zip(call[1::2], call[2::2]))


def test_whole_way_on_a_cpu_from_another_folder(demo, shell):
    done = demo.run("demo-training-run.sh", shell)
    assert done.returncode == 0 and done.stderr == ""
    corpus, data, init, train, sample = demo.calls()
    assert corpus == ["demo_corpus", "--out", "data/demo.jsonl"]
    assert data[:2] == ["make_data", "data/demo.jsonl"] and "--val_split" in data
    assert flags(init)["--train_stage"] == "1" and flags(train)["--train_stage"] == "3"
    assert flags(train)["--accelerator"] == "cpu" and flags(train)["--data_file"] == "data/demo"
    assert sample[:3] == ["generate", "--model", flags(train)["--proj_dir"] + "/rwkv-final.pth"]
    assert (demo.root / "data/.lock").exists(), "the very first start too keeps another one from making the data"
    for name in ("--n_layer", "--n_embd", "--ctx_len", "--vocab_size", "--proj_dir", "--my_testing", "--head_size", "--data_file"):
        assert flags(init)[name] == flags(train)[name]


def test_whole_way_through_a_link_and_with_cdpath(demo, shell):
    """CDPATH sends `cd` to another folder of the same name."""
    (demo.bin / demo.root.name).mkdir()
    links = demo.root.parent / "links"
    links.mkdir()
    for script in ("demo-training-run.sh", "demo-training-run-v7-pile.sh"):
        (links / script).symlink_to(demo.root / script)
    env = {"PATH": str(demo.bin), "HOME": str(demo.root), "CDPATH": str(demo.bin)}
    for script in (f"{demo.root.name}/demo-training-run.sh", "links/demo-training-run.sh"):
        done = subprocess.run([shell, script], cwd=demo.root.parent, env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert "train" in [call[0] for call in demo.calls()]
    done = subprocess.run(
        [shell, "links/demo-training-run-v7-pile.sh"], cwd=demo.root.parent, env=env, capture_output=True, text=True, timeout=60
    )
    assert "cannot open" not in done.stderr and "not found" not in done.stderr


def test_what_is_there_is_kept(demo):
    demo.run("demo-training-run.sh")
    (demo.root / "data").mkdir(exist_ok=True)
    for name in ("demo.bin", "demo.idx"):
        (demo.root / "data" / name).touch()
    folder = demo.root / "out/L6-D256-x070"
    (folder / "rwkv-7.pth").touch()
    before = sorted(os.listdir(folder))
    demo.calls()
    assert demo.run("demo-training-run.sh").returncode == 0
    assert [call[0] for call in demo.calls()] == ["train", "generate"]
    assert sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("held", ["rwkv-3.pth", "rwkv-final.pth", "state/latest"])
def test_a_folder_with_a_run_or_weights_is_gone_on_with_though_rwkv_init_is_not_there(demo, shell, held):
    """train.py would refuse to write rwkv-init.pth beside them."""
    file = demo.root / "out/L6-D256-x070" / held
    file.parent.mkdir(parents=True)
    file.touch()
    assert demo.run("demo-training-run.sh", shell).returncode == 0
    assert [flags(call)["--train_stage"] for call in demo.calls() if call[0] == "train"] == ["3"]


@pytest.mark.parametrize("script", ["demo-training-run.sh", "demo-training-run-v7-pile.sh"])
@pytest.mark.parametrize("gpu", [False, True])
def test_train_py_takes_every_flag(demo, script, gpu):
    if gpu:
        demo.add_gpu()
    pile_files(demo)
    assert demo.run(script, ACCELERATOR="gpu" if gpu else "cpu").returncode == 0
    configs = [parse_flags(TrainConfig, call[1:], "train.py") for call in demo.calls() if call[0] == "train"]
    assert [config.train_stage for config in configs] == [1, 3]
    for config in configs:
        assert config.flags_without_effect() == []


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_nothing_is_said_of_flags_that_the_user_has_not_given(demo, model_type):
    """Of the size of its heads, by models that have none."""
    assert demo.run("demo-training-run.sh", MODEL_TYPE=model_type).returncode == 0
    assert [parse_flags(TrainConfig, call[1:], "train.py").flags_without_effect() for call in demo.calls() if call[0] == "train"] == [
        [],
        [],
    ]


KNOBS = {
    "N_LAYER": ("4", "--n_layer"),
    "N_EMBD": ("128", "--n_embd"),
    "HEAD_SIZE": ("32", "--head_size"),
    "CTX_LEN": ("128", "--ctx_len"),
    "MODEL_TYPE": ("x070", "--my_testing"),
    "PROJ_DIR": ("out/a b", "--proj_dir"),
    "M_BSZ": ("3", "--micro_bsz"),
    "LR_INIT": ("1e-5", "--lr_init"),
    "LR_FINAL": ("1e-6", "--lr_final"),
    "W_DECAY": ("0.2", "--weight_decay"),
    "BETA_2": ("0.95", "--beta2"),
    "ADAM_EPS": ("1e-8", "--adam_eps"),
    "GRAD_CP": ("1", "--grad_cp"),
    "COMPILE": ("1", "--compile"),
    "CUDA_GRAPHS": ("1", "--cuda_graphs"),
    "HEAD_CHUNK": ("4096", "--head_chunk"),
    "KERNEL": ("torch", "--kernel"),
    "PRECISION": ("fp32", "--precision"),
    "STRATEGY": ("deepspeed_stage_3", "--strategy"),
    "EPOCH_SAMPLES": ("64", "--epoch_samples"),
    "EPOCH_SAVE": ("3", "--epoch_save"),
    "SAVE_MINUTES": ("2.5", "--save_minutes"),
    "EXIT_TOKENS": ("12345", "--my_exit_tokens"),
    "GPU_PER_NODE": ("2", "--devices"),
    "WANDB": ("my project", "--wandb"),
    "DATA": ("somewhere/my data", "--data_file"),
}


def test_knobs_reach_train_py(demo):
    assert demo.run("demo-training-run.sh", **{knob: value for knob, (value, _) in KNOBS.items()}).returncode == 0
    changed = flags([call for call in demo.calls() if call[0] == "train"][-1])
    demo.run("demo-training-run.sh")
    default = flags([call for call in demo.calls() if call[0] == "train"][-1])
    for knob, (value, flag) in KNOBS.items():
        assert changed[flag] == value, knob
        assert default[flag] != value or knob == "MODEL_TYPE", knob


def test_further_flags_reach_initial_model_and_training(demo, shell):
    given = {"--ttt_kind": "memory", "--freeze": "*", "--n_layer": "3"}  # the last one of two counts
    assert demo.run("demo-training-run.sh", shell, TRAIN_FLAGS=" ".join(word for pair in given.items() for word in pair)).returncode == 0
    for call in (call for call in demo.calls() if call[0] == "train"):
        assert {name: flags(call)[name] for name in given} == given and parse_flags(TrainConfig, call[1:], "train.py").n_layer == 3


def test_weights_that_the_initial_model_was_made_of_are_not_named_again(demo, shell):
    """train.py would say that they have no effect, at the one start at which they have; later that is news."""
    for _ in range(2):
        assert demo.run("demo-training-run.sh", shell, TRAIN_FLAGS="--load_model x.pth").returncode == 0
    init, train, again = (flags(call)["--load_model"] for call in demo.calls() if call[0] == "train")
    assert (init, train, again) == ("x.pth", "0", "x.pth")


def test_no_sample_where_no_model_was_made(demo, shell):
    """--dry_run, --max_steps."""
    train = demo.root / "train.py"
    train.write_text(train.read_text().replace('"rwkv-final.pth"', '"rwkv-0.pth"'))
    done = demo.run("demo-training-run.sh", shell, TRAIN_FLAGS="--max_steps 5")
    assert (done.returncode, done.stderr) == (0, "") and flags(demo.calls()[-1])["--max_steps"] == "5"


@pytest.mark.parametrize(
    "lines, gpu, found",
    [
        (["STRATEGY auto deepspeed_stage_3"], True, {"--strategy": "deepspeed_stage_3"}),
        (["GPU_PER_NODE 8 8"], True, {"--strategy": "deepspeed_stage_2", "--devices": "8"}),
        (["PRECISION auto fp16"], True, {"--strategy": "deepspeed_stage_2", "--precision": "fp16"}),
        (["N_NODE 2 2", "EPOCH_SAMPLES 800 800"], False, {"--precision": "bf16", "--epoch_samples": "800"}),
    ],
    ids=str,
)
def test_knobs_changed_in_the_script_count(demo, lines, gpu, found):
    """Also where a knob's default depends on another one."""
    if gpu:
        demo.add_gpu()
    script = demo.root / "demo-training-run.sh"
    for line in lines:
        text, n = re.subn(rf"^knob {line.split()[0]} .*$", f"knob {line}", script.read_text(), flags=re.M)
        assert n == 1
        script.write_text(text)
    demo.run("demo-training-run.sh", NODE_RANK="0")
    (train,) = [call for call in demo.calls() if flags(call).get("--train_stage") == "3"]
    assert {name: flags(train)[name] for name in found} == found


def test_seed_and_prompt(demo):
    demo.run("demo-training-run.sh", RANDOM_SEED="7", PROMPT="class A")
    calls = demo.calls()
    assert flags(calls[-3])["--random_seed"] == "7" and flags(calls[-1])["--prompt"] == "class A"
    demo.run("demo-training-run.sh", PROMPT="")
    assert demo.calls()[-1][0] == "train"


def test_official_minipile_recipe_on_a_gpu(demo):
    demo.add_gpu()
    demo.run("demo-training-run.sh")
    download, init, train, sample = demo.calls()
    assert download == ["download", "--out", "data/minipile"]
    official = {  # RWKV-LM, RWKV-v7/train_temp/demo-training-run.sh, but for the strategy: on one GPU ZeRO has nothing to share out
        "--n_layer": "12", "--n_embd": "768", "--ctx_len": "512", "--vocab_size": "65536", "--my_testing": "x070",
        "--proj_dir": "out/L12-D768-x070", "--micro_bsz": "16", "--lr_init": "6e-4", "--lr_final": "6e-5", "--warmup_steps": "10",
        "--beta1": "0.9", "--beta2": "0.99", "--adam_eps": "1e-18", "--weight_decay": "0.001", "--epoch_save": "10",
        "--head_size": "64", "--head_chunk": "0", "--kernel": "@rwkv3", "--grad_cp": "-1", "--accelerator": "gpu", "--devices": "1",
        "--num_nodes": "1", "--precision": "bf16", "--strategy": "auto", "--train_stage": "3", "--my_exit_tokens": "1498226207",
        "--data_file": "data/minipile", "--data_type": "binidx", "--load_model": "0", "--epoch_samples": "40320",
    }  # fmt: skip
    assert {name: flags(train).get(name) for name in official} == official


@pytest.mark.parametrize(
    "knobs, strategy",
    [
        (dict(GPU_PER_NODE="2"), "deepspeed_stage_2"),
        (dict(N_NODE="2", NODE_RANK="0"), "deepspeed_stage_2"),
        (dict(PRECISION="fp16"), "deepspeed_stage_2"),  # needs DeepSpeed
        (dict(PRECISION="tf32"), "auto"),
        (dict(STRATEGY="deepspeed_stage_2_offload"), "deepspeed_stage_2_offload"),
    ],
    ids=str,
)
def test_deepspeed_where_there_is_something_for_it_to_do(demo, shell, knobs, strategy):
    demo.add_gpu()
    demo.run("demo-training-run.sh", shell, **knobs)
    (train,) = [call for call in demo.calls() if flags(call).get("--train_stage") == "3"]
    assert flags(train)["--strategy"] == strategy


def test_data(demo):
    (demo.root / "data").mkdir()
    demo.run("demo-training-prepare.sh", DATA="minipile", PROJ_DIR="out/a")
    assert demo.calls()[0] == ["download", "--out", "data/minipile"]
    (demo.root / "data/minipile.bin").touch()
    demo.run("demo-training-prepare.sh", PROJ_DIR="out/b")
    assert flags(demo.calls()[-1])["--data_file"] == "data/minipile"
    demo.run("demo-training-prepare.sh", DATA="demo", PROJ_DIR="out/c")
    assert flags(demo.calls()[-1])["--data_file"] == "data/demo"
    demo.run("demo-training-prepare.sh", DATA="/my/text", VOCAB_SIZE="256", PROJ_DIR="out/d")
    (init,) = demo.calls()
    assert (flags(init)["--data_file"], flags(init)["--vocab_size"]) == ("/my/text", "256")


@pytest.mark.parametrize("status", [1, 2, 130, 143])
def test_exit_status_of_the_training_is_that_of_the_script(demo, shell, status):
    (demo.root / "status").write_text(str(status))
    assert demo.run("demo-training-run.sh", shell).returncode == status
    assert demo.calls()[-1][0] == "train"


def test_a_finished_training_is_0_whatever_becomes_of_the_sample(demo, shell):
    (command,) = demo.root.rglob("generate.py")
    command.write_text(command.read_text().replace("return 0", "return 2"))
    done = demo.run("demo-training-run.sh", shell)
    assert done.returncode == 0 and done.stderr.endswith("no sample; the training has ended well\n") and demo.calls()[-1][0] == "generate"


def test_failing_preparation_stops(demo):
    (demo.root / "make_data.py").write_text("raise SystemExit(2)")
    assert demo.run("demo-training-run.sh").returncode == 2
    assert [call[0] for call in demo.calls()] == ["demo_corpus"]


@pytest.mark.parametrize(
    "script", ["demo-training-run.sh", "demo-training-prepare.sh", "demo-training-run-v7-pile.sh", "demo-training-prepare-v7-pile.sh"]
)
def test_knobs_behind_the_script_are_an_error(demo, script):
    env = {"PATH": str(demo.bin), "HOME": str(demo.root)}
    done = subprocess.run(["sh", script, "N_LAYER=4"], cwd=demo.root, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and demo.calls() == []
    assert (
        done.stderr == f"error: {script} takes no arguments (N_LAYER=4); knobs stand before it, as in N_LAYER=4 {script}, "
        "and at the top of the scripts\n"
    )


@pytest.mark.parametrize("data, again", [("demo", []), ("minipile", ["download"])])  # which finds nothing left to do
def test_a_second_node_waits_while_the_first_makes_the_data(demo, shell, data, again):
    """Both see the same folder: two at once would take each other's half-made files."""
    (demo.root / "data").mkdir()
    with open(demo.root / "data/.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [shell, "demo-training-run.sh"]
        env = {"PATH": str(demo.bin), "HOME": str(demo.root), "DATA": data}
        with subprocess.Popen(command, cwd=demo.root, env=env, stdout=subprocess.PIPE, text=True) as second:
            assert second.stdout.readline() == f"Waiting for another start that is making data/{data}; its lock is data/.lock\n"
            assert demo.calls() == []
            for name in ("demo.bin", "demo.idx"):
                (demo.root / "data" / name).touch()
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert second.wait(60) == 0
    assert [call[0] for call in demo.calls()] == [*again, "train", "train", "generate"]


def test_data_beside_which_nothing_can_be_written_are_used(demo, shell):
    (demo.root / "data/.lock").mkdir(parents=True)
    for name in ("demo.bin", "demo.idx"):
        (demo.root / "data" / name).touch()
    assert demo.run("demo-training-run.sh", shell).returncode == 0
    assert [call[0] for call in demo.calls()] == ["train", "train", "generate"]


def test_nodes(demo):
    done = demo.run("demo-training-run.sh", N_NODE="2", GPU_PER_NODE="8", MASTER_ADDR="10.0.0.1", M_BSZ="8")
    assert done.returncode == 2
    commands = [line.strip() for line in done.stdout.splitlines() if "NODE_RANK=" in line]
    assert [line.split()[0] for line in commands] == ["NODE_RANK=0", "NODE_RANK=1"]
    assert all("MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 N_NODE=2 GPU_PER_NODE=8 " in line for line in commands)
    assert all(flags(call)["--train_stage"] == "1" for call in demo.calls() if call[0] == "train")
    assert demo.run("demo-training-run.sh", N_NODE="2", GPU_PER_NODE="8", NODE_RANK="1").returncode == 0
    calls = demo.calls()
    (train,) = [call for call in calls if call[0] == "train"]
    assert calls[-1] == train, "the sample is the first node's"
    assert (flags(train)["--num_nodes"], flags(train)["--devices"], flags(train)["--precision"]) == ("2", "8", "bf16")


@pytest.mark.parametrize("task, last", [("0", "generate"), ("1", "train")])
def test_one_of_many_tasks_prints_the_sample(demo, task, last):
    assert demo.run("demo-training-run.sh", N_NODE="2", SLURM_NODEID=task, SLURM_PROCID=task).returncode == 0
    assert demo.calls()[-1][0] == last


@pytest.mark.parametrize("nodes", ["x", "", "-1", "2 "])
def test_a_number_of_nodes_that_is_none_is_one_error(demo, shell, nodes):
    done = demo.run("demo-training-run.sh", shell, N_NODE=nodes)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: N_NODE={nodes} is not a number of nodes; use 1, 2, ..., or unset N_NODE for this machine alone\n"
    assert [call for call in demo.calls() if "3" == flags(call).get("--train_stage")] == []


def pile_files(demo, bin_size=664230651068):
    """Files of the official sizes that take no room."""
    (demo.root / "data").mkdir(exist_ok=True)
    for suffix, size in (("bin", bin_size), ("idx", 4212099722)):
        with open(demo.root / f"data/pile_20B_tokenizer_text_document.{suffix}", "wb") as file:
            try:
                file.truncate(size)
            except OSError:
                pytest.skip("no sparse files of this size here")


def test_pile(demo):
    done = demo.run("demo-training-prepare-v7-pile.sh")
    assert done.returncode == 2 and "error: data/pile_20B_tokenizer_text_document.bin is not there" in done.stderr
    pile_files(demo, bin_size=664230651066)
    done = demo.run("demo-training-prepare-v7-pile.sh")
    assert done.returncode == 2 and "has 664230651066 bytes, not 664230651068" in done.stderr
    pile_files(demo)
    assert demo.run("demo-training-prepare-v7-pile.sh").returncode == 0
    demo.add_gpu()
    assert demo.run("demo-training-run-v7-pile.sh").returncode == 0
    init, train = demo.calls()
    official = {  # RWKV-LM, RWKV-v7/train_temp/demo-training-run-v7-pile.sh
        "--vocab_size": "50304", "--ctx_len": "4096", "--micro_bsz": "30", "--lr_init": "8e-4", "--lr_final": "3e-5",
        "--weight_decay": "0.1", "--epoch_save": "50", "--my_exit_tokens": "332115325534", "--devices": "8", "--precision": "bf16",
        "--strategy": "deepspeed_stage_2", "--beta2": "0.99", "--adam_eps": "1e-18", "--n_layer": "12", "--n_embd": "768",
    }  # fmt: skip
    assert {name: flags(train).get(name) for name in official} == official
    assert flags(init)["--proj_dir"] == flags(train)["--proj_dir"]


def test_pile_is_not_trained_on_a_cpu_by_itself(demo):
    done = demo.run("demo-training-run-v7-pile.sh")
    assert done.returncode == 2 and "ACCELERATOR=gpu, but there is no GPU" in done.stderr


@pytest.mark.parametrize("signal, status", [("TERM", 143), ("INT", 130)])
def test_signals_to_the_script_reach_train_py(demo, shell, signal, status):
    demo.run("demo-training-prepare.sh")
    (demo.root / "train.py").write_text(
        "import os, signal, sys, time\n"
        "def stop(number, frame): os.write(1, b'saved\\n'); time.sleep(0.2); sys.exit(128 + number)\n"
        "signal.signal(signal.SIGTERM, stop); signal.signal(signal.SIGINT, stop)\n"
        "print('training', flush=True); time.sleep(30)\n"
    )
    process = subprocess.Popen(
        [shell, "demo-training-run.sh"], cwd=demo.root, env={"PATH": str(demo.bin)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "training\n"
    subprocess.run(["sh", "-c", f"kill -{signal} {process.pid}"], check=True)
    assert process.communicate(timeout=20)[0] == "saved\n" and process.returncode == status


def test_the_signal_to_save_reaches_the_training_which_goes_on(demo, shell):
    """As a scheduler sends it before the time is up, to the script alone or to all: it ended the script."""
    demo.run("demo-training-prepare.sh")
    (demo.root / "train.py").write_text(
        "import signal, time\n"
        "asked = []\n"
        "signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))\n"
        "print('training', flush=True)\n"
        "while not asked: time.sleep(0.05)\n"
        "print('saved', flush=True); time.sleep(0.5); print('trained', flush=True)\n"
    )
    process = subprocess.Popen(
        [shell, "demo-training-run.sh"], cwd=demo.root, env={"PATH": str(demo.bin), "PROMPT": ""}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "training\n"
    subprocess.run(["sh", "-c", f"kill -USR1 {process.pid}"], check=True)
    assert process.communicate(timeout=20)[0] == "saved\ntrained\n" and process.returncode == 0


@pytest.mark.parametrize("signal, status", [("TERM", 143), ("INT", 130)])
@pytest.mark.parametrize(
    "data, file",
    [
        ("demo", "RWKV-v7/rwkvlm/cli/demo_corpus.py"),
        ("demo", "make_data.py"),
        ("minipile", "RWKV-v7/rwkvlm/cli/download.py"),
        ("demo", "train.py"),
        ("demo", "RWKV-v7/rwkvlm/cli/generate.py"),
    ],
)
def test_signals_to_the_script_reach_the_preparation_and_the_sample(demo, shell, data, file, signal, status):
    """They would go on alone, behind a prompt that has come back."""
    (demo.root / file).write_text(
        "import signal, time\n"
        "def main(argv=()): print('working', flush=True); time.sleep(30)\n"
        "if __name__ == '__main__': signal.signal(signal.SIGINT, signal.default_int_handler); main()\n"
    )
    script = "run" if "generate" in file else "prepare"
    command, env = [shell, f"demo-training-{script}.sh"], {"PATH": str(demo.bin), "DATA": data}
    process = subprocess.Popen(command, cwd=demo.root, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    while (line := process.stdout.readline()) != "working\n":
        assert line
    subprocess.run(["sh", "-c", f"kill -{signal} {process.pid}"], check=True)
    assert process.communicate(timeout=20)[0] == "" and process.returncode == status
