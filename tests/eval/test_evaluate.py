"""Evaluation against independent computations: plain float64 loops over the model's logits, and a model whose answers are known."""

import json
import math
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from rwkvlm.checkpoint.pth import save_weights
from rwkvlm.cli import evaluate as command
from rwkvlm.config import ModelConfig, UserError
from rwkvlm.data.binidx import BinIdxWriter
from rwkvlm.data.tokenizer import load_tokenizer
from rwkvlm.eval import lambada, score, text_loss
from rwkvlm.eval.harness import Answers
from rwkvlm.infer import Engine
from rwkvlm.models import build, init_weights

WORLD = load_tokenizer("world")
VOCAB = 40000  # the ids of the texts below are smaller
TEXTS = ["The cat sat on the mat, and it slept.", "One.", "", "so it goes on and on, " * 9]


@pytest.fixture(scope="module")
def engine():
    """In float64, with weights that make each token's logits depend on the tokens before."""
    model = build(ModelConfig(n_layer=2, n_embd=32, vocab_size=VOCAB, head_size=16))
    init_weights(model, 3)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5).bfloat16())
    tokenizer = SimpleNamespace(
        encode=WORLD.encode, decode_bytes=WORLD.decode_bytes, stream=WORLD.stream, vocab_size=VOCAB, largest_text=0, settled=WORLD.settled
    )
    tokenizer.comes_back = WORLD.comes_back
    return Engine(model.double(), tokenizer)


@pytest.fixture
def jsonl(tmp_path):
    def write(texts=TEXTS):
        path = tmp_path / "texts.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return str(path)

    return write


def by_loop(engine, row):
    """-log p of each token but the first, and whether it is the likeliest: the whole sequence at once, a plain loop over its logits."""
    with torch.no_grad():
        logits = engine.model(torch.tensor([row]))[0]
    at = range(1, len(row))
    return [math.log(sum(math.exp(v) for v in logits[t - 1].tolist())) - logits[t - 1, row[t]].item() for t in at], [
        int(logits[t - 1].argmax()) == row[t] for t in at
    ]


def test_documents_one_by_one(engine, jsonl):
    rows = [[0, *WORLD.encode(text)] for text in TEXTS]
    losses = [nats for row in rows for nats in by_loop(engine, row)[0]]
    found = text_loss(engine, jsonl())
    assert (found["documents"], found["tokens"], found["bytes"]) == (4, len(losses), sum(len(text.encode()) for text in TEXTS))
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / found["bytes"], rel=1e-9)
    spans = found["loss_by_tokens_read"]
    assert [span["from"] for span in spans] == [1, 2, 4, 8, 16, 32, 64] and sum(span["tokens"] for span in spans) == len(losses)
    third = [nats for row in rows for nats in by_loop(engine, row)[0][3:7]]
    assert spans[2]["loss"] == pytest.approx(sum(third) / len(third), rel=1e-9), "4 to 7 tokens have been read"


def test_windows_are_those_of_training(engine, jsonl):
    stream = [token for text in TEXTS for token in [*WORLD.encode(text), 0]]
    losses = [nats for at in range(0, len(stream) - 1, 7) for nats in by_loop(engine, stream[at : at + 8])[0]]
    found = text_loss(engine, jsonl(), ctx_len=7)
    assert found["tokens"] == len(losses) == len(stream) - 1
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert found["bytes"] == sum(map(len, TEXTS)) - len("The")


def test_the_same_for_any_batch_and_window_of_a_short_text(engine, jsonl, monkeypatch):
    path = jsonl()
    want = text_loss(engine, path, batch=1)
    for batch, at_once in ((2, 8192), (8, 8192), (3, 12), (1, 5)):
        monkeypatch.setattr(score, "READ_AT_ONCE", at_once)  # long documents are read in pieces, with their state
        monkeypatch.setattr("rwkvlm.eval.loss.AHEAD", 64 if batch == 8 else 1)  # rows that are put in order together
        found = text_loss(engine, path, batch=batch)
        assert found["loss"] == pytest.approx(want["loss"], rel=1e-12) and found["tokens"] == want["tokens"]
    one = jsonl(TEXTS[:1])
    short, long = (text_loss(engine, one, ctx_len=ctx_len)["perplexity"] for ctx_len in (100, 100000))
    assert short == long, "a window that holds all of the text"
    assert text_loss(engine, jsonl(), limit=2)["documents"] == 2


