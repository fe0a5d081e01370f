"""The official trainer's own model, loss, optimizer groups, callback and dataset beside ours: loss by loss and weight by weight.

Data and flags are the same. They are not part of this repository: RWKV_OFFICIAL_SRC names RWKV-v7/train_temp/src of a clone
of RWKV-LM; without it these tests are skipped. Its CUDA kernels are formulas here (tests/oracles/official_trainer.py), its
FusedAdam is torch's AdamW, and a loop stands for Lightning; its whole program beside ours: records/2026-11-27-official-trainer.
"""

import contextlib
import importlib
import io
import math
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from oracles import official_trainer
from rwkvlm import models
from rwkvlm.checkpoint.pth import ordered
from rwkvlm.config import ModelConfig, model_config
from rwkvlm.data.binidx import BinIdx
from rwkvlm.data.dataset import RankBatches, TrainingSamples
from rwkvlm.data.sampler import magic_prime
from rwkvlm.ops.cross_entropy import head_cross_entropy
from rwkvlm.train import matmul
from rwkvlm.train.schedule import Schedule

SRC = os.environ.get("RWKV_OFFICIAL_SRC", "")
pytestmark = pytest.mark.skipif(not SRC, reason="RWKV_OFFICIAL_SRC does not name the folder of the official sources")

EPOCH, BATCH, CTX, STEPS = 40, 4, 32, 25  # 10 steps a mini-epoch, the last one is cut short
SHAPE = dict(n_layer=3, n_embd=128, vocab_size=256, head_size=64)
RECIPE = dict(
    ctx_len=CTX, micro_bsz=BATCH, lr_init=6e-4, lr_final=6e-5, warmup_steps=10, beta1=0.9, beta2=0.99, adam_eps=1e-18, weight_decay=0.001,
    grad_clip=1.0, my_exit_tokens=STEPS * BATCH * CTX, epoch_save=1,
)  # fmt: skip
ENVIRONMENT = dict(
    RWKV_MY_TESTING="x070",
    RWKV_KERNEL="",
    RWKV_CTXLEN=str(CTX),
    RWKV_HEAD_SIZE="64",
    RWKV_HEAD_L2WRAP_CE_CHUNK="0",
    RWKV_FLOAT_MODE="bf16",
    RWKV_JIT_ON="1",
)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """official.model, official.trainer, official.dataset: modules of a copy of that folder.

    Its mini-epoch has EPOCH samples, and it lacks "bf16 only".
    """
    folder = tmp_path_factory.mktemp("official")
    official_trainer.prepared(SRC, folder, EPOCH, any_dtype=True)
    package = types.ModuleType("official_training")
    package.__path__ = [str(folder / "src")]
    sys.modules["official_training"] = package
    with official_trainer.operators():
        os.environ |= ENVIRONMENT
        yield SimpleNamespace(**{name: importlib.import_module(f"official_training.{name}") for name in ("model", "trainer", "dataset")})
    for name in [name for name in sys.modules if name.startswith("official_training")]:
        del sys.modules[name]


def their_args(proj_dir, data, **changed):
    args = SHAPE | RECIPE | dict(
        proj_dir=str(proj_dir), data_file=data, data_type="binidx", my_testing="x070", train_stage=3, load_model="", epoch_begin=0,
        grad_cp=0, accelerator="cpu", strategy="ddp", betas=(0.9, 0.99), real_bsz=BATCH, epoch_steps=EPOCH // BATCH, epoch_count=3,
        wandb="", my_timestamp="now", dim_att=SHAPE["n_embd"], dim_ffn=int(3.5 * SHAPE["n_embd"]) // 32 * 32,
        magic_prime=magic_prime(BinIdx(data).n_tokens, CTX),
    ) | changed  # fmt: skip
    return SimpleNamespace(**args)


def initial(official, args):
    """What their --train_stage 1 writes."""
    with contextlib.redirect_stdout(io.StringIO()):
        return official.model.RWKV(args).generate_init_weight()


def their_optimizer(model, trainer):
    model._trainer = trainer
    with contextlib.redirect_stdout(io.StringIO()):
        return model.configure_optimizers()


