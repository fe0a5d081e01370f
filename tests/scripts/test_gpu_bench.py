"""bench/gpu.sh and bench/minipile_losses.sh without a GPU: steps, budget, resuming, the one JSON; each kernel's bench on tiny shapes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkvlm.config import UserError
from rwkvlm.ops import backend

ROOT = Path(__file__).resolve().parents[2]
ON_PATH = {"PYTHONPATH": f"{ROOT / 'bench'}:{ROOT / 'RWKV-v7'}"}
sys.path.insert(0, str(ROOT / "bench"))
import gpu
import gpu_kernels
import gpu_step
import gpu_train
import minipile_losses

sys.path.pop(0)
REHEARSAL = ["--device", "cpu", "--small"]
READY = "print('ready', flush=True); time.sleep(60)"


def python(code: str, name: str = "item", **reading) -> gpu.Item:
    return gpu.Item(name, [sys.executable, "-c", code], **reading)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """run(items of the steps, further arguments) -> exit code, results.json, in a folder of its own."""

    def run(items: dict[str, list[gpu.Item]], *arguments: str) -> tuple[int, dict]:
        monkeypatch.setattr(gpu, "items_of", lambda step, options: items.get(step, []))
        code = gpu.main([*items, "--out", str(tmp_path), *REHEARSAL, *arguments])
        path = tmp_path / "results.json"
        return code, json.loads(path.read_text()) if path.exists() else {}

    return run


@pytest.fixture
def over_when_it_says(tmp_path, monkeypatch):
    """over_when_it_says("ready"): the time of an item is over as soon as it has printed this, however slow the machine is. Once."""
    now, wait, over = [0.0], subprocess.Popen.wait, []
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def use(word: str) -> None:
        def waiting(process, timeout=None):
            end = time.monotonic() + 60
            while not over and process.poll() is None:
                if any(word in log.read_text() for log in tmp_path.glob("logs/*")):
                    over.append(word)
                    now[0] += timeout
                    raise subprocess.TimeoutExpired(process.args, timeout)
                assert time.monotonic() < end
                time.sleep(0.02)
            return wait(process, timeout)

        monkeypatch.setattr(subprocess.Popen, "wait", waiting)

    return use


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so():
    done = subprocess.run(
        [ROOT / "bench" / "gpu.sh", "kernels"], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: torch ") and line.endswith("--device cpu --small rehearses every step without one")


def test_what_is_done_is_kept_and_what_failed_is_done_again(bench, tmp_path, capsys):
    count = f"import pathlib; p = pathlib.Path({str(tmp_path / 'runs')!r}); p.open('a').write('x'); print('{{\"ms\": 1.5}}'); "
    items = {"kernels": [python(count, "good", read=gpu.last_json)], "step": [python(f"{count} raise SystemExit(4)", "bad")]}
    code, results = bench(items)
    assert code == 1 and "step 1/1 bad: FAILED, see" in capsys.readouterr().out
    assert results["steps"]["kernels"]["good"]["ok"] and results["steps"]["kernels"]["good"]["result"] == {"ms": 1.5}
    bad = results["steps"]["step"]["bad"]
    assert (bad["ok"], bad["exit_code"], bad["last_lines"]) == (False, 4, ['{"ms": 1.5}'])
    assert {"commit", "chip", "torch", "python", "begun"} <= results["about"].keys()
    items["step"] = [python(count, "bad")]
    assert bench(items)[0] == 0 and (tmp_path / "runs").read_text() == "xxx"
    assert bench(items)[0] == 0 and (tmp_path / "runs").read_text() == "xxx"
    assert bench(items, "--again")[0] == 0 and (tmp_path / "runs").read_text() == "xxxxx"


def test_the_minutes_end_an_item_politely_and_the_next_call_goes_on(bench, tmp_path, capsys, over_when_it_says):
    slow = f"import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(143))); {READY}"
    over_when_it_says("ready")
    items = {"tests": [python("pass", "quick")], "train": [python(slow, "slow")], "step": [python("pass", "never")]}
    code, results = bench(items, "--minutes", "0.5")
    assert code == 3
    assert "train: 0 of 1 items; 0.5 minutes are over: the same command goes on" in capsys.readouterr().out
    stopped = results["steps"]["train"]["slow"]
    assert not stopped["ok"] and stopped["exit_code"] == 143 and "saved" in (tmp_path / "logs" / "train-slow.log").read_text()
    assert "step" not in results["steps"]
    items["train"] = [python("pass", "slow")]
    code, results = bench(items)
    assert code == 0 and all(item["ok"] for step in results["steps"].values() for item in step.values())


def test_only_what_is_asked_for(bench):
    items = {"tests": [python("pass", "tests/cuda/a"), python("raise SystemExit(1)", "tests/data/b"), python("pass", "tests/ops/c")]}
    code, results = bench(items, "--only", "cuda/,ops/")
    assert code == 0 and results["steps"]["tests"].keys() == {"tests/cuda/a", "tests/ops/c"}


def test_an_item_that_ignores_the_end_is_killed(bench, monkeypatch, over_when_it_says):
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    deaf = f"import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); {READY}"
    over_when_it_says("ready")
    code, results = bench({"train": [python(deaf)]}, "--minutes", "0.5")
    assert code == 3 and results["steps"]["train"]["item"]["exit_code"] == -9


RUNNER = """
import gpu, pathlib, subprocess
wait = subprocess.Popen.wait
def waits(process, timeout=None):
    pathlib.Path({waits!r}).touch()  # before, Python may still be starting the item
    return wait(process, timeout)
