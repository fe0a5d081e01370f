"""Conversations: which tokens a state has read, in a script, a pipe and a terminal; penalties.

Told by a model whose answers are written down, and by bits that agree with a fresh reading.
"""

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections import deque

import pytest
import torch

from rwkvlm.checkpoint.pth import save_weights
from rwkvlm.cli import chat as command
from rwkvlm.config import ModelConfig, UserError
from rwkvlm.data.tokenizer import load_tokenizer
from rwkvlm.infer import load_engine
from rwkvlm.infer.chat import UNDO, Chat
from rwkvlm.infer.sampling import Penalties
from rwkvlm.infer.stops import StopText
from rwkvlm.models import build, init_weights

WORLD = load_tokenizer("world")
PROMPT = "User: hi\n\nAssistant:"


class Scripted:
    """An engine whose state is the list of all tokens read, and which chooses the tokens of a script."""

    tokenizer = WORLD

    def __init__(self, *answers):
        self.script = iter([token for answer in answers for token in answer])

    def encode(self, text):
        return WORLD.encode(text)

    def generator(self, seed):
        return None

    def read(self, tokens, state=None):
        return torch.zeros(1, 1), [*(state or []), *tokens]


@pytest.fixture
def scripted(monkeypatch):
    def make(*answers, **how):
        engine = Scripted(*answers)
        monkeypatch.setattr("rwkvlm.infer.chat.sample", lambda *_: next(engine.script))
        monkeypatch.setattr(Penalties, "count", lambda *_: None)
        return Chat(engine, **how)

    return make


def spelled(text):
    """A token for each byte, so that a stop comes in pieces."""
    return [WORLD.encode(bytes([byte]))[0] for byte in text.encode()]


def tokens_of(*texts):
    """Each of which is one token."""
    ids = [WORLD.encode(text) for text in texts]
    assert all(len(one) == 1 for one in ids)
    return [one[0] for one in ids]


START = [0, *WORLD.encode(PROMPT)]
BLANK = WORLD.encode("\n\n")


@pytest.mark.parametrize(
    "answer,shown,read",
    [
        (WORLD.encode(" Hello.") + BLANK, "Hello.", WORLD.encode(" Hello.") + BLANK),
        (spelled(" Hello.\n\n"), "Hello.", spelled(" Hello.") + BLANK),
        (spelled(" Hello.\nUser: x"), "Hello.", spelled(" Hello.") + BLANK),
        (spelled(" a\nUse it.\n\n"), "a\nUse it.", spelled(" a\nUse it.") + BLANK),
        (WORLD.encode(" a") + tokens_of("\n\n\n"), "a", WORLD.encode(" a") + BLANK),
        (spelled(" ü") + tokens_of("。\n", "\n"), "ü。", spelled(" ü") + WORLD.encode("。\n\n")),
        (spelled(" ü") + tokens_of("。") + BLANK, "ü。", spelled(" ü") + tokens_of("。") + BLANK),
        (spelled(" a")[:2] + spelled("ü")[:1] + BLANK, "a\ufffd", spelled(" a") + WORLD.encode("\ufffd\n\n")),
        (WORLD.encode(" a") + [0], "a", WORLD.encode(" a") + BLANK),
        (spelled(" a\n") + [0], "a", spelled(" a") + BLANK),
        (BLANK, "", BLANK),
    ],
    ids=[
        "one token",
        "two line ends",
        "the user's next turn",
        "no stop after all",
        "more than the stop",
        "text before it in its token",
        "read as it was chosen",
        "half a character",
        "end of document",
        "half a stop",
        "empty",
    ],
)
def test_a_stop_is_read_once_however_it_came(scripted, answer, shown, read):
    chat = scripted(answer)
    assert "".join(chat.answer("hi")) == shown
    assert chat.state == START + read


def test_paragraphs(scripted):
    chat = scripted(spelled(" a\n\nb\n\nUser: x"), paragraphs=True)
    assert "".join(chat.answer("hi")) == "a\n\nb"
    assert chat.state == START + spelled(" a\n\nb") + BLANK


def test_length_and_user_end_an_answer(scripted):
    chat = scripted(spelled(" abcdef"), length=3)
    assert "".join(chat.answer("hi")) == "ab" and chat.state == START + spelled(" ab") + BLANK
    chat, asked = scripted(spelled(" abü")), iter([False, False, False, False, True])
    assert "".join(chat.answer("hi", lambda: next(asked))) == "ab"
    assert chat.state == START + spelled(" ab") + BLANK, "half of the last character is not part of the answer"


def test_messages_and_system_have_no_blank_lines(scripted):
    chat = scripted(BLANK, system=" Be\n\nbrief. ")
    list(chat.answer("a\r\n\r\n \n b\n"))
    assert WORLD.decode(chat.state[1:]) == "System: Be\nbrief.\n\nUser: a\n b\n\nAssistant:\n\n"


def test_undo_is_bounded(scripted):
    chat = scripted(*[BLANK] * (UNDO + 2))
    for n in range(UNDO + 2):
        list(chat.answer(str(n)))
    assert [chat.undo() for _ in range(UNDO + 1)] == [*map(str, reversed(range(2, UNDO + 2))), None]
    assert WORLD.decode(chat.state[1:]) == "User: 0\n\nAssistant:\n\nUser: 1\n\nAssistant:\n\n"