def their_run(official, args, weights, dtype=torch.float64):
    """What Lightning does with their parts, in its order. Returns the model, and loss, lr and wd of each step."""
    model, steps = official.model.RWKV(args).to(dtype), []
    model.load_state_dict(weights)
    callback, dataset = official.trainer.train_callback(args), official.dataset.MyDataset(args)
    callback.log = lambda *told, **how: None
    trainer = SimpleNamespace(global_step=0, current_epoch=0, is_global_zero=True, global_rank=0, world_size=1, strategy=None)
    trainer.train_dataloader = SimpleNamespace(dataset=SimpleNamespace(datasets=dataset))
    optimizer = their_optimizer(model, trainer)
    trainer.optimizers = [optimizer]
    try:
        while True:
            callback.on_train_epoch_start(trainer, model)
            for i in range(args.epoch_steps):
                batch = [torch.stack(part) for part in zip(*(dataset[i * args.micro_bsz + k] for k in range(args.micro_bsz)))]
                callback.on_train_batch_start(trainer, model, batch, i)
                loss = step(optimizer, model, lambda: model.training_step(batch, i))
                trainer.global_step += 1
                trainer.my_loss_all = torch.tensor([loss])
                callback.on_train_batch_end(trainer, model, None, batch, i)
                steps.append((loss, trainer.my_lr, trainer.my_wd))
            callback.on_train_epoch_end(trainer, model)
            trainer.current_epoch += 1
    except SystemExit:
        return model, steps


def step(optimizer, model, loss_of):
    """One optimizer step; returns the loss before it."""
    loss = loss_of()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE["grad_clip"])
    optimizer.step()
    return loss.item()


def our_run_in_float64(data, weights, model):
    """The parts of ours that know float64: model, head and loss, groups, schedule, samples.

    Returns the model, and loss and lr of each step.
    """
    model.double().load_state_dict(weights)
    optimizer = torch.optim.AdamW(models.param_groups(model, RECIPE["weight_decay"]), betas=(0.9, 0.99), eps=RECIPE["adam_eps"])
    schedule = Schedule(RECIPE["lr_init"], RECIPE["lr_final"], RECIPE["warmup_steps"], RECIPE["my_exit_tokens"], BATCH * CTX)
    samples, steps = TrainingSamples(data, CTX, magic_prime(BinIdx(data).n_tokens, CTX)), []
    for n, ii in enumerate(RankBatches(0, 1, BATCH, schedule.steps_left(0))):
        idx, targets = samples[ii]
        lr = schedule.lr(n * BATCH * CTX, n)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["my_lr_scale"]
        steps.append((step(optimizer, model, lambda: head_cross_entropy(model.features(idx), model.head.weight, targets)), lr))
    return model, steps


@pytest.fixture(scope="module")
def beginning(official, data, tmp_path_factory):
    """bf16 weights, as an official rwkv-init.pth has them."""
    torch.manual_seed(1)
    return initial(official, their_args("", data))


@pytest.fixture(scope="module")
def theirs(official, data, beginning, tmp_path_factory):
    """theirs[dtype]: model, steps, and the folder of their run."""
    torch.set_num_threads(1)
    found = {}
    for dtype in (torch.float64, torch.float32):
        folder = tmp_path_factory.mktemp("theirs")
        found[dtype] = *their_run(official, their_args(folder, data), beginning, dtype), folder
    return found


def difference(steps, losses):
    """The largest one of two runs' losses."""
    assert len(steps) == len(losses)
    return max(abs(each[0] - loss) for each, loss in zip(steps, losses))


def weights_of(folder, step):
    """The fp32 weights of a training state of ours, flat."""
    return {
        name: entry["master"]
        for name, entry in torch.load(folder / "state" / f"step{step}" / "rank00000.pt")["tensors"].items()
        if "master" in entry
    }


RANDOM = ("emb.weight", "head.weight", "receptance.weight", "key.weight", "value.weight", "att.w2", "att.a2", "att.v2", "att.g2")


@pytest.mark.parametrize("vocab_size", [300, 96])
def test_initial_values(official, data, vocab_size):
    """Above and below the width, which the head's initial size depends on. What is not random has the same bits."""
    torch.manual_seed(2)
    theirs = initial(official, their_args("", data, vocab_size=vocab_size))
    model = models.build(ModelConfig(**SHAPE | {"vocab_size": vocab_size}))
    models.init_weights(model, 1)
    ours = {name: x.bfloat16() for name, x in model.state_dict().items()}
    assert {name: x.shape for name, x in theirs.items()} == {name: x.shape for name, x in ours.items()}
    drawn = {name for name in ours if name.endswith(RANDOM) and theirs[name].any()}
    assert len(drawn) == 2 + 8 * SHAPE["n_layer"]
    for name in ours:
        a, b = theirs[name].float(), ours[name].float()
        if name not in drawn:
            assert a.equal(b), name  # in all digits of bf16
        elif name == "emb.weight":
            assert a.abs().max() == b.abs().max() == torch.tensor(1e-4).bfloat16() and a.std().item() == pytest.approx(
                b.std().item(), rel=0.02
            )
        else:
            assert torch.allclose(torch.linalg.svdvals(a), torch.linalg.svdvals(b), rtol=0.01), name
            assert not torch.allclose(a, b, atol=0.1 * a.std().item()), f"{name} is not random"


