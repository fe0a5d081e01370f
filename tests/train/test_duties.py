"""Each duty around the steps by itself: what a second and a mean are made of, which samples validate, when and in which order is saved."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rwkvlm.config import ModelConfig, UserError
from rwkvlm.train import meter as measuring
from rwkvlm.train import saver as saving
from rwkvlm.train import validation as validating
from rwkvlm.train.flops import flops_per_token
from rwkvlm.train.meter import Meter
from rwkvlm.train.position import Position
from rwkvlm.train.saver import Saver
from rwkvlm.train.validation import Validation

SIZES = ModelConfig(n_layer=1, n_embd=32, vocab_size=50, head_size=32)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_tokens_a_second_are_those_of_the_steps_between_two_looks(clock, monkeypatch):
    """Of all devices; what a device reaches of its peak is its share. Validation takes no training time."""
    monkeypatch.setattr(measuring, "peak_flops", lambda device: 1e9)
    seen, closed = [], []
    log = SimpleNamespace(step=seen.append, validation=lambda record: None, mini_epoch=lambda *told: closed.append(told))
    plan = SimpleNamespace(
        launch=SimpleNamespace(device=torch.device("cpu")),
        config=SimpleNamespace(ctx_len=100),
        schedule=SimpleNamespace(tokens_per_step=1000),
        start=SimpleNamespace(model=SIZES),
    )
    position = Position(samples=70)
    meter = Meter(plan, position, SimpleNamespace(guarded=False, judge=lambda *_: {}), ["emb"], [log])

    def steps(losses):
        with monkeypatch.context() as patch:
            patch.setattr(Meter, "drain", lambda self: None)  # as on a GPU, where several steps are looked at together
            for loss in losses:
                position.advance(10)
                meter.step(torch.tensor(loss), {}, 1.0, torch.tensor([0.5]), 1e-3)

    steps([4.0, 3.0, torch.nan])
    meter.world = 2
    clock[0] += 6
    meter.drain()
    assert [record["tokens"] for record in seen] == [8000, 9000, 10000] and [record["step"] for record in seen] == [1, 2, 3]
    for record in seen:
        assert record["tokens_per_s"] == 500 and record["seconds"] == 6 and record["grad_norms"] == {"emb": 0.5}
        assert record["tflops"] == pytest.approx(250 * flops_per_token(SIZES, 100) / 1e12, rel=1e-3)
        assert record["mfu"] == pytest.approx(250 * flops_per_token(SIZES, 100) / 1e9, abs=1e-4) and record["mfu"] > 0.01
    meter.world = 1
    clock[0] += 50
    meter.validated(2.5)
    steps([2.0])
    clock[0] += 2
    meter.close_mini_epoch(4)
    meter.close_mini_epoch(5)
    assert seen[3]["tokens_per_s"] == 500 and len(seen) == 4
    assert closed[0] == (4, 3.0, 1e-3) and closed[1][0] == 5, "the mean of the finite losses"


class HeldOut:
    """Samples that say their number."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, ii):
        assert ii.min() >= 1 and ii.max() <= self.n
        return (torch.from_numpy(ii),)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("samples, batch, batches, stride", [(62, 4, 3, 5), (3, 3, 1, 1), (9, 4, 2, 1)])
def test_validation_reads_the_same_samples_for_any_number_of_devices(monkeypatch, world, samples, batch, batches, stride):
    """Evenly spread, each once, by a model that neither drops anything nor goes on doing so in training.

    The loss is the mean over batches.
    """
    plan = SimpleNamespace(held_out=HeldOut(samples), config=SimpleNamespace(micro_bsz=4, val_batches=3, val_every=0, dist_timeout=60))
    monkeypatch.setattr(validating.dist, "all_reduce", lambda total: None)
    total, read, ended = 0.0, [], []
    monkeypatch.setattr(
        validating, "Agreement", lambda timeout: SimpleNamespace(exchange=lambda *wishes: wishes, finish=lambda: ended.append(timeout))
    )
    for rank in range(world):
        model, passes = torch.nn.Dropout().train(), []

        def step(batch, _):
            assert not model.training
            passes.append(batch[0].tolist())
            return batch[0].double().mean()

        strategy = SimpleNamespace(model=model, root_device=torch.device("cpu"), validation_step=step)
        validation = Validation(plan, SimpleNamespace(global_rank=rank, world_size=world, strategy=strategy))
        total += validation.loss(lambda: 0)[0]
        assert model.training and len(passes) == -(-batches // world)
        assert ended == [60] * (rank + 1), "another process may need the last exchange"
        read += passes
    want = 1 + np.arange(batches * batch) * stride
    assert sorted({tuple(one) for one in read}) == [tuple(one) for one in want.reshape(batches, batch).tolist()]
    assert total == pytest.approx(want.mean())
    assert validation.due(7, True) and not validation.due(7, False)
    plan.config.val_every = 7
    assert validation.due(14, False) and not validation.due(15, True)


@pytest.fixture
def saver(monkeypatch, tmp_path):
    """A Saver whose files are entries of a list."""
    done, gate = [], threading.Event()
    monkeypatch.setattr(saving, "full_weights", lambda model: done.append("copied") or {})
    monkeypatch.setattr(saving, "publish_weights", lambda folder, name, tensors, group: (gate.wait(60), done.append(name)))
    monkeypatch.setattr(Saver, "_meta", lambda self: {})
    config = SimpleNamespace(proj_dir=tmp_path, dist_timeout=60, keep_last=1, save_minutes=2.0, save_steps=0)
    made = Saver(SimpleNamespace(config=config), Position(), None, None)
    yield made, done, gate
    gate.set()
    made.wait()


def test_one_save_is_under_way_at_most(saver):
    """The next one copies nothing before: host memory has room for one copy, and the files come in the order of the steps."""
    made, done, gate = saver
    made.save(["first"], state=False, last=False)
    assert done == ["copied"], "training goes on meanwhile"
    threading.Timer(0.2, gate.set).start()
    made.save(["second"], state=False, last=True)
    assert done == ["copied", "first", "copied", "second"]


def test_what_is_not_written_ends_the_run_only_where_it_was_the_last(saver, monkeypatch, capsys):
    made, _, _ = saver

    def full(*_):
        raise UserError("cannot write rwkv-0.pth: No space left on device")

    monkeypatch.setattr(saving, "publish_weights", full)
    made.save(["rwkv-0.pth"], state=False, last=False)
    made.wait()
    assert (
        capsys.readouterr().err == "cannot write rwkv-0.pth: No space left on device; training goes on, and older files are as they were\n"
    )
    with pytest.raises(UserError, match="No space left"):
        made.save(["rwkv-0.pth"], state=False, last=True)


def test_minutes_are_counted_from_the_last_time_they_were_over(clock, saver):
    made, _, _ = saver
    found = []
    for _ in range(8):
        clock[0] += 50
        found.append(made.minutes_due())
    assert found == [False, False, True, False, False, True, False, False]
    made.plan.config.save_minutes = 0.0
    assert not made.minutes_due()


def test_minutes_are_counted_by_the_first_process_alone(clock, saver, monkeypatch):
    """Another one's clock, which may be over a step later, would ask for a second save."""
    made, _, _ = saver
    clock[0] += 500
    monkeypatch.setattr(saving.ranks, "rank", lambda: 1)
    assert not made.minutes_due()
    monkeypatch.setattr(saving.ranks, "rank", lambda: 0)
    assert made.minutes_due()
