"""`python -m rwkvlm chat`: a conversation with a model, in the terminal or through a pipe."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .flags import Parser

if TYPE_CHECKING:
    from ..infer.chat import Chat

HELP = """/retry    another answer to the last message
/undo     take the last turn back (up to {undo} of them)
/reset    begin anew
/quit     end, as Ctrl-D does; Ctrl-C stops an answer"""


def main(argv: list[str]) -> int:
    parser = Parser(
        prog="python -m rwkvlm chat",
        description="Talk with a model that knows the format of RWKV World: User: ..., blank line, Assistant: ... "
        "Each line that is typed, or read from a pipe, is a message or a command: /retry, /undo, /reset, /help, /quit. "
        "Memory does not grow with the conversation, but for models that keep what they have read.",
    )
    parser.add_argument("--model", required=True, help="checkpoint, for example out/L6-D256-x070/rwkv-final.pth")
    parser.add_argument("--system", default="", help='text before the first turn, read as "System: TEXT"')
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest token [1]")
    parser.add_argument("--top_p", type=float, default=0.3, help="keep the likeliest tokens up to this probability; 1: all [0.3]")
    parser.add_argument("--top_k", type=int, default=0, help="keep this many of the likeliest tokens; 0: all [0]")
    parser.add_argument(
        "--presence_penalty", type=float, default=0.5, help="taken from the logit of each token that the answer has already [0.5]"
    )
    parser.add_argument("--frequency_penalty", type=float, default=0.5, help="taken from it for each time that it came [0.5]")
    parser.add_argument(
        "--penalty_decay", type=float, default=0.996, help="by which those times fade with each token; 1: not at all [0.996]"
    )
    parser.add_argument("--length", type=int, default=1000, help="most tokens of an answer [1000]")
    parser.add_argument(
        "--paragraphs", action="store_true", help="an answer may have blank lines: only a next turn of the user ends it (RWKV-7 G1 models)"
    )
    parser.add_argument("--seed", type=int, default=None, help="same seed and messages, same answers; default: new ones each time")
    parser.add_argument("--tokenizer", default="", help="world or a Hugging Face tokenizer.json [the one beside the model, else world]")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [auto]")
    args = parser.parse_args(argv)
    from ..infer import load_engine  # torch takes seconds to import: wrong flags are answered before
    from ..infer.chat import UNDO, Chat
    from ..infer.sampling import Penalties

    penalties = Penalties(args.presence_penalty, args.frequency_penalty, args.penalty_decay)
    engine = load_engine(args.model, args.tokenizer, args.device)
    chat = Chat(engine, args.system, args.temperature, args.top_p, args.top_k, penalties, args.seed, args.length, args.paragraphs)
    engine.prepare()
    _say_what_is_misread(chat, args.system)
    _talk(chat, HELP.format(undo=UNDO), terminal=sys.stdin.isatty() and sys.stdout.isatty())
    return 0


def _talk(chat: Chat, help_text: str, terminal: bool) -> None:
    if terminal:
        print("/help lists the commands; Ctrl-D ends.")
    for line in _lines(terminal):
        message = line.strip()
        if message in ("/quit", "/exit"):
            return
        if message == "/help":
            _say(help_text)
        elif message == "/reset":
            chat.reset()
            _say("[begun anew]")
        elif message == "/undo":
            undone = chat.undo()
            _say("[nothing to take back]" if undone is None else f"[taken back: {_short(undone)}]")
        elif message == "/retry":
            undone = chat.undo()
            if undone is None:
                _say("[nothing to answer again]")
            else:
                _answer(chat, undone, terminal)
        elif message.startswith("/") and " " not in message and "/" not in message[1:]:
            _say(f"[{message} is no command; /help lists them]")
        elif message:
            _say_what_is_misread(chat, message)
            _answer(chat, message, terminal)


def _lines(terminal: bool) -> Iterator[str]:
    """What is typed or piped in, until its end. Ctrl-C gives up the line that is being typed."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    if not terminal:
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  it gives input() line editing and a history
    while True:
        try:
            yield input("\nUser: ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n[Ctrl-D or /quit ends]", end="")


def _answer(chat: Chat, message: str, terminal: bool) -> None:
    print("\nAssistant: " if terminal else "", end="", flush=True)
    empty = True
    with _interrupts() as came:
        for piece in chat.answer(message, stopped=lambda: bool(came)):
            print(piece, end="", flush=True)
            empty = False
    print(flush=True)
    if came:
        _say("[stopped]")
    elif empty:
        _say("[the answer is empty; /retry asks for another]")


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Ctrl-C is noted in the list and does nothing else: an answer ends between two tokens, with a state that is whole."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _say(note: str) -> None:
    """Beside the conversation: through a pipe come answers alone."""
    print(note, file=sys.stderr, flush=True)


def _say_what_is_misread(chat: Chat, text: str) -> None:
    if (read := chat.engine.misread(text)) is not None:
        _say(f"[the tokenizer does not know all of this: the model reads {_short(read)!r}]")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:59]}…"