def test_a_text_that_the_tokenizer_does_not_keep_is_told_once(engine, jsonl, capsys, monkeypatch):
    text_loss(engine, jsonl())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text: WORLD.encode(text[1:]))  # as a vocabulary of characters that lacks some
    text_loss(engine, jsonl())
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and ", line 1: the text does not come back from its tokens; the figures are of what " in told


def test_tokens_of_a_pair_are_measured_as_their_text(engine, jsonl, tmp_path, monkeypatch):
    monkeypatch.setattr("rwkvlm.eval.text.PART", 4)  # tokens whose bytes are counted together
    with BinIdxWriter(tmp_path / "pair") as writer:
        for text in TEXTS:
            writer.add([*WORLD.encode(text), 0])
    for ctx_len in (0, 7):
        pair, text = (text_loss(engine, source, ctx_len) for source in (str(tmp_path / "pair"), jsonl()))
        assert {**pair, "data": ""} == {**text, "data": ""}
    engine.tokenizer.vocab_size = VOCAB + 1
    try:
        assert text_loss(engine, str(tmp_path / "pair"))["bits_per_byte"] is None, "nobody knows the bytes of another tokenizer's tokens"
    finally:
        engine.tokenizer.vocab_size = VOCAB


def test_a_document_of_tokens_need_not_end_with_0(engine, tmp_path):
    tokens = WORLD.encode(TEXTS[0])
    for name, end in (("with", [0]), ("without", [])):
        with BinIdxWriter(tmp_path / name) as writer:
            writer.add([*tokens, *end])
    found = [text_loss(engine, str(tmp_path / name)) for name in ("with", "without")]
    assert found[1] == {**found[0], "data": str(tmp_path / "without")} and found[1]["tokens"] == len(tokens)


def test_an_empty_document_changes_nothing(engine, tmp_path):
    found = {}
    for name, before in (("without", []), ("with", [np.empty(0, np.uint16)])):
        with BinIdxWriter(tmp_path / name, np.uint16) as writer:
            for tokens in (*before, np.array([*WORLD.encode(TEXTS[0]), 0], np.uint16)):
                writer.add(tokens)
        found[name] = {ctx_len: text_loss(engine, str(tmp_path / name), ctx_len) for ctx_len in (0, 7)}
    for ctx_len, want in found["without"].items():
        assert found["with"][ctx_len] == {**want, "data": str(tmp_path / "with"), "documents": 2}


def test_a_txt_is_one_document_in_parts(engine, tmp_path, monkeypatch):
    path = tmp_path / "long.txt"
    path.write_text(TEXTS[3] * 3)
    whole = text_loss(engine, str(path))
    monkeypatch.setattr("rwkvlm.data.documents.BLOCK", 50)
    assert text_loss(engine, str(path)) == whole and whole["documents"] == 1 and whole["bytes"] == len(TEXTS[3]) * 3


class Known:
    """Predicts with probability 0.8 the token that follows in a cycle of 5, the others with 0.05 each."""

    def __init__(self):
        weight = torch.full((5, 5), 0.05, dtype=torch.float64)
        for token in range(5):
            weight[(token + 1) % 5, token] = 0.8
        self.head = torch.nn.Linear(5, 5, bias=False, dtype=torch.float64)
        self.head.weight.data = weight.log()
        self.emb = self.head
        self.config = SimpleNamespace(vocab_size=5, model_type="known")
        self.read = 0

    def eval(self):
        return self

    def features(self, idx, state=None, return_state=False):
        self.read += idx.numel()
        x = torch.nn.functional.one_hot(idx, 5).double()
        return (x, idx[:, -1]) if return_state else x