def items(*_):
    subprocess.Popen.wait = waits
    return [gpu.Item("item", {item!r})]
gpu.items_of = items
raise SystemExit(gpu.main(["step", "--out", {out!r}, "--device", "cpu"]))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_is_running_ends_with_it(tmp_path, number, code):
    item = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    runner = RUNNER.format(item=[sys.executable, "-c", item], waits=str(tmp_path / "waits"), out=str(tmp_path))
    log = tmp_path / "logs" / "step-item.log"
    with subprocess.Popen([sys.executable, "-c", runner], env=os.environ | ON_PATH) as process:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "waits").exists() and log.read_text()):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(60) == code
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


@pytest.mark.parametrize("at", [1, 2])
def test_a_signal_while_an_item_is_being_started(tmp_path, at):
    """Python has made the process and not handed it over yet: it went on alone."""
    item = [sys.executable, "-c", "import time; time.sleep(600)", str(tmp_path)]
    starts = f"""
import gpu, os, signal, subprocess
begun, start = 0, subprocess.Popen._execute_child
def starts(*arguments):
    global begun
    start(*arguments)
    begun += 1
    if begun == {at}:
        os.kill(os.getpid(), signal.SIGTERM)
def items(*_):
    subprocess.Popen._execute_child = starts
    return [gpu.Item("item", {item!r})]
gpu.items_of = items
raise SystemExit(gpu.main(["step", "--out", {str(tmp_path)!r}, "--device", "cpu"]))
"""
    done = subprocess.run([sys.executable, "-c", starts], env=os.environ | ON_PATH, timeout=60)
    assert done.returncode == 143
    for _ in range(200):  # what has to see first that nobody is there any more
        left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if os.fsencode(tmp_path) in content(path)]
        if not left:
            break
        time.sleep(0.1)
    assert not left


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # the process has ended
        return b""


def test_an_item_that_hangs_has_failed_and_takes_no_time_of_the_others(bench, over_when_it_says):
    over_when_it_says("began")
    hanging = python("import time; print('began', flush=True); time.sleep(60)", "hanging", most=3.0)
    code, results = bench({"tests": [hanging, python("pass", "next")]})
    found = results["steps"]["tests"]
    assert code == 1 and not found["hanging"]["ok"] and found["next"]["ok"]
    assert found["hanging"]["error"] == "it was still running after 3 s" and found["hanging"]["last_lines"] == ["began"]


