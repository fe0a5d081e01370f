"""The training state in one process; several processes and DeepSpeed are in tests/train/test_strategy.py."""

import json
import os
import random
import resource
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from rwkvlm.checkpoint import ledger, state
from rwkvlm.checkpoint.shards import Piece, pieces, share
from rwkvlm.config import UserError
from rwkvlm.train.optimizer import MasterAdamW


class Toy(nn.Module):
    """Three groups as RWKV-7 has them, odd sizes, a buffer and a parameter that never gets a gradient."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(7, 5))
        self.w0 = nn.Parameter(torch.randn(1, 1, 5))
        self.gain = nn.Parameter(torch.randn(5))
        self.idle = nn.Parameter(torch.randn(3))
        self.register_buffer("unused", torch.randn(4))
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x @ self.matrix) * self.w0 + self.gain).float().square().mean() + 0 * torch.rand(())


def build(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Toy, torch.optim.Optimizer]:
    model = Toy(seed, dtype)
    groups = [
        {"params": [model.matrix], "weight_decay": 0.1, "lr": 1e-2},
        {"params": [model.w0], "weight_decay": 0.0, "lr": 2e-2},
        {"params": [model.gain, model.idle], "weight_decay": 0.0, "lr": 1e-2},
    ]
    kind = MasterAdamW if dtype == torch.bfloat16 else torch.optim.AdamW
    return model, kind(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-18)


def train(model: Toy, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        loss = model(torch.randn(3, 7).to(model.matrix.dtype))  # from the global random state, which the training state holds
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def saved(tmp_path):
    """States of steps 2 and 4, and the model and optimizer at step 4."""
    model, optimizer = build(0)
    for step in (2, 4):
        train(model, optimizer, 2)
        state.write(tmp_path, step, state.capture(model, optimizer), {"step": step}, keep_last=2)
    return tmp_path, model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_on_gives_the_same_bits(tmp_path, dtype):
    model, optimizer = build(0, dtype)
    train(model, optimizer, 3)
    torch.randn(1), random.gauss(0, 1), np.random.randn()  # each of the last two keeps a number for the next call
    meta = {"samples": 12, "nested": {"list": [1, 2.5, None], "10": 1, "9": 0}}
    path = state.write(tmp_path, 3, state.capture(model, optimizer), meta, keep_last=1)
    assert path == tmp_path / "state" / "step3" and (tmp_path / "state" / "latest").read_text() == "step3"
    train(model, optimizer, 3)
    draw = lambda: (torch.rand(2), random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand())
    after = draw()

    other, optimizer2 = build(9, dtype)
    info = state.find_state(tmp_path)
    assert (info.step, info.meta) == (3, meta)
    state.load_state(info, other, optimizer2)
    train(other, optimizer2, 3)
    assert same(model, other)
    assert all(np.array_equal(x, y) for x, y in zip(after, draw()))
    for p, q in zip(model.parameters(), other.parameters()):
        if p is not model.idle:
            assert optimizer.state[p]["step"] == optimizer2.state[q]["step"] == 6


def test_between_precisions_masters_survive(tmp_path):
    model, optimizer = build(0, torch.bfloat16)
    train(model, optimizer, 3)
    state.write(tmp_path, 3, state.capture(model, optimizer), {}, 1)
    other, optimizer2 = build(1)
    state.load_state(state.find_state(tmp_path), other, optimizer2)
    assert torch.equal(other.matrix, optimizer.state[model.matrix]["master"])
    assert torch.equal(optimizer2.state[other.w0]["exp_avg_sq"], optimizer.state[model.w0]["exp_avg_sq"])


def test_frozen_parameters_keep_their_values_and_thawed_ones_start_without_moments(tmp_path):
    model, optimizer = build(0)
    train(model, optimizer, 2)
    state.write(tmp_path, 2, state.capture(model, optimizer), {}, 1)
    frozen = Toy(1)
    frozen.matrix.requires_grad_(False)
    half = torch.optim.AdamW([frozen.w0, frozen.gain, frozen.idle])
    state.load_state(state.find_state(tmp_path), frozen, half)
    assert same(model, frozen)
    state.write(tmp_path, 3, state.capture(frozen, half), {}, 1)
    thawed, whole = build(2)
    train(thawed, whole, 1)  # moments that must go
    state.load_state(state.find_state(tmp_path), thawed, whole)
    assert same(model, thawed) and not whole.state[thawed.matrix]["exp_avg"].any() and whole.state[thawed.matrix]["step"] == 0
    assert torch.equal(whole.state[thawed.w0]["exp_avg"], optimizer.state[model.w0]["exp_avg"])


def test_a_counter_that_pieces_share_is_that_of_those_that_were_trained():
    """ZeRO counts once for a whole partition; what was frozen when the state was written brings 0."""
    flat = nn.Parameter(torch.zeros(6))
    counters = {}
    for start, step in ((0, 5.0), (4, 0.0)):
        piece = Piece("x", 0, 2, {"master": flat.detach()[start : start + 2]}, (torch.optim.AdamW([flat]), flat))
        assert state._copy({"start": 0, "step": step, "master": torch.ones(2)}, piece, counters) == 2
    assert [step for _, step in counters.values()] == [5.0] and flat.tolist() == [1, 1, 0, 0, 1, 1]


def test_random_numbers_go_on_at_the_same_number_of_processes_only(saved, monkeypatch):
    """Of more processes, those without a state of their own would all get one and the same."""
    folder, model, optimizer = saved
    for processes, same_numbers in ((1, True), (2, False)):
        monkeypatch.setattr(state.ranks, "together", lambda action: [action()])
        monkeypatch.setattr(state.ranks, "world_size", lambda: processes)
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        state.load_state(state.find_state(folder), model, optimizer)
        assert torch.equal(torch.rand(3), expected) != same_numbers


def test_the_loss_scaler_goes_on(tmp_path):
    """DeepSpeed's, of fp16."""
    model, optimizer = build(0)
    optimizer.loss_scaler = SimpleNamespace(cur_scale=512.0, cur_iter=70, last_overflow_iter=31, cur_hysteresis=1, raise_error=True)
    state.write(tmp_path, 1, state.capture(model, optimizer), {}, 1)
    other, optimizer2 = build(1)
    optimizer2.loss_scaler = SimpleNamespace(cur_scale=65536.0, cur_iter=0, last_overflow_iter=-1, cur_hysteresis=2, raise_error=False)
    state.load_state(state.find_state(tmp_path), other, optimizer2)
    assert vars(optimizer2.loss_scaler) == vars(optimizer.loss_scaler) | {"raise_error": False}