class Letters:
    """A letter a token: a 1, b 2, c 3, the space 4; the end of a document is 0."""

    vocab_size = 5

    def encode(self, text):
        return ["abc ".index(letter) + 1 for letter in (text if isinstance(text, str) else text.decode())]

    def decode_bytes(self, ids):
        return b"?" * len(ids)

    def stream(self):
        return SimpleNamespace(push=lambda token: "abc "[token - 1], finish=lambda: "")


@pytest.fixture
def known():
    return Engine(Known(), Letters())


def test_lambada_of_known_answers(known, jsonl):
    """After c comes the space (0.8), after it 0 is likely and a is not (0.05), after a comes b."""
    path = jsonl(["abc ab", "abc b", "aab a"])  # " ab": 0.8 0.05 0.8; " b": 0.8 0.05; " a" after b: 0.05 0.05
    words = [0.8 * 0.05 * 0.8, 0.8 * 0.05, 0.05 * 0.05]
    for batch in (1, 2, 8):
        found = lambada(known, path, batch)
        assert found["perplexity"] == pytest.approx(math.exp(-sum(map(math.log, words)) / 3)) and found["accuracy"] == 0.0
    known.model.head.weight.data[1, 4], known.model.head.weight.data[0, 4] = math.log(0.8), math.log(0.05)  # now a follows the space
    found = lambada(known, path)
    assert found["accuracy"] == pytest.approx(1 / 3), "all tokens of ' ab' are the likeliest, of the others not all"
    assert lambada(known, path, limit=1)["accuracy"] == 1.0


def test_continuations_against_the_loop(engine, monkeypatch):
    """Contexts of many lengths, some shared, continuations of several lengths, in any batch."""
    generator = np.random.default_rng(0)
    contexts = [[0, *generator.integers(1, VOCAB, n)] for n in (0, 5, 15, 16, 20, 40)]
    pairs = [
        (list(map(int, contexts[n])), generator.integers(1, VOCAB, size).tolist())
        for n, size in zip([0, 1, 2, 3, 4, 5, 4, 4, 5, 0], [1, 3, 2, 2, 1, 4, 5, 2, 1, 2])
    ]
    with torch.no_grad():
        pairs.append((pairs[3][0], [int(engine.model(torch.tensor([pairs[3][0]]))[0, -1].argmax())]))
    want = []
    for context, continuation in pairs:
        nats, likeliest = by_loop(engine, context + continuation)
        want.append((-sum(nats[len(context) - 1 :]), all(likeliest[len(context) - 1 :])))
    assert want[-1][1] and not want[0][1]
    for batch, at_once in ((1, 8192), (3, 8192), (64, 8192), (3, 12)):
        monkeypatch.setattr(score, "READ_AT_ONCE", at_once)  # contexts and what follows them are read in pieces, with their state
        found = score.continuations(engine, pairs, batch)
        assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in want]
        assert [value for value, _ in found] == pytest.approx([value for value, _ in want], rel=1e-9)


def test_a_shared_context_is_read_once(known):
    context = [0] + [1] * 100
    score.continuations(known, [(context, [n]) for n in range(4)], 8)
    assert known.model.read < 100 + 4 * (score.STEP + 1)


def asked(*args):
    return SimpleNamespace(args=args)