def test_all_files_that_have_a_form_for_a_gpu_run_first_each_in_a_process_of_its_own():
    """Of tests/cuda: those with tests that take the device, or need a GPU. pytest fails on a file of which -k leaves nothing."""
    files = {
        p.stem.removeprefix("test_")
        for p in (ROOT / "tests" / "cuda").glob("test_*.py")
        if re.search(r"^def test_\w*(_gpu\w*\(|\(.*\bdevice\b)", p.read_text(), re.M)
    }
    assert files == set(gpu.ON_GPU)
    options = type("Options", (), dict(device="cuda", small=False))
    assert [item.command[-3:] for item in gpu.items_of("tests", options)] == [
        [f"tests/cuda/test_{name}.py", "-k", "gpu"] for name in gpu.ON_GPU
    ]
    assert {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_*.py")} == {
        item.name for item in gpu.items_of("others", options)
    }


def test_results_of_another_commit_are_set_aside(bench, tmp_path, capsys):
    bench({"step": [python("pass")]})
    path = tmp_path / "results.json"
    old = json.loads(path.read_text())
    old["about"]["commit"] = "another"
    path.write_text(json.dumps(old))
    assert bench({"kernels": [python("pass")]})[1]["steps"].keys() == {"kernels"}
    assert "now results-1.json" in capsys.readouterr().out and json.loads((tmp_path / "results-1.json").read_text()) == old


def test_a_tool_that_is_missing_and_a_log_that_is_odd_are_failures(bench):
    items = {"sanitize": [gpu.Item("memcheck", ["/nowhere/compute-sanitizer"]), python("print('{odd')", "odd", read=gpu.last_json)]}
    code, results = bench(items)
    missing = results["steps"]["sanitize"]["memcheck"]
    assert code == 1 and missing["exit_code"] == 127 and "/nowhere/compute-sanitizer: not found" in missing["last_lines"][-1]
    assert not results["steps"]["sanitize"]["odd"]["ok"] and "cannot be read" in results["steps"]["sanitize"]["odd"]["error"]


def test_logs_are_understood():
    assert gpu.pytest_counts("..\n3 passed, 1 failed, 2 skipped in 4.5s") == {"passed": 3, "failed": 1, "skipped": 2}
    assert gpu.sanitizer_errors("x\n========= ERROR SUMMARY: 2 errors\n") == {"errors": 2}
    assert gpu.sanitizer_errors("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n") == {"errors": 1}


def test_the_loss_curve_of_a_run(tmp_path):
    lines = [{"step": s, "tokens": 100 * s, "loss": 5 - s / 100, "tokens_per_s": 1000 + s, "mfu": 0.5} for s in range(1, 451)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(x) for x in [*lines, {"step": 450, "tokens": 45000, "val_loss": 0.25}]))
    curve = gpu.loss_curve(tmp_path)
    assert curve["loss"][0] == (100, 4.99) and curve["loss"][-1] == (45000, 0.5) and len(curve["loss"]) < 230
    assert curve["val_loss"] == [(45000, 0.25)] and curve["tokens_per_s_median"] == 1226 and not curve["finished"]


def test_every_step_has_items_on_a_gpu_and_in_a_rehearsal():
    for arguments in ([], REHEARSAL):
        for step in gpu.STEPS:
            device = arguments[1] if arguments else "cuda"
            options = SimpleNamespace(device=device, small=bool(arguments), models="", peer=["fla=/src"], out=Path("/o"))
            items = gpu.items_of(step, options)
            files = [word for item in items for word in item.command if word.endswith(".py")]
            assert items and all(Path(ROOT, file).exists() for file in files), step
            assert len({item.name for item in items}) == len(items)


