"""Numbers that are not finite, and loss spikes: injected, noticed, skipped or undone, told, and the end of a run that has no hope."""

import json
import re
import weakref
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkvlm.checkpoint.pth import load_weights
from rwkvlm.data.dataset import TrainingSamples
from rwkvlm.data.sampler import magic_prime
from rwkvlm.train import health as watching
from rwkvlm.train.health import Health
from rwkvlm.train.module import TrainModule
from rwkvlm.train.optimizer import MasterAdamW
from rwkvlm.train.position import Position

loss_of = TrainModule.loss


def nan_loss(*samples):
    """The loss is NaN when one of these samples is in the batch; loss_of is what it was."""

    def inject(self, batch):
        known = torch.stack([self.plan.samples[ii][0] for ii in samples])
        hit = (batch[0].unsqueeze(1) == known.to(batch[0].device)).all(-1).any()
        cross_entropy, terms = loss_of(self, batch)
        return cross_entropy * (torch.nan if hit and self.training else 1.0), terms

    return inject


def moments(out: Path) -> dict:
    return torch.load(next((out / "state").glob("step*/rank00000.pt")))["tensors"]


@pytest.mark.parametrize(
    "flags",
    [
        dict(precision="fp32"),
        dict(precision="bf16"),
        dict(precision="fp32", accumulate_grad_batches=2, micro_bsz=2),
        pytest.param(dict(precision="bf16", accumulate_grad_batches=2, micro_bsz=2, kernel="auto", compile=1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_step_that_is_not_finite_changes_nothing(run, losses, records, tmp_path, monkeypatch, capsys, flags):
    """Sample 18 belongs to step 5: weights and Adam's moments after it are bit for bit those before it."""
    assert run(tmp_path / "out", **flags, max_steps=4) == 0
    before = moments(tmp_path / "out")
    monkeypatch.setattr(TrainModule, "loss", nan_loss(18))
    assert run(tmp_path / "out", **flags, max_steps=1, keep_last=1) == 0
    after = moments(tmp_path / "out")
    for name, entry in before.items():
        assert all(torch.equal(torch.as_tensor(entry[key]), torch.as_tensor(after[name][key])) for key in entry), name
    said = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert said == ["step 5 is skipped: loss nan, gradient norm nan; samples 17 to 20 are lost; 1 in a row, 1 in all"]
    record = records(tmp_path / "out", "skipped")[5]
    assert record["skipped"] is True and record["loss"] is None and record["grad_norm"] is None
    assert run(tmp_path / "out", **flags) == 0  # and then it goes on
    assert list(records(tmp_path / "out", "skipped")) == [5]
    assert records(tmp_path / "out")[30]["loss"] < 4.7


def test_a_gradient_alone_is_enough_and_its_part_is_named(run, records, tmp_path, monkeypatch, capsys):
    """The loss is finite; the gradient of one parameter has an infinity, in one micro batch of two."""
    hooked = TrainModule.watch_gradients

    def watch(self):
        hooked(self)
        calls = iter(range(10**6))
        self.model.blocks[1].ffn.key.weight.register_hook(lambda grad: grad * (torch.inf if next(calls) == 7 else 1))

    monkeypatch.setattr(TrainModule, "watch_gradients", watch)
    assert run(tmp_path / "out", accumulate_grad_batches=2, micro_bsz=2, max_steps=6) == 0
    assert re.search(r"step 4 is skipped: loss 5\.\d+, gradient norm (inf|nan) \(ffn\); samples 13 to 16 are lost", capsys.readouterr().err)
    found = records(tmp_path / "out")
    assert [step for step in found if found[step].get("skipped")] == [4]
    assert all(torch.isfinite(entry["master"]).all() for entry in moments(tmp_path / "out").values() if "master" in entry)


def test_the_mean_of_a_mini_epoch_leaves_skipped_steps_out(run, losses, records, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainModule, "loss", nan_loss(6, 18))
    assert run(tmp_path / "out", max_steps=10) == 0
    line = next(line for line in (tmp_path / "out" / "train_log.txt").read_text().splitlines() if line.startswith("0 "))
    finite = [r["loss"] for r in records(tmp_path / "out").values() if r["loss"] is not None]
    assert len(finite) == 8 and float(line.split()[1]) == pytest.approx(sum(finite) / 8, abs=1e-6)


def test_a_mini_epoch_without_a_finite_step_has_no_mean(run, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainModule, "loss", nan_loss(*range(1, 41, 4)))
    assert run(tmp_path / "out", max_steps=12, max_skips=11) == 0
    line = next(line for line in (tmp_path / "out" / "train_log.txt").read_text().splitlines() if line.startswith("0 "))
    assert line.split()[1:3] == ["nan", "nan"]


def test_a_run_without_hope_ends_with_the_chunk_that_does_it(run, tmp_path, monkeypatch, capsys):
    """Every step from 11 on holds one bad sample: three are skipped, then the run ends and says which sample, chunk and parameters."""
    bad = list(range(42, 120, 4))
    monkeypatch.setattr(TrainModule, "loss", nan_loss(*bad))
    assert run(tmp_path / "out", max_skips=3) == 2
    err = capsys.readouterr().err.splitlines()
    samples = TrainingSamples(run.data, 32, magic_prime(20000, 32))
    assert err[-1].startswith(
        "error: 3 steps in a row were skipped or undone (--max_skips 3), the last one step 13: 1 of its 4 samples do this alone: "
    )
    assert f"50 ({samples.where(50)})" in err[-1] and "the loss of sample 50 is nan; gradients of " in err[-1]
    assert "in emb, ln, att, ffn, head, are not: emb.weight, blocks.0.ln0.weight" in err[-1]
    assert (tmp_path / "out" / "state" / "latest").read_text() == "step10"  # from before
    monkeypatch.undo()
    assert run(tmp_path / "out") == 0  # the cause being gone, it goes on


@pytest.mark.parametrize("flags, step", [(dict(max_skips=5), 14), (dict(max_steps=13), 13)], ids=["hopeless", "last step"])
def test_weights_that_are_not_finite_are_never_saved_and_are_the_diagnosis(run, tmp_path, monkeypatch, capsys, flags, step):
    real = Position.advance

    def advance(self, samples):
        real(self, samples)
        if self.step == 12:
            with torch.no_grad():
                found[0].model.blocks[1].att.w0[0, 0, 3] = torch.nan

    found = []
    attach = TrainModule.attach
    monkeypatch.setattr(TrainModule, "attach", lambda self, model: (found.append(self), attach(self, model)) and None)
    monkeypatch.setattr(Position, "advance", advance)
    assert run(tmp_path / "out", save_steps=7, **flags) == 2
    err = capsys.readouterr().err
    assert f"nothing is saved at step {step}: the weights are not finite" in err and "the training state is saved" not in err
    assert "the weights themselves are not finite (blocks.1.att.w0): go on from an older training state" in err
    assert (tmp_path / "out" / "state" / "latest").read_text() == "step7"


def test_the_spike_guard_goes_back_and_leaves_the_samples_out(run, spoilt, records, tmp_path, capsys):
    """Step 71 reads noise. Its update is taken back: what follows equals going on from step 70 with the samples after it."""
    flags = dict(data_file=spoilt, my_exit_tokens=80 * 128, epoch_save=0, val_every=1000, save_steps=70, keep_last=5)
    guarded = flags | dict(spike_guard=3, spike_snapshot=10)
    assert run(tmp_path / "out", **guarded) == 0
    err = capsys.readouterr().err
    assert re.search(
        r"step 71 is undone, back to the weights of step 70: its loss \d\.\d+ is \d+\.\d standard deviations above \d\.\d+; "
        r"samples 281 to 284 are lost",
        err,
    ), err
    found = records(tmp_path / "out")
    assert [step for step in found if "undone_to" in found[step]] == [71] and found[71]["undone_to"] == 70 and max(found) == 80
    assert found[72]["loss"] < found[71]["loss"] - 0.3
    # without the guard, from the state of step 70 with its position moved past the bad step
    other = tmp_path / "other"
    assert run(other, **flags, max_steps=70) == 0
    manifest = other / "state" / "step70" / "manifest.json"
    sealed = json.loads(manifest.read_text())
    for key, more in (("step", 1), ("samples", 4), ("warmup_step", 1)):
        sealed["content"]["meta"]["position"][key] += more
    sealed["crc32"] = zlib.crc32(json.dumps(sealed["content"], sort_keys=True).encode())
    manifest.write_text(json.dumps(sealed))
    assert run(other, **flags) == 0
    rest = records(other)
    assert [rest[step]["loss"] for step in range(72, 81)] == [found[step]["loss"] for step in range(72, 81)]
    a, b = (load_weights(folder / "rwkv-final.pth") for folder in (tmp_path / "out", other))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_without_the_guard_nothing_is_undone_and_with_it_a_quiet_run_is_the_same(run, whole, losses, tmp_path):
    assert run(tmp_path / "out", spike_guard=6, spike_snapshot=5) == 0
    assert losses(tmp_path / "out") == losses(whole)


class Plan:
    """What Health needs of a plan."""

    def __init__(self, **flags) -> None:
        from rwkvlm.config import TrainConfig

        self.config, self.batch = TrainConfig(spike_guard=6, spike_snapshot=10, **flags), 4


def watched(steps, **flags):
    """Health over a list of losses, on one weight that counts the steps; yields what it said and the weight."""
    weight = torch.nn.Parameter(torch.zeros(1))
    model = torch.nn.Module()
    model.weight = weight
    optimizer, position = torch.optim.AdamW([weight], fused=True), Position()
    health = Health(Plan(**flags), position, model, optimizer)
    for loss in steps:
        position.advance(4)
        with torch.no_grad():
            weight += 1
        said = health.judge(position.step, position.samples, loss, 1.0, None)
        health.keep()
        yield position.step, said, weight.item(), health


def test_a_spike_after_a_spike_goes_to_the_snapshot_before():
    rng = np.random.default_rng(0)
    curve = [3 + 0.05 * x for x in rng.standard_normal(65)] + [9.0, 9.0, 9.0]
    *_, first, second, third = watched(curve)
    assert [said["undone_to"] for _, said, _, _ in (first, second, third)] == [60, 50, 50]
    assert [weight for _, _, weight, _ in (first, second, third)] == [60, 50, 50]
    assert third[3].in_a_row == 3 and third[3].position.undone == 3


def test_two_snapshots_are_in_memory_at_most(monkeypatch):
    """Also while a third one is being made."""
    alive, most = weakref.WeakSet(), []

    class Counted(watching.Snapshot):
        def __init__(self, *args) -> None:
            alive.add(self)
            most.append(len(alive))
            super().__init__(*args)

    monkeypatch.setattr(watching, "Snapshot", Counted)
    for _ in watched([3.0] * 60):
        pass
    assert most == [1] + [2] * 6


def test_no_spike_while_the_loss_falls_fast_or_before_the_window():
    fast = [11 * 0.97**step + 2 for step in range(200)]
    assert not any(said for _, said, _, _ in watched(fast))
    assert not any(said for _, said, _, _ in watched([3.0] * 20 + [9.0] + [3.0] * 20))


def test_a_level_that_stays_higher_is_a_hopeless_run():
    rng = np.random.default_rng(0)
    curve = [3 + 0.05 * x for x in rng.standard_normal(60)] + [9.0] * 4
    assert [health.hopeless for _, _, _, health in watched(curve, max_skips=4)][-4:] == [False, False, False, True]


def test_in_a_row_means_without_a_good_step_between():
    assert [health.in_a_row for _, _, _, health in watched([3.0, np.nan, np.nan, 3.0, np.nan, 3.0])] == [0, 1, 2, 0, 1, 0]


def test_a_hopeless_run_stays_so_until_all_processes_know_it():
    """They learn it a step later, which may be a good one: it must not make the error say that 0 steps were skipped."""
    found = [(health.hopeless, health.in_a_row) for _, _, _, health in watched([3.0, np.nan, np.nan, 3.0, 3.0], max_skips=2)]
    assert found == [(False, 0), (False, 1), (True, 2), (True, 2), (True, 2)]


def test_what_hardly_varies_may_deviate_by_a_hundredth_of_its_mean():
    """The standard deviation of a constant is 0, and 3.1 no spike after many times 3.0."""
    found = [said for _, said, _, _ in watched([3.0] * 60 + [3.1, 3.5])]
    assert not any(found[:-1]) and "undone_to" in found[-1]


def test_a_loss_scale_that_is_looked_for_is_not_illness():
    """fp16: a gradient that overflows while the loss is finite is how DeepSpeed finds its scale.

    A loss that is not finite is ill there too.
    """
    ((_, _, _, health),) = watched([3.0], precision="fp16")
    assert health.judge(2, 8, 3.0, np.inf, None) == {"skipped": True} and (health.in_a_row, health.position.skipped) == (0, 0)
    assert health.judge(3, 12, np.nan, np.inf, None) == {"skipped": True} and (health.in_a_row, health.position.skipped) == (1, 1)


def test_a_snapshot_brings_back_masters_and_the_weights_that_are_made_of_them():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3, bias=False).bfloat16()
    optimizer = MasterAdamW(model.parameters(), lr=0.1, betas=(0.9, 0.99), eps=1e-18)

    def train(steps):
        for _ in range(steps):
            model(torch.ones(2, 4, dtype=torch.bfloat16)).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [model.weight.detach().clone(), *(torch.as_tensor(value).clone() for value in optimizer.state[model.weight].values())]

    before = train(3)
    snapshot = watching.Snapshot(Position(step=3), model, optimizer)
    after = train(2)
    snapshot.restore(model, optimizer)
    found = train(0)
    assert (
        len(found) == 5
        and all(torch.equal(a, b) for a, b in zip(found, before))
        and not any(torch.equal(a, b) for a, b in zip(after, before))
    )
    assert all(torch.equal(a, b) for a, b in zip(train(2), after))