def test_answers_to_the_library(known):
    answers = Answers(known, 2)
    found = answers.loglikelihood([asked("abc ", "ab"), asked("", "a"), asked("a", "bc")])
    assert found[0] == (pytest.approx(math.log(0.8 * 0.05 * 0.8)), False), "the space belongs to the continuation"
    assert found[1:] == [(pytest.approx(math.log(0.8)), True), (pytest.approx(2 * math.log(0.8)), True)]
    rolling = answers.loglikelihood_rolling([asked("aa"), asked("abc"), asked(""), asked("a")])
    assert rolling == pytest.approx([math.log(0.8) + math.log(0.05), 3 * math.log(0.8), 0.0, math.log(0.8)])
    greedy = {"do_sample": False}
    assert answers.generate_until(
        [asked("a", {**greedy}), asked("a", {**greedy, "until": ["c "]}), asked("a", {**greedy, "until": "x", "max_gen_toks": 1})]
    ) == ["bc ", "b", "b"]
    assert answers.generate_until([asked("a", {**greedy, "until": ["c  "]})]) == ["bc "], "half a stop is no stop"
    for only_one in ({**greedy, "temperature": 50.0}, {"temperature": 50.0, "top_k": 1}, {"temperature": 50.0, "top_p": 0.5}):
        assert answers.generate_until([asked("a", only_one)]) == ["bc "], only_one
    assert answers.generate_until([asked("a", {"temperature": 50.0})]) != ["bc "]


def test_what_is_generated_is_what_the_whole_text_makes_likeliest(engine):
    ids, chosen, stream = [0, *WORLD.encode("The cat")], [], WORLD.stream()
    with torch.no_grad():
        for _ in range(5):
            chosen.append(int(engine.model(torch.tensor([ids + chosen]))[0, -1].argmax()))
    assert 0 not in chosen
    assert Answers(engine, 1).generate_until([asked("The cat", {"max_gen_toks": 5})]) == [
        "".join(map(stream.push, chosen)) + stream.finish()
    ]