def test_once_asks_for_every_kernel_that_there_is(monkeypatch, capsys):
    """compute-sanitizer finds nothing in what never runs.

    Each size of a head in more than one chunk, documents, one blend or six, wide rows, ROSA of tokens.
    """
    asked = {name: [] for name in ("wkv7", "norm_mix", "rosa_self", "rosa_tokens")}
    fused, rosa = gpu_kernels.fused, gpu_kernels.rosa
    for module, name in ((gpu_kernels, "wkv7"), (fused, "norm_mix"), (rosa, "rosa_self"), (rosa, "rosa_tokens")):
        call = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *x, call=call, name=name, **options: asked[name].append((x, options)) or call(*x, **options)
        )
    assert gpu_kernels.main(["once", *REHEARSAL]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] > 100
    for packed in (False, True):
        longest = {}
        for x, options in asked["wkv7"]:
            if ("cu_seqlens" in options) == packed == ("pass_on" in options):
                *_, begin, end = options.get("cu_seqlens", torch.tensor([0, x[0].shape[1]])).tolist()
                longest[x[0].shape[3]] = max(end - begin, longest.get(x[0].shape[3], 0))
        assert {N for N, T in longest.items() if T > (32 if N == 128 else 64)} == ({32, 64, 128} if packed else {16, 32, 64, 128})
    norms = {(x[0].dtype, x[0].shape[2] > 2048, len(x[6])) for x, _ in asked["norm_mix"] if x[0].dtype != torch.float64}
    assert norms == {(dtype, wide, n) for dtype in (torch.float32, torch.bfloat16) for wide in (False, True) for n in (1, 6)}
    assert {x[0].shape[1] for x, _ in asked["rosa_self"]} == {3, 40}
    assert any(options.get("return_state") for _, options in asked["rosa_tokens"]) and any(len(x) == 2 for x, _ in asked["rosa_tokens"])


@pytest.mark.parametrize("what", ["wkv7", "norm_mix", "relu_square", "loss", "adamw"])
def test_kernels_are_checked_and_timed(what, capsys):
    assert gpu_kernels.main([what, *REHEARSAL]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["times"]["ours"]["ms"] > 0 and row["times"]["ours"]["rounds"] == 3


def test_the_gpu_waits_until_all_of_what_is_timed_is_on_its_stream(monkeypatch):
    """Else small kernels are as slow as Python."""
    happened = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            happened.append("event")

        def elapsed_time(self, other):
            return 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append("busy"))
    options = type("Options", (), dict(device="cuda", warmup=0, rounds=1))
    assert gpu_kernels.timed({"it": lambda i: happened.append("it")}, 1, options)["it"]["rounds"] == 1
    assert happened == ["wait", "busy", "event", "it", "event", "wait"]


def test_a_peer_is_a_file_and_nothing_is_timed_on_wrong_results(tmp_path, capsys):
    (tmp_path / "right.py").write_text("from rwkvlm.ops.wkv7 import wkv7_chunked\ndef wkv7(*x): return wkv7_chunked(*x)[0]\n")
    (tmp_path / "wrong.py").write_text("from rwkvlm.ops.wkv7 import wkv7_chunked\ndef wkv7(*x): return wkv7_chunked(*x)[0] * 1.1\n")
    assert gpu_kernels.main(["wkv7", "--peer", f"mine={tmp_path / 'right.py'}", *REHEARSAL]) == 0
    assert json.loads(capsys.readouterr().out)["ours_is_faster_by"] > 0
    assert gpu_kernels.main(["wkv7", "--peer", f"mine={tmp_path / 'wrong.py'}", *REHEARSAL]) == 1
    said = capsys.readouterr()
    assert said.out == "" and " is off by " in said.err and said.err.endswith("nothing is timed on wrong results\n")
    with pytest.raises(SystemExit, match="no folder"):
        gpu_kernels.main(["wkv7", "--peer", "fla=/nowhere", *REHEARSAL])


def test_what_is_exact_is_computed_in_plain_pytorch_whatever_kernel_is_asked_for():
    """On a GPU "cuda" is asked for by name, and what is exact is on the CPU."""
    options = type("Options", (), dict(device="cpu", dtype=torch.float32))
    backend.set_kernel("cpu")  # which has no float64
    assert gpu_kernels.check_steps((1, 70, 1, 16), options) < 2 * gpu_kernels.LIMITS[torch.float32]


def test_a_wrong_kernel_of_ours_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(gpu_kernels.fused, "relu_square", lambda x: torch.relu(x) ** 2 * 1.1)
    assert gpu_kernels.main(["relu_square", *REHEARSAL]) == 1
    assert capsys.readouterr().err.startswith("error: relu_square: result 0 is off by")


@pytest.mark.parametrize("model", ["L1-D64x2x32", "P1-D64x2x100", "X1-D64x2x100"])
def test_the_step_is_checked_and_timed(capsys, monkeypatch, model):
    assert gpu_step.main([model, *REHEARSAL]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        row["tokens_per_s"] > 0
        and row["mfu"] is None
        and row["by_kernel"]
        and row["errors"]["gradient"] < gpu_step.LIMIT
        and row["errors"]["parameter"] < row["errors"]["at most"] / 3
    )
    monkeypatch.setattr(gpu_step, "LIMIT", 0.0)
    assert gpu_step.main([model, *REHEARSAL]) == 1


