"""--cuda_graphs 1 without a GPU: everything around the graphs, with a tape in their place (tests/oracles/tape.py).

On a GPU: tests/cuda/test_graphs.py.
"""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from oracles.tape import Tape
from rwkvlm.config import ModelConfig, PhantomConfig, TrainConfig, UserError, model_config
from rwkvlm.models import build, init_weights
from rwkvlm.ops.cross_entropy import head_cross_entropy
from rwkvlm.train import graphs, plan
from rwkvlm.train import run as training
from rwkvlm.train.freeze import freeze
from rwkvlm.train.graphs import check_graphs, decide_graphs, graph_blocks, try_graphs
from rwkvlm.train.strategy import Launch

SIZES = dict(n_embd=64, vocab_size=97, head_size=32)
MODELS = {
    "x070": ModelConfig(n_layer=3, **SIZES),
    "one block": ModelConfig(n_layer=1, **SIZES),
    "x040": ModelConfig(model_type="x040", n_layer=3, n_embd=64, vocab_size=97),
    "hybrid": model_config("hybrid", n_layer=4, attention_layers="1,3", attention_kv_heads=1, attention_window=16, **SIZES),
    "phantom": model_config("phantom", n_layer=2, core_ratio=0.5, ttt_chunk=16, **SIZES),
    "x080": model_config("x080", n_layer=3, rosa_bits=4, deep_embed=True, **SIZES),
    "fixed symbols": model_config("x080", n_layer=3, rosa_bits=4, rosa_grad="none", **SIZES),
    "rosa": model_config("rosa", n_layer=3, rosa_bits=1, n_embd=64, vocab_size=97),
    "memory": model_config("phantom", n_layer=2, ttt_kind="memory", max_depth_iter=2, **SIZES),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


class Pair:
    """The same model twice, one of them with graphs of batches [2, 40]. both(work): work's results, the eager one's first."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, recompute: bool = False, frozen: str = "") -> None:
        self.models = []
        for _ in range(2):
            model = build(config)
            init_weights(model, 1)
            rng = torch.Generator().manual_seed(0)
            for p in model.parameters():
                if not p.any():
                    torch.nn.init.normal_(p, std=0.05, generator=rng)
            freeze(model, frozen)
            self.models.append(model.to(dtype))
        self.recompute, self.tape = recompute, Tape(config.n_layer, recompute)
        before = torch.get_rng_state(), [x.clone() for x in self.models[1].state_dict().values()]
        graph_blocks(self.models[1], 2, 40, recompute, self.tape)
        assert torch.equal(torch.get_rng_state(), before[0]) and all(map(torch.equal, self.models[1].state_dict().values(), before[1]))
        assert all(p.grad is None for p in self.models[1].parameters())

    def both(self, work):
        return [work(model) for model in self.models]

    def loss(self, number: int, model, shape=(2, 40)) -> torch.Tensor:
        idx = torch.randint(97, (shape[0], shape[1] + 1), generator=torch.Generator().manual_seed(number))
        return head_cross_entropy(model.features(idx[:, :-1], grad_cp=self.recompute), model.head.weight, idx[:, 1:])

    def same_gradients(self) -> bool:
        for (name, p), (_, q) in zip(*self.both(lambda model: list(model.named_parameters())), strict=True):
            assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad)), name
        return True


@pytest.mark.parametrize("recompute", [False, True], ids=["", "grad_cp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_bits_of_eager_blocks(name, dtype, recompute):
    """Steps of two micro batches over other tokens each time, parameters that move, validation and a batch of another shape in between."""
    pair = Pair(MODELS[name], dtype, recompute)
    n = len(pair.models[0].blocks)
    assert pair.tape.tried == 3 * n and len(pair.tape.lists) == 2 * n
    for step in range(3):
        pair.both(lambda model: model.zero_grad())
        for micro in range(2):
            pair.tape.ran.clear()
            eager, graphed = pair.both(lambda model: pair.loss(10 * step + micro, model))
            assert pair.tape.ran == list(range(n)) and eager.item() == graphed.item()
            eager.backward()
            graphed.backward()
            assert pair.tape.ran == list(range(2 * n)) and pair.same_gradients()
        with torch.no_grad():
            pair.both(lambda model: [p.sub_(0.1 * p.grad) for p in model.parameters() if p.requires_grad])
            eager, graphed = pair.both(lambda model: pair.loss(99, model).item())
        pair.both(lambda model: model.eval())
        assert pair.both(lambda model: pair.loss(99, model).item()) == [eager, graphed] and eager == graphed
        pair.both(lambda model: model.train())
        eager, graphed = pair.both(
            lambda model: torch.autograd.grad(pair.loss(98, model, (1, 30)), [p for p in model.parameters() if p.requires_grad])
        )
        assert all(map(torch.equal, eager, graphed)) and len(pair.tape.ran) == 2 * n


@pytest.mark.parametrize(
    "frozen", ["emb,head", "emb,blocks.0", "emb,blocks.0.att,blocks.0.ln*", "blocks.*.ffn", "emb,head,ln_out,blocks.0,blocks.1"]
)
def test_frozen_parts_have_no_gradient(frozen):
    pair = Pair(MODELS["x070"], frozen=frozen)
    for number in range(2):
        pair.both(lambda model: model.zero_grad())
        pair.both(lambda model: pair.loss(number, model).backward())
        assert pair.same_gradients()
    assert any(p.grad is None for p in pair.models[1].parameters())


class Counted(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind, copies", [("x070", 2), ("x080", 3)])
def test_what_is_launched_beside_the_graphs(kind, copies):
    """Two copies into place, however many blocks there are, of a ROSA's tokens a third, and the gradients' way out.

    That is one call a block; blocks read where their neighbours write.
    """
    counts = []
    for n_layer in (2, 4):
        pair = Pair(replace(MODELS[kind], n_layer=n_layer))
        pair.loss(0, pair.models[1]).backward()
        pair.models[1].zero_grad()
        with Counted() as counted:
            pair.loss(1, pair.models[1]).backward()
        counts.append({name: counted.names.count(name) for name in set(counted.names)})
    few, many = counts
    assert few["aten::copy_"] == many["aten::copy_"] == copies and many["aten::_foreach_copy_"] == 4 and "aten::zero_" not in many
    free = {"aten::detach", "aten::empty_like", "aten::_foreach_copy_"}  # no kernel, and counted above
    assert {name: many[name] for name in many.keys() - free} == {name: few[name] for name in few.keys() - free}


def test_what_is_gone_is_not_used():
    """A later forward pass, a second backward pass, and parameters elsewhere: errors, not numbers."""
    pair = Pair(MODELS["x070"])
    _, first = pair.both(lambda model: pair.loss(0, model))
    _, second = pair.both(lambda model: pair.loss(1, model))
    with pytest.raises(RuntimeError, match="have run since this forward pass"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="have run since this forward pass"):
        second.backward()
    weight = pair.models[1].blocks[1].ffn.key.weight
    weight.data = weight.data.clone()
    with pytest.raises(RuntimeError, match="do not lie any more where"):
        pair.loss(2, pair.models[1])


def test_the_tape_would_find_memory_that_is_used_too_late(monkeypatch):
    """Gradients handed out where the graphs write them, as torch.cuda.make_graphed_callables does.

    They are gone in the next pass, and twice the second one's.
    """

    def alias(out, gradients):
        for place, gradient in zip(out, gradients):
            place.set_(gradient)

    pair = Pair(MODELS["x070"])
    monkeypatch.setattr(torch, "_foreach_copy_", alias)
    model, weight = pair.models[1], pair.models[1].blocks[0].ffn.key.weight
    pair.loss(0, model).backward()
    assert weight.grad.isfinite().all()
    second = pair.loss(1, model)
    assert weight.grad.isnan().all()
    second.backward()
    pair.loss(1, pair.models[0]).backward()
    assert torch.equal(weight.grad, 2 * pair.models[0].blocks[0].ffn.key.weight.grad)


def test_states_are_asked_of_the_blocks_themselves():
    """Also in training, where gradients are made: the graphs neither read a state nor give one."""
    pair = Pair(MODELS["x070"])
    idx = torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
    (eager, state), (graphed, same) = pair.both(lambda model: model.features(idx, return_state=True))
    assert torch.equal(eager, graphed) and all(
        torch.equal(a, b) for one, other in zip(state, same, strict=True) for a, b in zip(one, other, strict=True)
    )
    eager, graphed = pair.both(lambda model: model.features(idx, state))
    assert torch.equal(eager, graphed) and not torch.equal(graphed, pair.models[1].features(idx))


def test_an_output_that_nobody_uses_has_no_slope():
    """What the pass before has left in its place is not read again."""
    pair, x = Pair(MODELS["x070"]), torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    pair.both(lambda model: pair.loss(0, model).backward())
    pair.both(lambda model: model.zero_grad())
    pair.both(lambda model: model.blocks[0](x, None)[0].square().sum().backward())
    assert pair.same_gradients()


def test_hooks_of_parameters_do_not_run_while_blocks_are_recorded():
    """Those of DDP and DeepSpeed would send what is no gradient."""
    model, called = build(MODELS["one block"]), []
    init_weights(model, 1)
    for name, p in model.named_parameters():
        p.register_hook(lambda grad, name=name: called.append(name))
    graph_blocks(model, 2, 40, recorder=Tape(1))
    assert not called
    model.features(torch.zeros(2, 40, dtype=torch.int64)).sum().backward()
    assert sorted(called) == sorted(name for name, _ in model.named_parameters() if name != "head.weight")


def test_a_block_that_cannot_be_recorded_is_one_line(monkeypatch):
    with pytest.raises(
        UserError,
        match=r"a block cannot be recorded here: CUDA error: operation not permitted when stream is capturing; leave --cuda_graphs out$",
    ):
        graph_blocks(build(MODELS["x070"]), 2, 40, recorder=Refusing(3))
    monkeypatch.setattr(Refusing, "error", torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):  # of which run.py says what fits
        graph_blocks(build(MODELS["x070"]), 2, 40, recorder=Refusing(3))


@pytest.mark.parametrize("version, ended", [("2.13.0", False), ("2.13.0", True), ("2.14.0", False)])
def test_where_a_recording_fails(monkeypatch, version, ended):
    """torch.cuda.graph with torch's own Python, on streams that are numbers: the end of a recording that was broken off raises.

    The stream is the one before, and the pool's memory no longer that of a graph that there is not: from 2.14 on torch sees to it.
    """
    current, told = [SimpleNamespace(device="cuda:0", device_index=0)], []
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(version))

    def fail(self, *_):
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def work():
        raise RuntimeError("refused")

    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *given, name=name: told.append((name, *given)), raising=False)
    monkeypatch.setattr(torch.cuda, "_get_device_index", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    end = (lambda self: None) if ended else fail
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("Graph", (), dict(capture_begin=lambda *_, **__: None, capture_end=end, pool=end)))
    recorder = object.__new__(graphs.Recorder)
    recorder.stream, recorder.pool = SimpleNamespace(device="cuda:0", device_index=0), (0, 1)
    with pytest.raises(RuntimeError, match="refused" if ended else "previous error during capture"):
        recorder.record(work if ended else lambda: None)
    assert recorder.stream in current and current[-1] is current[0]
    assert told == ([] if ended or version == "2.14.0" else [("_cuda_endAllocateToPool", 0, (0, 1)), ("_cuda_releasePool", 0, (0, 1))])


class Refusing(Tape):
    """As where a graph cannot be recorded."""

    error: Exception = RuntimeError(
        "CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might be reported later"
    )

    def record(self, work):
        raise self.error


class Idle(Tape):
    """Graphs that leave what was there before."""

    def _run(self, number: int) -> None:
        self.ran.append(number)


def everything(model) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(x.clone() for x in model.state_dict().values())]


@pytest.mark.parametrize("recompute", [False, True], ids=["", "grad_cp"])
@pytest.mark.parametrize("name", MODELS)
def test_graphs_that_are_tried_have_been_compared_and_stay(name, recompute):
    """Of a new model, most of whose gradients would be zero. Weights and random numbers are what they were."""
    model, tape = build(MODELS[name]).to(torch.bfloat16), Tape(MODELS[name].n_layer, recompute)
    init_weights(model, 1)
    before, n = everything(model), len(model.blocks)
    assert try_graphs(model, 2, 40, recompute, tape) == ""
    assert tape.ran == 2 * list(range(2 * n)) and all("forward" in vars(block) for block in model.blocks)
    assert all(map(torch.equal, everything(model), before)) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "tape, error, reason",
    [
        (Idle, None, "they give other numbers with them"),
        (Refusing, Refusing.error, "a block cannot be recorded here: CUDA error: operation not permitted when stream is capturing"),
        (Refusing, torch.OutOfMemoryError("CUDA out of memory"), "too little memory"),
    ],
)
def test_graphs_that_do_not_work_are_not_used(monkeypatch, tape, error, reason):
    monkeypatch.setattr(Refusing, "error", error)
    model = build(MODELS["x070"])
    init_weights(model, 1)
    before = everything(model)
    assert try_graphs(model, 2, 40, recorder=tape(3)) == reason
    assert all(map(torch.equal, everything(model), before)) and not any("forward" in vars(block) for block in model.blocks)


def test_of_blocks_that_are_frozen_no_graphs_are_tried():
    model = build(MODELS["x070"])
    freeze(model, "blocks")
    assert try_graphs(model, 2, 40, recorder=Refusing(3)) == "nothing in them is trained"


@pytest.fixture
def taped(monkeypatch):
    """Runs of the trainer with tapes for graphs; the list of them."""
    made = []
    monkeypatch.setattr(plan, "decide_graphs", lambda config, *_: config.cuda_graphs)
    monkeypatch.setattr(graphs, "Recorder", lambda: made.append(Tape(2)) or made[-1])
    return made


@pytest.mark.parametrize(
    "flags",
    [
        dict(precision="bf16"),
        dict(accumulate_grad_batches=2, micro_bsz=2, freeze="emb,blocks.0.ffn"),
        dict(precision="bf16", accumulate_grad_batches=2, micro_bsz=2, grad_cp=1),
        dict(my_testing="phantom", ttt_chunk=16, precision="bf16"),
        dict(my_testing="x080", precision="bf16"),
    ],
    ids=["bf16", "accumulated", "accumulated bf16", "phantom", "x080"],
)
def test_a_run_has_the_bits_of_one_without_and_so_has_a_resumed_one(run, losses, records, taped, tmp_path, flags):
    flags = dict(flags, kernel="auto", max_steps=14)
    assert run(tmp_path / "eager", **flags) == 0 and not taped
    for name, stops in (("whole", [14]), ("parts", [6, 8])):
        for stop in stops:
            assert run(tmp_path / name, **flags | dict(cuda_graphs=1, max_steps=stop)) == 0
        assert losses(tmp_path / name) == losses(tmp_path / "eager")
        assert records(tmp_path / name, "val_loss").keys() == records(tmp_path / "eager", "val_loss").keys()
    last = (
        [torch.load(tmp_path / name / "rwkv-0.pth") for name in ("eager", "whole", "parts")]
        if (tmp_path / "eager" / "rwkv-0.pth").exists()
        else []
    )
    assert all(torch.equal(x, other[key]) for key, x in (last[0].items() if last else ()) for other in last[1:])
    passes = 14 * flags.get("accumulate_grad_batches", 1)
    assert len(taped) == 3 and sum(len(tape.ran) for tape in taped) == 2 * 4 * passes


@pytest.mark.parametrize("strategy", ["auto", "deepspeed_stage_2"])
def test_a_run_tries_them(run, losses, taped, tmp_path, monkeypatch, capsys, strategy):
    """And goes on without where they do not work."""
    flags = dict(precision="bf16", kernel="auto", max_steps=6, strategy=strategy)
    assert run(tmp_path / "eager", **flags) == 0
    assert run(tmp_path / "tried", **flags, cuda_graphs=-1) == 0
    assert len(taped) == 1 and len(taped[0].ran) == 2 * 4 + 4 * 6
    said = capsys.readouterr()
    assert ", blocks in CUDA graphs, " in said.out and "without CUDA graphs" not in said.err
    monkeypatch.setattr(graphs, "Recorder", lambda: Refusing(2))
    assert run(tmp_path / "refused", **flags, cuda_graphs=-1) == 0
    assert "the blocks run without CUDA graphs: a block cannot be recorded here: CUDA error" in capsys.readouterr().err
    assert losses(tmp_path / "tried") == losses(tmp_path / "refused") == losses(tmp_path / "eager")


def test_a_gpu_that_fails_when_they_are_tried_is_one_line(run, taped, tmp_path, monkeypatch, capsys):
    """Nothing on it works after an access to memory that is not there, also without graphs."""

    def broken(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(training, "try_graphs", broken)
    assert run(tmp_path / "out", kernel="auto", cuda_graphs=-1) == 2
    assert re.search(
        r"^error: --cuda_graphs -1: the GPU has failed while .*: an illegal memory access was encountered.*; use --cuda_graphs 0$",
        capsys.readouterr().err,
        re.M,
    )


@pytest.mark.parametrize(
    "found, change",
    [
        (-1, {}),
        (-1, dict(strategy="deepspeed_stage_2")),
        (-1, dict(n_layer=24, n_embd=1024)),
        (0, dict(n_layer=24, n_embd=2048)),  # does not wait for Python
        (-1, dict(n_layer=24, n_embd=2048, micro_bsz=2)),
        (0, dict(peak=None)),
        (0, dict(devices=2)),
        (0, dict(compile=1)),
        (0, dict(doc_reset=1)),
        (0, dict(strategy="deepspeed_stage_3")),
        (0, dict(kernel="torch")),
        (0, dict(accelerator="cpu")),
    ],
)
def test_where_they_are_tried(monkeypatch, found, change):
    given = (
        dict(
            strategy="auto",
            kernel="cuda",
            accelerator="gpu",
            devices=1,
            peak=989e12,
            n_layer=12,
            n_embd=768,
            micro_bsz=16,
            compile=0,
            doc_reset=0,
        )
        | change
    )
    monkeypatch.setattr(graphs, "peak_flops", lambda device: given["peak"])
    config = TrainConfig(cuda_graphs=-1, ctx_len=512, micro_bsz=given["micro_bsz"], compile=given["compile"], doc_reset=given["doc_reset"])
    model = ModelConfig(n_layer=given["n_layer"], n_embd=given["n_embd"], vocab_size=65536)
    assert decide_graphs(config, Launch(given["accelerator"], given["devices"], 1, given["strategy"]), model, given["kernel"]) == found


def check(kernel="cuda", strategy="auto", model=ModelConfig(n_layer=2, n_embd=64), **flags):
    check_graphs(TrainConfig(cuda_graphs=1, **flags), Launch("gpu", 1, 1, strategy), model, kernel)


def test_where_it_is_refused():
    """The others in test_bad_input.py."""
    check()
    check(strategy="deepspeed_stage_2")
    check(compile=1)
    check(compile=1, grad_cp=-1)  # which is then none: test_planner.py
    check(model=PhantomConfig(n_layer=2, n_embd=64))
    check(accumulate_grad_batches=2)
    check(model=PhantomConfig(n_layer=2, n_embd=64, ttt_enabled=False, ttt_meta=True))
    passes = dict(model=PhantomConfig(n_layer=2, n_embd=64, max_depth_iter=2), accumulate_grad_batches=2, precision="bf16")
    for change in (dict(accumulate_grad_batches=1), dict(precision="fp32"), dict(strategy="ddp")):
        check(**passes | change)
    with pytest.raises(UserError, match="--max_depth_iter 2 in bf16"):
        check(**passes)
    check_graphs(TrainConfig(), Launch("cpu", 1, 1, "auto"), ModelConfig(n_layer=2, n_embd=64), "torch")
    for refused, line in (
        (dict(kernel="torch"), "needs the CUDA kernels"),
        (dict(strategy="deepspeed_stage_3_offload"), "--strategy deepspeed_stage_3_offload, which"),
    ):
        with pytest.raises(UserError, match=line):
            check(**refused)


@pytest.mark.slow
def test_two_processes(forked, tmp_path, losses):
    """Two micro batches; in fp32 nothing but a copy keeps the first one's gradients from the second."""
    cases = [("ddp", "fp32"), ("ddp", "bf16"), ("deepspeed_stage_1", "fp32"), ("deepspeed_stage_2", "bf16")]
    flags = dict(devices=2, accumulate_grad_batches=2, micro_bsz=1, max_steps=8, kernel="auto", val_batches=1)
    jobs = []
    for strategy, precision in cases:
        for name, more in (("eager", {}), ("graphs", dict(tape=2))):
            own = dict(
                strategy=strategy,
                precision=precision,
                proj_dir=tmp_path / f"{strategy}-{precision}-{name}",
                cuda_graphs=int(name == "graphs"),
            )
            jobs.append((flags | own, more))
    done = forked(*jobs)
    assert [d["codes"] for d in done] == [[0, 0]] * len(jobs), json.dumps(done)[-3000:]
    assert ["blocks in CUDA graphs" in d["said"] for d in done] == [False, True] * len(cases)
    for strategy, precision in cases:
        eager, graphed = (tmp_path / f"{strategy}-{precision}-{name}" for name in ("eager", "graphs"))
        assert losses(graphed) == losses(eager) and len(losses(eager)) == 8
        assert (graphed / "taped").read_text() == "64"  # 2 blocks, both ways, 8 steps of 2
