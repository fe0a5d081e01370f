"""Generation: the loop against the whole-sequence model, and the command line as a user meets it."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves

from rwkvlm.checkpoint.pth import save_weights
from rwkvlm.cli import generate as command
from rwkvlm.config import ModelConfig, PhantomConfig, UserError, model_config
from rwkvlm.data.tokenizer import load_tokenizer
from rwkvlm.infer import engine as engine_module
from rwkvlm.infer import load_engine
from rwkvlm.infer.engine import Engine
from rwkvlm.models import build, init_weights

PROMPT = "def first(x):\n    return"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Small, over the real vocabulary, with weights that make every token's logits depend on the tokens before."""
    model = build(ModelConfig(n_layer=2, n_embd=64, vocab_size=65536, head_size=32))
    init_weights(model, 3)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
    path = tmp_path_factory.mktemp("engine") / "rwkv-final.pth"
    save_weights(path, model.state_dict())
    return path


@pytest.fixture(scope="module")
def engine(checkpoint):
    return load_engine(checkpoint, device="cpu")


def test_likeliest_tokens_are_those_of_the_whole_sequence(engine):
    """Token by token with a state == the model run over everything so far, at every step."""
    got = list(engine.tokens(PROMPT, 12, temperature=0))
    assert len(got) == 12
    ids = engine.tokenizer.encode(PROMPT)
    with torch.no_grad():
        for token in got:
            logits = engine.model(torch.tensor([ids]))[0, -1]
            assert logits[token] > logits.max() - 1e-4
            ids.append(token)


def test_a_long_prompt_is_read_whole(engine, monkeypatch):
    ids = engine.tokenizer.encode(PROMPT * 5)
    whole, _ = engine.read(ids)
    monkeypatch.setattr(engine_module, "PREFILL", 7)
    pieces, _ = engine.read(ids)
    assert (whole - pieces).abs().max() < 1e-4 * whole.abs().max()
    shorter, _ = engine.read(ids[1:])
    assert (whole - shorter).abs().max() > 1e-2, "the first token must matter"


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("x070", {}),
        ("x040", {}),
        ("hybrid", {"attention_layers": "1", "attention_window": 8}),
        ("x080", {}),
        ("phantom", {}),
        ("phantom", {"ttt_kind": "memory"}),
    ],
)
def test_a_state_holds_no_more_memory_than_its_numbers(kind, settings):
    model = build(model_config(kind, n_layer=2, n_embd=64, vocab_size=256, **settings))
    init_weights(model, 0)
    with torch.inference_mode():
        _, state = model.features(torch.arange(200)[None], return_state=True)
    tensors = [t for t in tree_leaves(state) if t is not None]
    assert tensors and all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


def test_a_model_that_was_being_trained_drops_nothing_when_it_reads():
    model = build(PhantomConfig(n_layer=1, n_embd=32, vocab_size=60, head_size=32, core_ratio=1.0, ttt_enabled=False, dropout=0.5))
    init_weights(model, 0)
    torch.nn.init.normal_(model.blocks[0].ffn.value.weight)
    engine = Engine(model.train(), tokenizer=None)
    assert torch.equal(engine.read([1, 2, 3])[0], engine.read([1, 2, 3])[0])


def test_seed_decides_the_text(engine):
    first, again, other = ("".join(engine.generate(PROMPT, 20, seed=s)) for s in (1, 1, 2))
    assert first == again != other


def test_any_63_bits_are_a_seed(engine):
    for seed in (0, -(1 << 63), (1 << 63) - 1):
        assert engine.generator(seed).initial_seed() in (seed, seed + (1 << 64))
    for seed in (-(1 << 63) - 1, 1 << 63):
        with pytest.raises(UserError, match=f"--seed {seed} has more than 63 bits"):
            engine.generator(seed)


def test_pieces_join_to_the_decoded_tokens(engine):
    tokens = list(engine.tokens(PROMPT, 30, seed=5))
    assert "".join(engine.generate(PROMPT, 30, seed=5)) == load_tokenizer("world").decode(tokens)
    assert [*engine.text(iter(load_tokenizer("world").encode("a中".encode()[:-1])))] == ["a", "\ufffd"]


def test_stops_at_the_end_of_the_document(checkpoint):
    ending = load_engine(checkpoint, device="cpu")
    with torch.no_grad():
        ending.model.head.weight[0] = 100 * torch.sign(ending.read([1])[0].new_ones(64))
        ending.model.ln_out.bias.fill_(1.0)
    assert list(ending.tokens(PROMPT, 10, temperature=0)) == []