def test_the_library_gets_a_model_and_its_figures_come_back(known, monkeypatch):
    """With a stand-in for the library, which asks what it asks: Instance objects with args, a class to inherit from."""
    from rwkvlm.eval import run_tasks

    class LM:
        def __init__(self):
            self._rank = 0

    def simple_evaluate(model, tasks, **how):
        assert isinstance(model, LM) and model._rank == 0 and tasks == ["mine"] and (how["limit"], how["num_fewshot"]) == (3, 2)
        assert how["task_manager"].folder == "mine/tasks"
        ((value, greedy),) = model.loglikelihood([asked("a", "b")])
        return {"results": {"mine": {"acc,none": float(greedy), "value,none": value, "alias": "mine", "acc_stderr,none": "N/A"}}}

    modules = {
        "lm_eval": ModuleType("lm_eval"),
        "lm_eval.api": ModuleType("lm_eval.api"),
        "lm_eval.api.model": ModuleType("m"),
        "lm_eval.tasks": ModuleType("t"),
    }
    modules["lm_eval"].simple_evaluate, modules["lm_eval.api.model"].LM = simple_evaluate, LM
    modules["lm_eval.tasks"].TaskManager = lambda include_path: SimpleNamespace(
        folder=include_path, match_tasks=lambda names: [name for name in names if name == "mine"]
    )
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert run_tasks(known, ["mine"], limit=3, tasks_path="mine/tasks", few_shots=2) == {
        "mine": {"acc,none": 1.0, "value,none": pytest.approx(math.log(0.8))}
    }
    with pytest.raises(UserError, match="--tasks other is not known to lm_eval"):
        run_tasks(known, ["other"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = build(ModelConfig(n_layer=1, n_embd=32, vocab_size=65536, head_size=16))
    init_weights(model, 1)
    path = tmp_path_factory.mktemp("evaluate") / "rwkv-final.pth"
    save_weights(path, model.state_dict())
    return path


def test_command_line(checkpoint, jsonl, tmp_path, capsys):
    path, out = jsonl(["The cat sat on the mat.", "A second text."]), tmp_path / "new" / "results.json"
    argv = ["--model", str(checkpoint), "--device", "cpu", "--data", path, "--lambada", path, "--out", str(out)]
    assert command.main(argv) == 0
    shown, found = capsys.readouterr().out, json.loads(out.read_text())
    assert found["model_type"] == "x070" and found["dtype"] == "float32" and found["results"]["lambada"]["passages"] == 2
    assert found["results"]["data"]["loss"] == pytest.approx(math.log(65536), rel=0.05), "it has learned nothing"
    assert f"{found['results']['data']['loss']:.6f}  nats a token" in shown and "LAMBADA, 2 passages" in shown
    assert re.search(r"^perplexity +\d\.\d{4}e\+\d\d$", shown, re.M), "its perplexity of words is 65536 to the power of their tokens"
    assert command.main([*argv, "--dtype", "bf16", "--batch", "1", "--ctx_len", "4"]) == 0
    assert json.loads(out.read_text())["dtype"] == "bfloat16"


def test_figures_of_tasks_are_as_short_as_the_others():
    lines = command.LINES["tasks"]({"mine": {"perplexity,none": 6.8e33, "acc,none": 0.25}})
    assert [line.split() for line in lines[2:]] == [["mine", "perplexity", "6.8000e+33"], ["mine", "acc", "0.2500"]]


def test_why_bits_a_byte_are_not_known(checkpoint, jsonl, capsys):
    """The very first token is not predicted, and here no other one has bytes: the tokenizer is not to blame."""
    assert command.main(["--model", str(checkpoint), "--device", "cpu", "--data", jsonl(["a"]), "--ctx_len", "4"]) == 0
    assert re.search(r"^bits a byte +unknown  no bytes are predicted$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    "argv,word",
    [
        ([], "nothing to measure; give --data, --lambada or --tasks"),
        (["--data", "nowhere"], "nowhere.idx does not exist"),
        (["--data", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--data", "x", "--batch", "0"], "--batch 0 must be at least 1"),
        (["--data", "x", "--ctx_len", "-1"], "--ctx_len -1 must be at least 0"),
        (["--data", "x", "--limit", "-1"], "--limit -1 must be at least 0"),
        (["--data", "x", "--dtype", "fp8"], "fp8"),
        (["--data", "x", "--out", "."], "--out . is a folder"),
        (["--lambada", "BAD"], "line 2: the text has no last word behind a space"),
        (["--data", "BAD", "--text_key", "txt"], "no key 'txt' .*; see --text_key$"),
        (["--data", "BROKEN"], "line 2: not JSON: .*; correct it or take it out: nothing is passed over here$"),
        (["--lambada", "BROKEN"], "line 2: not JSON: .*; correct it or take it out: nothing is passed over here$"),
        (["--data", "EMPTY"], "no tokens to predict"),
    ],
    ids=str,
)
def test_bad_input_names_what_is_wrong(checkpoint, jsonl, tmp_path, argv, word):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a word"}\n{"text": "a w\n')
    argv = [jsonl(["a word", "word"]) if a == "BAD" else jsonl([""]) if a == "EMPTY" else str(broken) if a == "BROKEN" else a for a in argv]
    with pytest.raises(UserError, match=word):
        command.main(["--model", str(checkpoint), "--device", "cpu", *argv])


@pytest.mark.parametrize(
    "task, bad", [(text_loss, dict(ctx_len=-1)), *((task, bad) for task in (text_loss, lambada) for bad in (dict(batch=0), dict(limit=-1)))]
)
def test_bad_numbers_are_named_without_the_command_line_too(known, jsonl, task, bad):
    with pytest.raises(UserError, match="--{} {} must be at least ".format(*next(iter(bad.items())))):
        task(known, jsonl(["a b"]), **bad)


def test_without_the_library_one_line_says_how_to_get_it(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="needs the package lm_eval.*run: .*python.* -m pip install lm-eval"):
        command.main(["--model", str(checkpoint), "--device", "cpu", "--tasks", "piqa"])


def test_a_model_that_gives_no_numbers_and_tokens_outside_the_vocabulary(known, jsonl, tmp_path):
    for outside in (5, -1):
        with BinIdxWriter(tmp_path / "pair", np.int32) as writer:
            writer.add([1, outside, 4, 0])
        with pytest.raises(UserError, match=f"has token {outside}, but the model's vocabulary has 5"):
            text_loss(known, str(tmp_path / "pair"))
    known.model.head.weight.data[2, 1] = math.nan
    with pytest.raises(UserError, match="not finite"):
        lambada(known, jsonl(["a b"]))