def test_a_wrong_gradient_that_is_small_beside_the_others_is_found(capsys, monkeypatch):
    """That of the bonus r_k, turned: of all gradients together it is less than the limit."""

    def turned(model):
        for block in model.blocks:
            block.att.r_k.register_hook(torch.neg)

    monkeypatch.setattr(gpu_step, "compile_blocks", lambda model, graphs: turned(model))
    assert gpu_step.main(["L1-D64x2x32", *REHEARSAL, "--compile", "default"]) == 1
    assert "'of which': 'the gradient of blocks." in capsys.readouterr().err


def test_the_compiled_step_is_what_is_checked(capsys, monkeypatch):
    """Where blocks give something else compiled, nothing is timed. That compiled ones are right, train/test_compile.py proves."""
    asked = []

    def compile_wrongly(model, graphs):
        asked.append(graphs)
        for block in model.blocks:
            block._compiled_call_impl = lambda x, *rest, block=block: (block.forward(x, *rest)[0] * 1.5, *block.forward(x, *rest)[1:])

    monkeypatch.setattr(gpu_step, "compile_blocks", compile_wrongly)
    assert gpu_step.main(["L1-D64x2x32", *REHEARSAL, "--compile", "reduce-overhead"]) == 1
    assert asked == [True] and "nothing is timed on wrong results" in capsys.readouterr().err


def test_the_step_in_graphs_is_what_is_checked(capsys, monkeypatch):
    """As for compiled ones; a rehearsal has no graphs, so the check of the arguments is passed by."""
    asked = []

    def record_wrongly(model, *shape):
        asked.append(shape)
        for block in model.blocks:
            forward = block.forward
            block.forward = lambda x, *rest, forward=forward: (forward(x, *rest)[0] * 1.5, *forward(x, *rest)[1:])

    for flags, said in (
        (["--graphs"], "--graphs needs a GPU"),
        (["--compile", "reduce-overhead", "--grad_cp", "1"], "training refuses it with --grad_cp 1"),
    ):
        with pytest.raises(SystemExit):
            gpu_step.main(["L1-D64x2x32", *REHEARSAL, *flags])
        assert said in capsys.readouterr().err
    monkeypatch.setattr(gpu_step, "graph_blocks", record_wrongly)
    options = type("Options", (), dict(device="cpu", graphs=True, compile="", grad_cp=1, small=True, rosa_grad="flip"))
    assert gpu_step.errors("L", "", options)["gradient"] > gpu_step.LIMIT and asked == [(2, 100, True)]
    items = gpu.items_of("step", type("Options", (), dict(device="cuda", small=False, models="")))
    commands = {item.name: item.command[2:] for item in items}
    assert commands["P12-D768x16x512 graphs"] == ["P12-D768x16x512", "--device", "cuda", "--graphs"]
    assert commands["X12-D768x16x512 rosa_grad none"] == ["X12-D768x16x512", "--device", "cuda", "--rosa_grad", "none"]


