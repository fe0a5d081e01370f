"""Export: the released form of an RWKV-7, with the logits of the model it comes from; what is no RWKV-7 is refused in one line."""

import os

import pytest
import torch

from rwkvlm.checkpoint.pth import load_weights, save_weights
from rwkvlm.cli import main
from rwkvlm.compress import compress_file
from rwkvlm.config import model_config
from rwkvlm.infer import load_engine
from rwkvlm.models import build, init_weights, read_config

SIZES = dict(n_layer=2, n_embd=64, vocab_size=256, head_size=32)
UNUSED = {"blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2"}


def save(path, **settings):
    """A model away from its initial values, where its outputs would be trivial."""
    model = build(model_config(**SIZES, **settings))
    init_weights(model, 0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
    save_weights(path, model.state_dict())
    return path


def export(path):
    assert main(["export", "--model", str(path), "--out", str(path.with_name("exported.pth"))]) == 0
    return path.with_name("exported.pth")


def logits(path):
    with torch.no_grad():
        return load_engine(path, device="cpu", dtype=torch.float32).model(torch.arange(40).view(1, -1) % 7)


@pytest.fixture
def plain(tmp_path):
    return save(tmp_path / "in.pth", model_type="x070")


def test_an_rwkv7_loses_what_nothing_reads_and_nothing_else(plain):
    before, after = load_weights(plain), load_weights(export(plain))
    assert after.keys() == before.keys() - UNUSED and UNUSED <= before.keys()
    matrices = [f"{name}.weight" for name in ("receptance", "key", "value", "output", "ln_x")] + ["ln_x.bias"]
    for i, value in enumerate(("", "v2 v1 v0 ")):  # in the order of the released files
        names = f"x_r x_w x_k x_v x_a x_g w0 r_k w1 w2 a1 a2 a0 g1 g2 {value}k_k k_a".split() + matrices
        assert [name.removeprefix(at) for name in after if name.startswith(at := f"blocks.{i}.att.")] == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert torch.equal(logits(plain), logits(plain.with_name("exported.pth")))


def test_shapes_become_the_official_ones(plain, tmp_path):
    before = load_weights(plain)
    torch.save({name: tensor.flatten() if tensor.dim() == 3 else tensor for name, tensor in before.items()}, tmp_path / "flat.pth")
    after = load_weights(export(tmp_path / "flat.pth"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("made", ["factors", "factors and fewer units", "ghosts", "ghosts of factors"])
def test_factors_and_ghosts_become_matrices(plain, tmp_path, made):
    path = tmp_path / "small.pth"
    if "ghosts" in made:
        path = save(path, model_type="phantom", core_ratio=0.5, ttt_enabled=False)
    if "factors" in made:
        source, path = (path, tmp_path / "smaller.pth") if "ghosts" in made else (plain, path)
        compress_file(source, path, svd_rank_ratio=0.5, sparsity_ratio=0.25 if "units" in made else 0)
    units = read_config(load_weights(path)).dim_ffn
    expected = {name: tensor.shape for name, tensor in load_weights(plain).items() if name not in UNUSED}
    expected |= {f"blocks.{i}.ffn.key.weight": (units, 64) for i in (0, 1)} | {f"blocks.{i}.ffn.value.weight": (64, units) for i in (0, 1)}
    assert {name: tensor.shape for name, tensor in load_weights(export(path)).items()} == expected
    assert read_config(load_weights(tmp_path / "exported.pth")).model_type == "x070"
    before, after = logits(path), logits(tmp_path / "exported.pth")
    assert before.std() > 0.1 and (before - after).abs().max() < 0.05 * before.std()  # products are rounded to bfloat16


@pytest.mark.parametrize(
    "settings, reason",
    [
        (dict(model_type="x040"), "holds an RWKV-4, whose files are as released ones are: programs for RWKV-4 take this one as it is"),
        (dict(model_type="hybrid"), "a model of type hybrid"),
        (dict(model_type="x080"), "a model of type x080"),
        (dict(model_type="phantom", core_ratio=1.0, ttt_chunk=16), "a Phantom with ttt_enabled True"),
        (dict(model_type="phantom", core_ratio=0.5, ttt_enabled=False, ghost_activation="relu"), "a Phantom with ghost_activation relu"),
        (dict(model_type="phantom", core_ratio=1.0, ttt_enabled=False, layer_norm_eps=1e-3), "a Phantom with layer_norm_eps 0.001"),
        (dict(model_type="phantom", core_ratio=1.0, ttt_enabled=False, max_depth_iter=2), "a Phantom with max_depth_iter 2"),
    ],
)
def test_what_is_no_rwkv7_is_refused(tmp_path, capsys, settings, reason):
    path = save(tmp_path / "in.pth", **settings)
    assert main(["export", "--model", str(path), "--out", str(tmp_path / "exported.pth")]) == 2
    assert reason in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in.pth"]


def test_the_model_itself_is_not_overwritten(plain, capsys):
    before = plain.read_bytes()
    assert main(["export", "--model", str(plain), "--out", str(plain)]) == 2
    assert "choose another name" in capsys.readouterr().err and plain.read_bytes() == before


COMMANDS = pytest.mark.parametrize("command", [["export"], ["compress", "--svd_rank_ratio", "0.5"]], ids=lambda command: command[0])


@COMMANDS
def test_the_tokenizer_goes_along(plain, tmp_path, command):
    out, own = tmp_path / "other" / "small.pth", plain.with_name("tokenizer.json")
    own.write_text('{"é": 1}', encoding="utf-8")
    for _ in range(2):
        assert main([*command, "--model", str(plain), "--out", str(out)]) == 0
        assert out.with_name("tokenizer.json").read_bytes() == own.read_bytes()


@COMMANDS
@pytest.mark.parametrize(
    "own, there, said",
    [
        (b"{}", b"[]", "the tokenizer of other models"),
        (None, b"[]", "the tokenizer of other models"),
        (b"\xff", b"[]", "cannot be read"),
        (b"{}", None, "other.pth would be read too"),
    ],
)
def test_no_model_is_read_with_the_tokenizer_of_others(plain, tmp_path, capsys, command, own, there, said):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "other.pth").touch()
    for place, text in ((tmp_path, own), (folder, there)):
        if text is not None:
            (place / "tokenizer.json").write_bytes(text)
    before = sorted(folder.iterdir())
    for model, answer in ((plain, said), (tmp_path / "gone.pth", "gone.pth")):
        assert main([*command, "--model", str(model), "--out", str(folder / "small.pth")]) == 2
        assert answer in (line := capsys.readouterr().err) and line.count("\n") == 1
        assert sorted(folder.iterdir()) == before


@COMMANDS
def test_a_link_is_replaced_by_a_model_with_its_tokenizer(plain, tmp_path, command):
    (there := tmp_path / "there").mkdir()
    (there / "old.pth").touch()
    for place in (tmp_path, there):
        (place / "tokenizer.json").write_text("{}")
    out = tmp_path / "here" / "small.pth"
    out.parent.mkdir()
    out.symlink_to(there / "old.pth")
    assert main([*command, "--model", str(plain), "--out", str(out)]) == 0
    assert not out.is_symlink() and out.with_name("tokenizer.json").read_text() == "{}"


@COMMANDS
def test_what_is_no_file_is_not_replaced(plain, tmp_path, capsys, command):
    os.mkfifo(pipe := tmp_path / "pipe")
    assert main([*command, "--model", str(plain), "--out", str(pipe)]) == 2
    assert "is no file; choose another name" in capsys.readouterr().err and pipe.is_fifo()