def test_the_newest_is_the_one_of_the_most_steps(saved):
    """Not the last of the names."""
    folder, model, optimizer = saved
    for step in (9, 10):
        state.write(folder, step, state.capture(model, optimizer), {"step": step}, keep_last=2)
    assert state.find_state(folder).path.name == "step10"


def test_a_state_of_a_later_format_is_not_read(saved, monkeypatch, capsys):
    folder, _, _ = saved
    monkeypatch.setattr(state, "FORMAT", state.FORMAT + 1)
    assert state.find_state(folder) is None and "manifest.json is not readable" in capsys.readouterr().err


def test_a_state_of_other_sizes_is_refused(saved):
    folder, _, _ = saved
    model, optimizer = build(1)
    model.gain = nn.Parameter(torch.zeros(6))
    with pytest.raises(UserError, match=r"gain of shape \[5\], the model \[6\]") as caught:
        state.load_state(state.find_state(folder), model, torch.optim.AdamW(model.parameters()))
    assert "\n" not in str(caught.value)
    model, optimizer = build(1)
    model.other = nn.Parameter(torch.zeros(2))
    with pytest.raises(UserError, match=r"other of shape none, the model \[2\]"):
        state.load_state(state.find_state(folder), model, optimizer)
    del model.other, model.idle
    with pytest.raises(UserError, match=r"idle of shape \[3\], the model none"):
        state.load_state(state.find_state(folder), model, optimizer)


