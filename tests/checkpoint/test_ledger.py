import os
import shutil

import pytest
import torch

from rwkvlm.checkpoint import ledger
from rwkvlm.checkpoint.pth import save_weights


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(5000, generator=torch.Generator().manual_seed(seed))}


def test_identity_follows_content_only(tmp_path):
    save_weights(tmp_path / "a.pth", weights(0))
    save_weights(tmp_path / "b.pth", weights(0))
    save_weights(tmp_path / "c.pth", weights(1))
    shutil.copy(tmp_path / "a.pth", tmp_path / "d.pth")
    torch.save({"x": weights(0)["x"].bfloat16()}, tmp_path / "e.pth")  # whose zip has a folder e
    a, b, c, d, e = (ledger.identity(tmp_path / f"{name}.pth") for name in "abcde")
    assert a == b == d == e != c and a
    (tmp_path / "c.pth").write_bytes(b"cut")
    assert ledger.identity(tmp_path / "c.pth") == "" == ledger.identity(tmp_path / "none.pth")


def test_own_newer_weights_do_not_make_a_state_stale(tmp_path):
    assert ledger.why_stale(tmp_path, ledger.newest_entry(tmp_path)) == ""
    recorded = ledger.newest_entry(tmp_path)
    ledger.publish_weights(tmp_path, "rwkv-init.pth", weights(0))
    assert ledger.why_stale(tmp_path, recorded) == ""
    for n in range(3):
        recorded = ledger.newest_entry(tmp_path)
        ledger.publish_weights(tmp_path, f"rwkv-{n}.pth", weights(n))
        ledger.publish_weights(tmp_path, "rwkv-final.pth", weights(n))
        assert ledger.why_stale(tmp_path, recorded) == ""
        assert ledger.why_stale(tmp_path, ledger.newest_entry(tmp_path)) == ""


def killed_before_rename(tmp_path, monkeypatch, seed):
    real = os.replace

    class Killed(BaseException):
        pass

    def kill(source, target):
        if str(target).endswith(".pth"):
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("os.replace", kill)
        ledger.publish_weights(tmp_path, "rwkv-1.pth", weights(seed))


def test_a_kill_between_ledger_and_rename_leaves_a_usable_state(tmp_path, monkeypatch):
    ledger.publish_weights(tmp_path, "rwkv-0.pth", weights(0))
    recorded = ledger.newest_entry(tmp_path)
    killed_before_rename(tmp_path, monkeypatch, 1)
    assert not (tmp_path / "rwkv-1.pth").exists()
    assert ledger.why_stale(tmp_path, recorded) == ""


def test_a_kill_between_ledger_and_rename_of_a_file_written_anew(tmp_path, monkeypatch):
    """A run that has gone on from before rwkv-1.pth, at another size, writes other bits: the first ones are still there, and its own."""
    ledger.publish_weights(tmp_path, "rwkv-0.pth", weights(0))
    recorded = ledger.newest_entry(tmp_path)
    ledger.publish_weights(tmp_path, "rwkv-1.pth", weights(1))
    killed_before_rename(tmp_path, monkeypatch, 2)
    assert ledger.identity(tmp_path / "rwkv-1.pth") and ledger.why_stale(tmp_path, recorded) == ""
    ledger.publish_weights(tmp_path, "rwkv-1.pth", weights(3))
    assert ledger.why_stale(tmp_path, recorded) == ""
    save_weights(tmp_path / "rwkv-1.pth", weights(2))  # never was there
    assert "rwkv-1.pth is newer" in ledger.why_stale(tmp_path, recorded)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_a_damaged_ledger_knows_no_file_and_is_written_anew(tmp_path, text):
    ledger.publish_weights(tmp_path, "rwkv-0.pth", weights(0))
    (tmp_path / "state" / "weights.json").write_text(text)
    assert ledger.why_stale(tmp_path, None) == "rwkv-0.pth is newer and was not written by this run"
    ledger.publish_weights(tmp_path, "rwkv-0.pth", weights(1))
    assert ledger.why_stale(tmp_path, None) == ""


