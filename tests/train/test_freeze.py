"""--freeze: which names a pattern means, and that what it names does not move; under ZeRO: test_processes.py."""

import pytest
import torch

from rwkvlm.checkpoint.pth import load_weights
from rwkvlm.config import ModelConfig, UserError
from rwkvlm.models import build
from rwkvlm.train.freeze import freeze, frozen_names

NAMES = ["emb.weight", "blocks.1.att.w0", "blocks.1.ffn.key.weight", "blocks.11.att.w0", "ln_out.weight", "head.weight"]


@pytest.mark.parametrize(
    "patterns, meant",
    [
        ("", set()),
        ("emb, head", {"emb.weight", "head.weight"}),
        ("blocks.1", {"blocks.1.att.w0", "blocks.1.ffn.key.weight"}),
        ("*.att.w0,head.weight", {"blocks.1.att.w0", "blocks.11.att.w0", "head.weight"}),
        ("blocks.*.ffn", {"blocks.1.ffn.key.weight"}),
    ],
)
def test_what_a_pattern_means(patterns, meant):
    assert frozen_names(patterns, NAMES) == meant


@pytest.mark.parametrize(
    "patterns, said",
    [("embed", "no parameter is called embed; names are like emb, head"), ("emb,w0", "called w0"), ("*", "leaves nothing to train")],
)
def test_what_it_cannot_mean(patterns, said):
    with pytest.raises(UserError, match=said.replace("*", r"\*")):
        frozen_names(patterns, NAMES)


def test_what_is_named_has_no_gradient_and_all_else_has():
    for patterns in ("emb,blocks.1", "ln_out,blocks.*.ln1", ""):
        model = build(ModelConfig(n_layer=2, n_embd=32, head_size=16, vocab_size=64))
        names = [name for name, _ in model.named_parameters()]
        freeze(model, patterns)
        assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen_names(patterns, names)


def moved(before, after) -> set[str]:
    a, b = load_weights(before), load_weights(after)
    return {name for name in a if not torch.equal(a[name], b[name])}


def check(whole, out, patterns) -> None:
    """Exactly what the patterns name stayed, of what moves in a run without them."""
    free = moved(whole / "rwkv-init.pth", whole / "rwkv-final.pth")
    frozen = frozen_names(patterns, list(load_weights(out / "rwkv-final.pth")))
    assert moved(out / "rwkv-init.pth", out / "rwkv-final.pth") == free - frozen and frozen & free


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parts_stay_and_have_no_optimizer_state(run, whole, losses, tmp_path, precision, capsys):
    flags = dict(freeze="emb,head,*.att.key", precision=precision)
    assert run(tmp_path / "a", **flags) == 0
    weights = load_weights(tmp_path / "a" / "rwkv-final.pth")
    share = sum(weights[name].numel() for name in frozen_names(flags["freeze"], list(weights)))
    assert f" M parameters, {share / 1e6:.6f} M of them frozen\n" in capsys.readouterr().out
    check(whole, tmp_path / "a", flags["freeze"])
    saved = torch.load(next((tmp_path / "a" / "state").glob("step30/rank*")))["tensors"]
    assert {name for name, entry in saved.items() if "exp_avg" not in entry} > {"emb.weight", "head.weight", "blocks.1.att.key.weight"}
    assert run(tmp_path / "b", **flags, max_steps=13) == 0 and run(tmp_path / "b", **flags) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b") and not moved(
        tmp_path / "a" / "rwkv-final.pth", tmp_path / "b" / "rwkv-final.pth"
    )


def test_a_resumed_run_says_that_other_parts_are_frozen(run, tmp_path, capsys):
    told = "--freeze is not given from here on, and emb before\n"
    assert run(tmp_path, freeze="emb", max_steps=2) == 0 and told not in capsys.readouterr().err
    assert run(tmp_path, max_steps=2) == 0 and told in capsys.readouterr().err
    assert run(tmp_path, max_steps=2) == 0 and "--freeze" not in capsys.readouterr().err
    assert run(tmp_path, freeze="head", max_steps=2) == 0
    assert "--freeze head from here on, and nothing was frozen before\n" in capsys.readouterr().err


def test_a_pattern_that_means_nothing_is_said_at_the_start(run, tmp_path, capsys):
    assert run(tmp_path / "out", freeze="heads") == 2
    assert capsys.readouterr() == (
        "",
        "error: --freeze heads: no parameter is called heads; names are like emb, head, ln_out, blocks.0, blocks.*.ffn, *.att.w0\n",
    )
    assert not (tmp_path / "out").exists(), "before anything is made"