def test_few_states_are_kept(scripted, monkeypatch):
    """However long the answer: of each token the state would be megabytes."""
    longest = 0

    class Trail(deque):
        def append(self, item):
            nonlocal longest
            super().append(item)
            longest = max(longest, len(self))

    monkeypatch.setattr("rwkvlm.infer.chat.deque", Trail)
    text = " long ü\nUser 汉\n" * 40  # characters of two and of three tokens, of which all but the last give out nothing
    chat = scripted(spelled(text + "\n"), length=10**6)
    assert "".join(chat.answer("hi")) == text[1:-1]
    assert longest <= 9


def test_stop_text_against_the_definition():
    """In any pieces: what stands before the first stop, nothing of a stop before it is certain."""
    text, stops = "a\n b\nUs\nUser\n\nUser: c", ("\n\nUser:", "\nUser:")
    for size in range(1, len(text)):
        stop, out = StopText(stops), []
        for at in range(0, len(text), size):
            out.append(stop.push(text[at : at + size]))
            assert "a\n b\nUs\nUser".startswith("".join(out))
        assert "".join(out) == "a\n b\nUs\nUser" and stop.stopped and stop.given == len("".join(out))
    assert StopText(("later", "first")).push("x first later") == "x "
    stop = StopText(stops)
    assert stop.push("x\nUser") + stop.finish() == "x\nUser" and stop.given == 6 and not stop.stopped


def test_penalties_against_the_definition():
    chosen, (presence, frequency, decay) = [3, 1, 3, 3, 0, 0], (0.5, 0.25, 0.3)
    penalties, logits, times = Penalties(presence, frequency, decay), torch.randn(1, 5, generator=torch.Generator().manual_seed(0)), {}
    for token in chosen:
        want = logits[0].tolist()
        for n, count in times.items():
            want[n] -= presence + frequency * count
        assert torch.allclose(penalties.penalise(logits)[0], torch.tensor(want))
        penalties.count(token, logits)
        times = {n: count * decay for n, count in times.items()}
        times[token] = times.get(token, 0) + 1
    assert 0.5 < logits[0, 1] - penalties.penalise(logits)[0, 1] < 0.51, "its times have faded, not that it has come"
    penalties.reset()
    assert torch.equal(penalties.penalise(logits), logits)


def test_penalties_outside_their_range():
    inf, nan = float("inf"), float("nan")
    for right in (dict(decay=0), dict(decay=1), dict(presence=-2, frequency=-3)):
        Penalties(**right)
    for flag, wrong in (("penalty_decay", dict(decay=x)) for x in (-0.1, 1.1, nan)):
        with pytest.raises(UserError, match=f"^--{flag} "):
            Penalties(**wrong)
    for name in ("presence", "frequency"):
        for value in (inf, -inf, nan, 1e39):  # the last is infinite in fp32
            with pytest.raises(UserError, match=f"^--{name}_penalty "):
                Penalties(**{name: value})
    penalties, logits = Penalties(frequency=1.0), torch.zeros(1, 3)
    for _ in range(2):
        penalties.count(1, logits)
    assert penalties.penalise(logits)[0].tolist() == pytest.approx([0, -1.996, 0]), "ChatRWKV's decay is the default"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = build(ModelConfig(n_layer=2, n_embd=64, vocab_size=65536, head_size=32))
    init_weights(model, 3)
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) / p.shape[-1] ** 0.5)
    path = tmp_path_factory.mktemp("chat") / "rwkv-final.pth"
    save_weights(path, model.state_dict())
    return path


def test_a_chat_penalises_each_answer_by_itself(checkpoint):
    """What has come in one answer has not come in the next: asked anew, it answers the same."""
    engine, chosen = load_engine(checkpoint, device="cpu"), []

    def answered(**penalties):
        chat = Chat(engine, temperature=0, length=30, penalties=Penalties(**penalties))
        count, chosen[:] = chat.penalties.count, []
        chat.penalties.count = lambda token, logits: (chosen.append(token), count(token, logits))
        for _ in range(2):
            list(chat.answer("one"))
            chat.undo()
        return chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]

    plain, again = answered(frequency=-3.0)
    assert plain == again and len(set(plain)) < len(plain), "a reward for what has come, so that there is something to be told apart"
    once, again = answered(presence=100.0)
    assert once == again and len(set(once)) == len(once) == 30