def test_a_kernel_counts_once_and_not_for_its_operator_too():
    """torch's profiler gives the time of a kernel to the operator that has launched it as well."""

    class Event:
        def __init__(self, key, us, kind, annotation=False):
            self.key, self.self_device_time_total, self.device_type, self.is_user_annotation, self.count = key, us, kind, annotation, 2

    CPU, CUDA = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = ("aten::mm", 3000, CPU), ("gemm", 3000, CUDA), ("small", 500, CUDA), ("step", 9000, CUDA, True), ("none", 0, CUDA)
    found = gpu_step.times_by_kernel([Event(*event) for event in events], "cuda", 25)
    assert found["kernels_ms"] == 3.5 and found["launches"] == 6
    assert found["by_kernel"] == [{"ms": 3.0, "calls": 2, "name": "gemm"}, {"ms": 0.5, "calls": 2, "name": "small"}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_gpu_only_our_kernels_count():
    """The benches ask for the CUDA kernels by name: what cannot run is an error, and no plain PyTorch is timed in its place."""
    backend.set_kernel("cuda")
    with pytest.raises(UserError, match="--kernel cuda"):
        gpu_kernels.fused.relu_square(torch.ones(1, 1, 16))


def test_the_recipe_without_the_scripts_has_their_knobs(monkeypatch):
    """Every flag that demo-training-run.sh takes from a knob, with the value of the scripts."""
    for name in gpu_train.FLAGS.values():
        monkeypatch.delenv(name, raising=False)
    script = (ROOT / "demo-training-run.sh").read_text()
    used = dict(re.findall(r'--(\w+) "\$(\w+)"', script))
    used = {
        flag: knob
        for flag, knob in used.items()
        if flag not in {"wandb", "proj_dir", "data_file", "vocab_size", "num_nodes", "accelerator", "devices", "prompt"}
    }
    assert used == {flag: knob for flag, knob in gpu_train.FLAGS.items() if flag != "random_seed"} and "--warmup_steps 10" in script
    on_gpu, on_cpu = gpu_train.knobs(True), gpu_train.knobs(False)
    expected = dict(N_LAYER="12", M_BSZ="16", LR_INIT="6e-4", PRECISION="bf16", EXIT_TOKENS="0", STRATEGY="auto")
    assert on_gpu.items() >= expected.items()
    assert (on_cpu["N_LAYER"], on_cpu["EXIT_TOKENS"], on_cpu["KERNEL"]) == ("6", "1000000", "")
    assert not any("$" in found[knob] for found in (on_gpu, on_cpu) for knob in gpu_train.FLAGS.values())
    monkeypatch.setenv("M_BSZ", "32")
    assert gpu_train.knobs(True)["M_BSZ"] == "32"


def test_what_is_missing_for_the_demo_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_train, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_train, "knobs", lambda gpu: dict.fromkeys(gpu_train.FLAGS.values(), "1"))
    monkeypatch.setattr(gpu_train.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PROJ_DIR", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    assert gpu_train.main() == 2
    assert capsys.readouterr().err == f"error: {gpu_train.MISSING}\n"


def test_minipile_losses_are_compared(tmp_path, capsys, monkeypatch):
    def log(*values: float) -> None:
        lines = [f"{i} {v:.6f} 12.3456 0.00060000 2026-11-26 10:00:00 {i}" for i, v in enumerate(values)]
        (tmp_path / "train_log.txt").write_text("\n".join(["NEW RUN 2026", "{'lr': 1}", *lines, ""]))

    log(*(loss + 0.009 for loss in minipile_losses.PUBLISHED))
    assert minipile_losses.main(["--compare", str(tmp_path)]) == 0
    log(4.88, 4.04)
    assert minipile_losses.main(["--compare", str(tmp_path)]) == 1
    assert "more than 0.01" in capsys.readouterr().out
    log(4.88)
    assert minipile_losses.main(["--compare", str(tmp_path)]) == 3
    monkeypatch.setenv("MINI_EPOCHS", "1")
    assert minipile_losses.main(["--compare", str(tmp_path)]) == 0


def test_a_minipile_run_is_stopped_when_its_losses_are_there(tmp_path):
    script = (
        "import pathlib, time; p = pathlib.Path('train_log.txt'); f = p.open('a')\n"
        "for i in range(9): print(f'{i} 4.8 1.0 0.0006 a b {i}', file=f, flush=True); time.sleep(0.2)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{script}"]
    begin = time.monotonic()
    assert minipile_losses.train(tmp_path, 3, command) == 0
    assert time.monotonic() - begin < 30 and len(minipile_losses.losses(tmp_path)) >= 3


@pytest.mark.parametrize("run", ["", "--model x080", "--model x040", "--strategy auto", "--strategy deepspeed_stage_2"])
def test_what_a_step_costs_the_host(run):
    """In a process of its own, where CPU tensors go the way of a GPU's."""
    command = [sys.executable, str(ROOT / "bench" / "host_time.py"), "--layers", "1", "--steps", "3", *run.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ON_PATH)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layers"] == 1 and min(found["ms"].values()) > 0