@pytest.mark.parametrize("weight_decay", [0.001, 0.0])
def test_groups(official, data, weight_decay):
    """Which parameters decay, and which learn at twice the rate."""
    args = their_args("", data, weight_decay=weight_decay)
    model = official.model.RWKV(args)
    names = {p: name for name, p in model.named_parameters()}
    groups = their_optimizer(model, SimpleNamespace(is_global_zero=True, strategy=None)).param_groups
    theirs = {names[p]: (group["my_lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    groups = models.param_groups(models.build(ModelConfig(**SHAPE)), weight_decay)
    ours = {name: (group["my_lr_scale"], group["weight_decay"]) for group in groups for name in group["names"]}
    unused = {f"blocks.0.att.v{i}": (1.0, 0.0) for i in range(3)}  # nothing trains them, there or here
    assert ours | unused == theirs


def test_each_loss_and_weight_in_float64(data, beginning, theirs):
    """Mathematically the two are the same: 25 steps differ by nothing but the rounding of float64."""
    model, steps, _ = theirs[torch.float64]
    ours, our_steps = our_run_in_float64(data, beginning, models.build(ModelConfig(**SHAPE)))
    assert steps[0][0] - steps[-1][0] > 1  # it has learned something
    weights, found = ours.state_dict(), difference(steps, [loss for loss, _ in our_steps])
    print(f"losses: {found:.1e}; weights: {max((x - weights[name]).abs().max().item() for name, x in model.state_dict().items()):.1e}")
    assert found < 1e-10
    assert all(lr == pytest.approx(each[1], rel=1e-14) for (_, lr), each in zip(our_steps, steps))
    for name, weight in model.state_dict().items():
        assert (weight - beginning[name]).abs().max() > 1e-3 or name.startswith("blocks.0.att.v"), f"{name} has not moved"
        assert (weight - weights[name]).abs().max() < 1e-9, name


def test_a_whole_run_in_fp32(run, losses, records, beginning, theirs, tmp_path, monkeypatch):
    """train.py as it is: no farther from their run in float64 than a few times what their own run in fp32 is.

    Theirs differs by rounding alone. With the matrix products of both computed in one way: ours takes the faster of two where
    they are measured, and the other one's rounding moved these weights seven times as far. The one in 200,000 that is farthest does
    not count: where a gradient is so close to 0 that rounding decides its sign, its weight goes either way, since Adam's eps is 1e-18
    (on a processor without AVX-512 one weight alone made it six times as far).
    """
    monkeypatch.delenv("RWKV_FP32_PRODUCTS", raising=False)  # what a run for other files' tests has handed on
    monkeypatch.setattr(matmul, "fp32_matmul_choice", lambda: ("highest", "not measured"))
    exact, steps, _ = theirs[torch.float64]
    rounded, rounded_steps, folder = theirs[torch.float32]
    out = tmp_path / "out"
    out.mkdir()
    torch.save(beginning, out / "rwkv-init.pth")
    assert run(out, **SHAPE, **RECIPE, epoch_samples=EPOCH, kernel="") == 0
    rounding, found = difference(steps, [each[0] for each in rounded_steps]), difference(steps, losses(out))
    exact, rounded, ours = exact.state_dict(), rounded.state_dict(), weights_of(out, STEPS)

    def apart(weights):
        squares = torch.cat([(weights[name].flatten() - x.flatten()).square() for name, x in exact.items() if name in ours])
        return math.sqrt(squares.sort()[0][: len(squares) - len(squares) // 200_000].sum().item())

    moved = apart(beginning)
    print(
        f"losses: rounding {rounding:.1e}, ours {found:.1e}; "
        f"weights: rounding {apart(rounded) / moved:.1e}, ours {apart(ours) / moved:.1e} of the way"
    )
    assert rounding < 1e-4 and found < 4 * rounding
    assert apart(rounded) < 1e-2 * moved and apart(ours) < 4 * apart(rounded)
    assert [record["lr"] for record in records(out).values()] == pytest.approx([each[1] for each in steps], rel=1e-14)
    assert {each[2] for each in steps} == {RECIPE["weight_decay"]}

    assert {path.name for path in folder.glob("*.pth")} | {"rwkv-init.pth"} == {path.name for path in out.glob("*.pth")}
    ours, theirs = ((place / "train_log.txt").read_text().splitlines() for place in (out, folder))
    # ours has a line of the last mini-epoch, cut short
    assert ours[0].startswith("NEW RUN ") and theirs[0].startswith("NEW RUN ") and len(theirs) == 4 and len(ours) == 5
    for line, their_line in zip(ours[2:4], theirs[2:]):
        a, b = line.split(), their_line.split()
        assert len(a) == len(b) == 7 and [a[i] for i in (0, 3, 6)] == [b[i] for i in (0, 3, 6)]
        assert float(a[1]) == pytest.approx(float(b[1]), abs=2e-5) and float(a[2]) == pytest.approx(float(b[2]), rel=1e-4)


@pytest.mark.parametrize("whose", ["theirs", "ours"])
def test_going_on_with_a_file(official, run, records, data, beginning, theirs, tmp_path, whose):
    """rwkv-0.pth of either, continued by both: mini-epoch 1 begins at the same sample, with a warm-up of its own."""
    out = tmp_path / "out"
    out.mkdir()
    torch.save(beginning, out / "rwkv-init.pth")
    if whose == "theirs":
        begun = theirs[torch.float32][2]
    else:
        assert run(out, **SHAPE, **RECIPE, epoch_samples=EPOCH, max_steps=EPOCH // BATCH) == 0
        begun = out.rename(tmp_path / "begun")
        out.mkdir()
    (out / "rwkv-0.pth").write_bytes((begun / "rwkv-0.pth").read_bytes())
    weights = torch.load(out / "rwkv-0.pth")
    assert list(weights) == list(beginning)  # in the same order, which some readers rely on
    _, steps = their_run(official, their_args(tmp_path, data, epoch_begin=1), weights)
    assert run(out, **SHAPE, **RECIPE, epoch_samples=EPOCH) == 0
    found = records(out)
    assert sorted(found) == list(range(11, STEPS + 1)) and difference(steps, [found[n]["loss"] for n in sorted(found)]) < 1e-4
    assert [found[n]["lr"] for n in sorted(found)] == pytest.approx([each[1] for each in steps], rel=1e-14)


SHAPE_4 = dict(n_layer=2, n_embd=64, vocab_size=256)
ENVIRONMENT_4 = dict(RWKV_MY_TESTING="", RWKV_T_MAX=str(CTX), RWKV_FLOAT_MODE="fp32", RWKV_JIT_ON="0")


@pytest.fixture
def official_4():
    """RWKV-4's module model.py, of RWKV-v4neo in the same clone; everything in float64."""
    found = types.ModuleType("official_rwkv4")
    with official_trainer.operators():
        os.environ |= ENVIRONMENT_4
        exec(
            compile((Path(SRC).parents[2] / "RWKV-v4neo" / "src" / "model.py").read_text(), "RWKV-v4neo/src/model.py", "exec"), vars(found)
        )
        torch.set_default_dtype(torch.float64)
        yield found
        torch.set_default_dtype(torch.float32)


def test_rwkv4_in_float64(official_4, data):
    """Initial values, groups, and each loss and weight of 25 steps.

    Its schedule is not that of RWKV-7's trainer, which is ours for both: the rates here are ours.
    """
    args = SimpleNamespace(
        **SHAPE_4, **RECIPE, betas=(0.9, 0.99), dim_att=64, dim_ffn=256, pre_ffn=0, my_pos_emb=0, tiny_att_dim=-1, tiny_att_layer=-1,
        dropout=0, head_qk=0, layerwise_lr=1, my_pile_stage=3, my_qa_mask=0, grad_cp=0, accelerator="cpu",
    )  # fmt: skip
    model = official_4.RWKV(args)
    with contextlib.redirect_stdout(io.StringIO()):
        model.load_state_dict(model.generate_init_weight())
    ours = models.build(model_config("x040", **SHAPE_4))
    models.init_weights(ours, 1)
    theirs = model.state_dict()
    assert list(theirs) == ordered(ours.state_dict())
    for name, x in ours.state_dict().items():
        if name.endswith(("emb.weight", "value.weight", "key.weight", "head.weight")) and x.any():
            assert x.std().item() == pytest.approx(theirs[name].std().item(), rel=0.03), name
        else:
            assert x.float().allclose(theirs[name].float(), rtol=1e-6, atol=1e-7), name

    beginning = {name: x.clone() for name, x in theirs.items()}
    our_model, our_steps = our_run_in_float64(data, beginning, ours)
    names = {p: name for name, p in model.named_parameters()}
    optimizer = their_optimizer(model, SimpleNamespace(is_global_zero=True, strategy=None))
    found = {names[p]: (group["my_lr_scale"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert found == {
        name: (group["my_lr_scale"], group["weight_decay"]) for group in models.param_groups(ours, 0.001) for name in group["names"]
    }
    samples = TrainingSamples(data, CTX, magic_prime(BinIdx(data).n_tokens, CTX))
    for (loss, lr), ii in zip(our_steps, RankBatches(0, 1, BATCH, STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["my_lr_scale"]
        their_loss = step(optimizer, model, lambda: model.training_step(samples[ii], 0))
        assert their_loss == pytest.approx(loss, abs=1e-10)
    for name, x in our_model.state_dict().items():
        assert (x - beginning[name]).abs().max() > 1e-3, f"{name} has not moved"
        assert (x - model.state_dict()[name]).abs().max() < 1e-9, name