def test_empty_prompt_starts_a_document(engine):
    assert len(list(engine.tokens("", 3, seed=0))) == 3


def test_vocabulary_too_small_for_the_prompt(tmp_path):
    model = build(ModelConfig(n_layer=1, n_embd=32, vocab_size=98, head_size=32))
    init_weights(model, 0)
    save_weights(tmp_path / "m.pth", model.state_dict())
    engine = load_engine(tmp_path / "m.pth", device="cpu")
    for text, largest in (("b", 99), ("`a", 98)):  # the token of a byte is its number + 1
        with pytest.raises(UserError, match=f"the text has token {largest}, but the model's vocabulary has 98"):
            engine.tokens(text, 3)
    for tokens, unknown in (([1, 98], 98), ([-1, 1], -1)):
        with pytest.raises(UserError, match=f"the text has token {unknown}, but the model's vocabulary has 98"):
            engine.tokens(tokens, 3)
    assert engine.encode("`") == [97]


def test_command_line(checkpoint, capsys):
    argv = [
        "--model",
        str(checkpoint),
        "--prompt",
        "def ",
        "--length",
        "8",
        "--temperature",
        "0.8",
        "--top_p",
        "0.5",
        "--seed",
        "1",
        "--device",
        "cpu",
    ]
    assert command.main(argv) == 0
    first = capsys.readouterr().out
    assert first.startswith("def ") and len(first) > len("def \n")
    assert command.main(argv) == 0
    assert capsys.readouterr().out == first


def test_what_is_built_is_built_before_the_text(checkpoint, capsys, monkeypatch):
    """A first build tells of itself on the terminal: not between two tokens."""
    monkeypatch.setattr(engine_module.rwkv7_step, "why_not", lambda: print("building") or "not here")
    assert command.main(["--model", str(checkpoint), "--prompt", "def ", "--length", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("building\ndef ")


def test_a_text_that_ends_early_is_told(checkpoint, capsys, monkeypatch):
    """Otherwise an empty sample looks like a fault."""
    argv = ["--model", str(checkpoint), "--prompt", "def ", "--length", "3", "--device", "cpu"]
    assert command.main(argv) == 0
    assert "ended" not in capsys.readouterr().err
    chosen = iter([110, 0])
    monkeypatch.setattr("rwkvlm.infer.engine.sample", lambda *_: next(chosen))
    assert command.main(argv) == 0
    out, err = capsys.readouterr()
    assert out == "def m\n" and err.startswith("[the model ended the text after 1 of 3 tokens, ")


def test_text_that_the_terminal_cannot_show(checkpoint):
    argv = ["generate", "--model", str(checkpoint), "--prompt", "def \u00fc", "--length", "1", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "rwkvlm", *argv], env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.startswith("def ?"), done.stderr


@pytest.mark.parametrize(
    "argv,word",
    [
        (["--model", "nowhere.pth"], "nowhere.pth"),
        (["--model", ""], "checkpoint . is a folder"),
        (["--model", "/"], "checkpoint / is a folder"),
        (["--temperature", "-1"], "--temperature"),
        (["--top_p", "2"], "--top_p"),
        (["--length", "-1"], "--length -1 must be at least 0"),
        (["--seed", str(1 << 70)], "--seed 1180591620717411303424 has more than 63 bits"),
        (["--device", "cuda:99"], "--device cuda:99 is not known here.*choose one of: auto, cpu"),
        (["--device", "meta"], "--device meta is not known here"),
    ],
    ids=str,
)
def test_bad_input_names_what_is_wrong(checkpoint, capsys, argv, word):
    with pytest.raises(UserError, match=word):
        command.main(["--model", str(checkpoint), "--device", "cpu", "--prompt", "def ", *argv])
    assert capsys.readouterr().out == "", "an error does not stand behind the prompt"


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_that_gives_no_numbers_is_named(tmp_path, temperature):
    model = build(ModelConfig(n_layer=1, n_embd=32, vocab_size=300, head_size=32))
    init_weights(model, 0)
    with torch.no_grad():
        model.ln_out.weight[3] = float("nan")
    save_weights(tmp_path / "m.pth", model.state_dict())
    with pytest.raises(UserError, match="logits are not finite numbers.*earlier checkpoint"):
        list(load_engine(tmp_path / "m.pth", device="cpu").tokens("", 3, temperature=temperature))