def flip(folder):
    data = bytearray((folder / "rank00000.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "rank00000.pt").write_bytes(data)


def cut(folder):
    data = (folder / "rank00000.pt").read_bytes()
    (folder / "rank00000.pt").write_bytes(data[:-100])


def lose(folder):
    (folder / "rank00000.pt").unlink()


def lose_manifest(folder):
    (folder / "manifest.json").unlink()


def empty_manifest(folder):
    (folder / "manifest.json").write_text("")


def change_manifest(folder):
    text = (folder / "manifest.json").read_text()
    assert '"step": 4' in text
    (folder / "manifest.json").write_text(text.replace('"step": 4', '"step": 5'))


@pytest.mark.parametrize("damage", [flip, cut, lose, lose_manifest, empty_manifest, change_manifest])
def test_a_damaged_state_is_reported_and_the_one_before_used(saved, capsys, damage):
    folder, model, optimizer = saved
    damage(folder / "state" / "step4")
    info = intact(folder)
    assert info.step == 2 and info.meta == {"step": 2}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step4 is damaged" in said
    state.load_state(info, model, optimizer)
    train(model, optimizer, 1)
    state.write(folder, 3, state.capture(model, optimizer), {"step": 3}, keep_last=2)
    assert intact(folder).step == 3 and (folder / "state" / "latest").read_text() == "step3"
    assert (folder / "state" / "step4.damaged").is_dir(), "never deleted"
    damage(folder / "state" / "step3") if damage is not change_manifest else lose(folder / "state" / "step3")
    damage(folder / "state" / "step2") if damage is not change_manifest else lose(folder / "state" / "step2")
    assert intact(folder) is None


def intact(folder):
    """The newest state whose files are right, as train/plan.py looks for it."""
    damaged = []
    while (info := state.find_state(folder, damaged)) is not None and (problem := state.check(info)):
        state.say_damaged(info.path, problem)
        damaged.append(info.path)
    return info


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


@pytest.mark.parametrize("call", range(3))
@pytest.mark.parametrize("failure", [Killed, lambda: OSError(28, "No space left on device")])
def test_an_interrupted_save_never_costs_an_older_state(saved, monkeypatch, call, failure):
    """The save is stopped before its call-th rename: manifest, folder, latest."""
    folder, model, optimizer = saved
    train(model, optimizer, 1)
    calls, real = [], os.replace

    def replace(source, target):
        if len(calls) == call:
            raise failure()
        calls.append((source, target))
        real(source, target)

    monkeypatch.setattr("os.replace", replace)
    with pytest.raises((Killed, UserError)):
        state.write(folder, 5, state.capture(model, optimizer), {"step": 5}, keep_last=2)
    monkeypatch.undo()
    renamed = any(target.name == "step5" for _, target in calls)
    info = intact(folder)
    assert info.meta == {"step": 5 if renamed else 4}
    other, optimizer2 = build(9)
    state.load_state(info, other, optimizer2)
    if renamed:
        assert same(model, other)
    train(other, optimizer2, 2)
    state.write(folder, 7, state.capture(other, optimizer2), {"step": 7}, keep_last=2)
    assert state.find_state(folder).step == 7
    assert sorted(p.name for p in (folder / "state").iterdir()) == ["latest", f"step{5 if renamed else 4}", "step7"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_damaged_state_of_the_same_step_makes_room(saved, monkeypatch, call):
    """Also where the save is killed before its call-th rename: manifest, the damaged one away, folder."""
    folder, model, optimizer = saved
    cut(folder / "state" / "step4")
    calls, real = [], os.replace

    def replace(source, target):
        if len(calls) == call:
            raise Killed
        calls.append(target)
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("os.replace", replace)
        state.write(folder, 4, state.capture(model, optimizer), {"step": 4}, keep_last=2)
    assert intact(folder).step == 2
    state.write(folder, 4, state.capture(model, optimizer), {"step": 4, "new": True}, keep_last=2)
    assert intact(folder).meta == {"step": 4, "new": True}
    assert sorted(p.name for p in (folder / "state").iterdir()) == ["latest", "step2", "step4", "step4.damaged"]


@pytest.mark.parametrize("keep_last", [1, 3])
def test_old_states_are_deleted(tmp_path, keep_last):
    model, optimizer = build(0)
    for step in range(5):
        state.write(tmp_path, step, state.capture(model, optimizer), {}, keep_last)
    names = sorted(p.name for p in (tmp_path / "state").iterdir() if p.is_dir())
    assert names == [f"step{step}" for step in range(5 - keep_last, 5)]


def test_a_state_is_not_used_when_weights_were_replaced_and_is_set_aside(saved, capsys):
    folder, model, optimizer = saved
    ledger.publish_weights(folder, "rwkv-0.pth", model.state_dict())
    state.write(folder, 5, state.capture(model, optimizer), {}, 2)
    ledger.publish_weights(folder, "rwkv-1.pth", model.state_dict())
    assert state.find_state(folder).step == 5
    (folder / "rwkv-9.pth").write_bytes((folder / "rwkv-0.pth").read_bytes())
    assert state.find_state(folder) is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "rwkv-9.pth is newer" in said
    own = (folder / "state" / "weights.json").read_text()
    state.set_aside(folder)
    assert (folder / "state" / "weights.json").read_text() == own, "those files are still this run's"
    assert (folder / "state.aside-1" / "step5").is_dir() and "state.aside-1" in capsys.readouterr().err
    state.set_aside(folder)
    assert not (folder / "state.aside-2").exists(), "nothing is left to be set aside"
    state.write(folder, 1, state.capture(model, optimizer), {}, 2)
    assert state.find_state(folder).step == 1
    (folder / "rwkv-9.pth").unlink()
    assert state.find_state(folder) is None


def test_no_state(tmp_path):
    assert state.find_state(tmp_path) is None and state.find_state(tmp_path / "none") is None
    state.set_aside(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "state").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot save the training state") as caught:
        state.write(tmp_path, 1, state.capture(*build(0)), {}, 1)
    assert "\n" not in str(caught.value)


def test_a_state_has_its_name_when_it_is_on_the_disk_and_before_it_is_the_latest(tmp_path, monkeypatch):
    """Or a machine that loses its power may find a folder of empty files, and the state before it deleted."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        "os.fsync", lambda file: (done.append(os.path.relpath(os.readlink(f"/proc/self/fd/{file}"), tmp_path)), fsync(file))
    )
    monkeypatch.setattr(
        "os.replace", lambda source, target: (done.append(f"named {os.path.relpath(target, tmp_path)}"), replace(source, target))
    )
    state.write(tmp_path, 3, state.capture(*build(0)), {}, 1)
    named = done.index("named state/step3")
    assert "state/step3.tmp/rank00000.pt" in done[:named] and done[named + 1] == "state" and "named state/latest" in done[named + 2 :]


def test_a_full_disk_costs_nothing(saved):
    folder, model, optimizer = saved
    before = sorted(p for p in folder.rglob("*"))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))  # any larger file fails like on a full disk
    try:
        with pytest.raises(UserError, match="File too large") as caught:
            state.write(folder, 6, state.capture(model, optimizer), {}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert "\n" not in str(caught.value)
    assert sorted(p for p in folder.rglob("*")) == before and state.find_state(folder).step == 4


def test_no_room_for_the_pointer_is_no_room_for_the_state(saved, monkeypatch):
    """`latest` is written before the state becomes visible, so that a save which is told to have failed has left nothing."""
    folder, model, optimizer = saved
    before = sorted(path.name for path in (folder / "state").iterdir())
    real = open

    def full(file, *arguments, **how):
        if str(file).endswith("latest.tmp"):
            raise OSError(28, "No space left on device", str(file))
        return real(file, *arguments, **how)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(UserError, match="No space left on device"):
        state.write(folder, 9, state.capture(model, optimizer), {"step": 9}, keep_last=2)
    monkeypatch.undo()
    assert sorted(path.name for path in (folder / "state").iterdir()) == before and state.find_state(folder).step == 4


def test_remains_of_a_killed_save_do_not_fill_the_disk_for_ever(saved):
    folder, model, optimizer = saved
    remains = folder / "state" / "step9.tmp"
    remains.mkdir()
    (remains / "rank00000.pt").write_bytes(bytes(1000))
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        with pytest.raises(UserError, match="File too large"):
            state.write(folder, 6, state.capture(model, optimizer), {}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not remains.exists()


def test_a_snapshot_does_not_follow_the_model(tmp_path):
    model, optimizer = build(0)
    train(model, optimizer, 2)
    captured, before = state.capture(model, optimizer), {k: v.clone() for k, v in model.state_dict().items()}
    train(model, optimizer, 2)
    state.write(tmp_path, 2, captured, {}, 1)
    state.load_state(state.find_state(tmp_path), model, optimizer)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 100])
def test_ranks_share_what_all_keep_evenly_and_completely(world_size):
    sizes = {"a": 35, "b": 1, "c": 5, "d": 12}
    whole = {name: torch.randn(size) for name, size in sizes.items()}
    everywhere = [Piece(name, 0, size, {"value": whole[name]}, shared=True) for name, size in sizes.items()]
    found = {name: torch.full((size,), torch.nan) for name, size in sizes.items()}
    for rank in range(world_size):
        part = share(everywhere, rank, world_size)
        assert abs(sum(p.numel for p in part) - sum(sizes.values()) / world_size) < 1
        for p in part:
            assert found[p.name][p.start : p.start + p.numel].isnan().all(), "written twice"
            found[p.name][p.start : p.start + p.numel] = p.values["value"]
    assert all(torch.equal(found[name], whole[name]) for name in sizes)


def test_a_cut_counts_from_the_beginning_of_the_tensor():
    part = Piece("x", 10, 6, {"value": torch.arange(10, 16)}).cut(12, 99)
    assert (part.start, part.numel, part.values["value"].tolist()) == (12, 4, [12, 13, 14, 15])


def test_a_counter_keeps_its_kind():
    """DeepSpeed's CPU Adam hands it to C++ as a whole number."""
    tensor = torch.zeros(2)
    for counter in (3, torch.tensor(3.0)):
        adam = SimpleNamespace(state={tensor: {"step": counter, "exp_avg": tensor}})
        piece = Piece("x", 0, 2, {}, (adam, tensor))
        piece.set_step(7.0)
        assert piece.step == 7 and type(adam.state[tensor]["step"]) is type(counter)


def test_the_checksum_is_of_the_whole_file(tmp_path):
    """Which is read in pieces of 16 MiB."""
    data = random.randbytes((16 << 20) + 5)
    (tmp_path / "file").write_bytes(data)
    with open(tmp_path / "other", "wb") as file:
        written = state._Checked(file)
        written.write(data[:7]), written.write(data[7:])
    assert state._file_crc(tmp_path / "file") == written.crc == zlib.crc32(data)


def test_pieces_are_live_views():
    model, optimizer = build(0)
    piece = next(p for p in pieces(model, optimizer) if p.name == "matrix")
    piece.cut(2, 4).values["master"].fill_(3.0)
    assert model.matrix.detach().view(-1)[2:4].tolist() == [3.0, 3.0] and piece.step == 0


def test_the_manifest_is_plain_json(saved):
    folder, _, _ = saved
    content = json.loads((folder / "state" / "step4" / "manifest.json").read_text())["content"]
    assert content["shapes"]["w0"] == [1, 1, 5] and content["files"]["rank00000.pt"]["size"] > 0