def same_bits(a, b):
    return all(torch.equal(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def test_undo_and_retry_give_the_bits_of_a_fresh_state(checkpoint):
    engine = load_engine(checkpoint, device="cpu")

    def fresh(*messages):
        chat = Chat(engine, "Be brief.", temperature=0, length=12)
        for message in messages:
            list(chat.answer(message))
        return chat.state

    chat = Chat(engine, "Be brief.", temperature=0, length=12)
    answers = ["".join(chat.answer(message)) for message in ("one", "two")]
    both = chat.state
    assert all(answers) and not same_bits(both, fresh("one"))
    assert chat.undo() == "two" and same_bits(chat.state, fresh("one"))
    assert "".join(chat.answer("two")) == answers[1] and same_bits(chat.state, both), "undo and answer is retry"
    chat.reset()
    assert same_bits(chat.state, fresh()) and chat.undo() is None
    ids = [*WORLD.encode("User: one\n\nAssistant:"), *engine.tokens("System: Be brief.\n\nUser: one\n\nAssistant:", 0)]
    _, state = engine.read(ids, engine.read([0, *WORLD.encode("System: Be brief.\n\n")])[1])
    list(chat.answer("one", stopped=lambda: True))
    assert same_bits(chat.state, engine.read(BLANK, state)[1]), "nothing but these tokens has been read"


def test_what_is_built_is_built_before_the_first_answer(checkpoint, capsys, monkeypatch):
    monkeypatch.setattr("rwkvlm.ops.rwkv7_step.why_not", lambda: print("building") or "not here")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert command.main(["--model", str(checkpoint), "--device", "cpu"]) == 0
    assert capsys.readouterr().out == "building\n"


def chat_process(checkpoint, *flags, **how):
    argv = [sys.executable, "-m", "rwkvlm", "chat", "--model", str(checkpoint), "--device", "cpu", *flags]
    return subprocess.Popen(
        argv, text="stdin" not in how, **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how}
    )


def test_through_a_pipe(checkpoint):
    """The answers alone are output; the same seed and messages give the same ones."""
    said = "hi\n/undo\n/undo\nhi\n/nonsense\n/retry\n/reset\n\nhi\n/quit\nnever\n"
    flags = "--seed 5 --length 6 --temperature 0 --presence_penalty 0 --frequency_penalty 0".split()
    out, err = chat_process(checkpoint, *flags).communicate(said, timeout=120)
    answers = out.removesuffix("\n").split("\n")
    assert len(answers) == 4 and len(set(answers)) == 1 and answers[0], "undone, retried or begun anew: the same likeliest tokens"
    assert err.splitlines() == ["[taken back: hi]", "[nothing to take back]", "[/nonsense is no command; /help lists them]", "[begun anew]"]


class Terminal:
    """A process on the other side of a pseudo-terminal."""

    def __init__(self, checkpoint, *flags):
        self.mine, theirs = pty.openpty()
        self.process = chat_process(checkpoint, *flags, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
        os.close(theirs)
        self.screen = ""

    def wait_for(self, text, seconds=60):
        """Text that comes after what was waited for before."""
        until = time.monotonic() + seconds
        while text not in self.screen:
            assert time.monotonic() < until, f"{text!r} does not come after {self.screen!r}"
            if select.select([self.mine], [], [], 0.1)[0]:
                try:
                    self.screen += os.read(self.mine, 4096).decode("utf-8", "replace")
                except OSError:  # the other side is closed
                    break
        before, _, self.screen = self.screen.partition(text)
        return before

    def shows(self, text, seconds=2):
        with contextlib.suppress(AssertionError):
            self.wait_for(text, seconds)
            return True
        return self.process.poll() is not None

    def type(self, text):
        os.write(self.mine, text.encode())


def test_in_a_terminal(checkpoint):
    terminal = Terminal(checkpoint, *"--length 100000000 --seed 1 --temperature 2 --top_p 1".split())
    try:
        terminal.wait_for("User: ")
        while not terminal.shows("[Ctrl-D or /quit ends]"):  # a signal between prompt and waiting for keys would wait for the next key
            terminal.process.send_signal(signal.SIGINT)
        terminal.type("hello\n")
        terminal.wait_for("Assistant: ")
        terminal.wait_for(" ")  # it has begun, and goes on for days
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("[stopped]")
        terminal.wait_for("User: ")
        terminal.type("/undo\n")
        terminal.wait_for("[taken back: hello]")
        terminal.wait_for("User: ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.mine)


@pytest.mark.parametrize(
    "argv,word",
    [
        (["--model", "nowhere.pth"], "nowhere.pth"),
        (["--top_p", "0"], "--top_p"),
        (["--length", "0"], "--length 0 must be at least 1"),
        (["--presence_penalty", "nan"], "--presence_penalty nan"),
        (["--frequency_penalty", "inf"], "--frequency_penalty inf"),
        (["--penalty_decay", "1.1"], r"--penalty_decay 1.1 must lie in \[0, 1\]"),
        (["--seed", str(1 << 70)], "has more than 63 bits"),
        (["--nonsense"], "--nonsense"),
    ],
    ids=str,
)
def test_bad_input_names_what_is_wrong(checkpoint, argv, word):
    with pytest.raises(UserError, match=word):
        command.main(["--model", str(checkpoint), "--device", "cpu", *argv])


def test_a_tokenizer_of_another_model(tmp_path):
    model = build(ModelConfig(n_layer=1, n_embd=32, vocab_size=50, head_size=32))
    init_weights(model, 0)
    save_weights(tmp_path / "m.pth", model.state_dict())
    with pytest.raises(UserError, match="vocabulary has 50"):
        command.main(["--model", str(tmp_path / "m.pth"), "--device", "cpu"])