def delete_newest(folder):
    (folder / "rwkv-1.pth").unlink()


def replace_newest(folder):
    save_weights(folder / "rwkv-1.pth", weights(7))


def add_newer(folder):
    save_weights(folder / "rwkv-5.pth", weights(7))


def replace_own_newer(folder):
    save_weights(folder / "rwkv-2.pth", weights(7))


@pytest.mark.parametrize(
    "change, reason",
    [
        (delete_newest, "is gone"),
        (replace_newest, "is not the file"),
        (add_newer, "rwkv-5.pth is newer"),
        (replace_own_newer, "rwkv-2.pth is newer"),
    ],
)
def test_weights_changed_by_hand_make_a_state_stale(tmp_path, change, reason):
    for n in range(2):
        ledger.publish_weights(tmp_path, f"rwkv-{n}.pth", weights(n))
    recorded = ledger.newest_entry(tmp_path)
    ledger.publish_weights(tmp_path, "rwkv-2.pth", weights(2))
    change(tmp_path)
    assert reason in ledger.why_stale(tmp_path, recorded)


@pytest.mark.parametrize("name, stale", [("rwkv-init.pth", True), ("rwkv-0.pth", True), ("rwkv-final.pth", False)])
def test_weights_put_there_where_none_were(tmp_path, name, stale):
    recorded = ledger.newest_entry(tmp_path)
    save_weights(tmp_path / name, weights(0))
    assert recorded is None and ledger.why_stale(tmp_path, recorded) == (
        f"{name} is newer and was not written by this run" if stale else ""
    )


def test_deleting_old_weights_or_touching_them_is_allowed(tmp_path):
    for n in range(3):
        ledger.publish_weights(tmp_path, f"rwkv-{n}.pth", weights(n))
    recorded = ledger.newest_entry(tmp_path)
    (tmp_path / "rwkv-0.pth").unlink()
    (tmp_path / "rwkv-2.pth").touch()
    assert ledger.why_stale(tmp_path, recorded) == ""


def test_no_damage_of_a_file_is_more_than_unreadable(tmp_path):
    """Python's reader of zip files raises errors of many kinds."""
    ledger.publish_weights(tmp_path, "rwkv-0.pth", {"x": torch.ones(1)})
    path = tmp_path / "rwkv-0.pth"
    whole = path.read_bytes()
    for at in range(whole.index(b"PK\x01\x02"), len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        assert isinstance(ledger.identity(path), str)


@pytest.mark.parametrize("name", ["rwkv-1.pth", "rwkv-2.pth", "rwkv-5.pth"])
def test_damaged_weights_cost_no_state(tmp_path, capsys, name):
    """Those that were saved with it, newer ones of the run, others: nobody can want the run to go on from them."""
    for n in range(2):
        ledger.publish_weights(tmp_path, f"rwkv-{n}.pth", weights(n))
    recorded = ledger.newest_entry(tmp_path)
    ledger.publish_weights(tmp_path, "rwkv-2.pth", weights(2))
    path = tmp_path / name
    whole = path.read_bytes() if path.exists() else b""
    path.write_bytes(whole[:-100])
    assert ledger.why_stale(tmp_path, recorded) == "" == ledger.why_stale(tmp_path, ledger.newest_entry(tmp_path))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == (
        f"checkpoint {path} is truncated or not a PyTorch weights file; copy or download it again; the training state does not need it"
    )
    later = ledger.newest_entry(tmp_path)
    if whole:  # the copy is put back
        path.write_bytes(whole)
        assert ledger.why_stale(tmp_path, recorded) == "" == ledger.why_stale(tmp_path, later)
    save_weights(path, weights(9))
    assert f"{name} is " in ledger.why_stale(tmp_path, recorded)
