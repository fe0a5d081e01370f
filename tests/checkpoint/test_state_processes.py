"""What several processes must agree on: failures of one, damage to one's file, set-aside."""

import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rwkvlm.checkpoint import ranks, state
from rwkvlm.config import UserError


def processes(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    proj = Path(folder) / "out"
    torch.manual_seed(0)
    model = torch.nn.Linear(40, 40)
    torch.manual_seed(rank)  # random numbers of its own
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 40)).sum().backward()
    for step in (1, 2):
        optimizer.step()
        state.write(proj, step, state.capture(model, optimizer), {"step": step}, keep_last=2)

    with pytest.raises(UserError, match="file system that all nodes share"):
        state.write(proj if rank == 0 else Path(folder) / "elsewhere", 3, state.capture(model, optimizer), {"step": 3}, keep_last=1)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
    with pytest.raises(UserError, match=r"File too large.*\(rank 1\)"):
        state.write(proj, 3, state.capture(model, optimizer), {"step": 3}, keep_last=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert state.find_state(proj).step == 2
    ranks.gather(None)

    if rank == 0:
        file = proj / "state" / "step2" / "rank00001.pt"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 128
        file.write_bytes(data)
    ranks.gather(None)
    newest = state.find_state(proj)
    assert newest.step == 2 and state.check(newest) == "the checksum of rank00001.pt is wrong"  # read by one, known to all
    info = state.find_state(proj, [newest.path])
    assert info.step == 1 and state.check(info) == ""
    weight = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    state.load_state(info, model, optimizer)
    assert not torch.equal(model.weight, weight) and model.weight.any()
    assert all(s["step"] == 1 for s in optimizer.state.values())
    drawn = torch.rand(4)
    torch.manual_seed(rank)
    assert torch.equal(drawn, torch.rand(4))

    state.set_aside(proj)
    assert state.find_state(proj) is None and (proj / "state.aside-1" / "step1").is_dir()
    ranks.leave()


def test_processes_agree(tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    mp.spawn(processes, (2, str(tmp_path)), nprocs=2)


def test_a_thread_beside_the_training_speaks_in_its_own_group_alone(monkeypatch):
    """Or what it exchanges would be taken for what the training does, in an order that nobody knows."""
    asked = []
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(
        dist, "all_gather_object", lambda values, value, group: asked.append(group) or values.__setitem__(slice(None), [value, value])
    )
    assert ranks.gather(3, "its own") == [3, 3] and ranks.together(lambda: 4, "its own") == [4, 4] and asked == ["its own"] * 2


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("sys.stderr", Gone())
    monkeypatch.setenv("RANK", "0")
    ranks.say("a line")
