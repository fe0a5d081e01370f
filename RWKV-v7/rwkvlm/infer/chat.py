"""A conversation in the format of RWKV's World models, kept as a recurrent state: nothing that was said is read twice."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator

from ..config import UserError
from ..data.tokenizer import END_OF_DOCUMENT
from .engine import Engine, check_finite
from .sampling import Penalties, check_sampling, sample
from .stops import StopText

END_OF_TURN = "\n\n"
STOPS = END_OF_TURN, "\nUser:"
STOPS_OF_PARAGRAPHS = "\n\nUser:", "\nUser:"
UNDO = 8  # turns that can be taken back; each is a state in memory


class Chat:
    """Turns of "User: message", blank line, "Assistant: answer", blank line, after the beginning of a document.

    system: text before the first turn, read as "System: text". paragraphs: blank lines are part of an answer, and only a
    turn of the user ends it.
    state: after the last turn, as if its answer and one blank line had been read, however the answer ended: by itself,
    by the beginning of another turn, by its length or by the user. The tokens of the answer are read as they were
    chosen; of one that holds the beginning of the stop too, the text before the stop is read in its place.
    """

    def __init__(
        self,
        engine: Engine,
        system: str = "",
        temperature: float = 1.0,
        top_p: float = 0.3,
        top_k: int = 0,
        penalties: Penalties | None = None,
        seed: int | None = None,
        length: int = 1000,
        paragraphs: bool = False,
    ) -> None:
        check_sampling(temperature, top_p, top_k)
        if length < 1:
            raise UserError(f"--length {length} must be at least 1")
        self.engine = engine
        self.how = temperature, top_p, top_k
        self.penalties = penalties or Penalties()
        self.generator = engine.generator(seed)
        self.length = length
        self.stops = STOPS_OF_PARAGRAPHS if paragraphs else STOPS
        engine.encode("User:\n\nAssistant:")  # a tokenizer of another model shows here
        begin = f"System: {one_paragraph(system)}{END_OF_TURN}" if system.strip() else ""
        self._beginning = engine.read([END_OF_DOCUMENT, *engine.encode(begin)])[1]
        self.reset()

    def reset(self) -> None:
        """Begins anew."""
        self.state = self._beginning
        self._before: deque[tuple[str, list]] = deque(maxlen=UNDO)  # the last messages, each with the state before it

    def undo(self) -> str | None:
        """Takes the last turn back, and returns its message; None where there is none left to take back."""
        if not self._before:
            return None
        message, self.state = self._before.pop()
        return message

    def answer(self, message: str, stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
        """Says the message and gives the answer out in pieces, without the space that begins it.

        stopped: asked before each token; True ends the answer there. The turn is complete when the last piece has been taken.
        """
        before = self.state
        logits, state = self.engine.read(self.engine.encode(f"User: {one_paragraph(message)}{END_OF_TURN}Assistant:"), before)
        stream, stop, text = self.engine.tokenizer.stream(), StopText(self.stops), ""
        self.penalties.reset()
        trail = deque([(0, state)])  # states, each with the characters read: all that the answer may yet turn out to end at
        for _ in range(self.length):
            if stopped():
                break
            check_finite(logits)
            logits = self.penalties.penalise(logits)
            token = int(sample(logits, *self.how, self.generator))
            if token == END_OF_DOCUMENT:
                break
            self.penalties.count(token, logits)
            first = stop.given == 0
            piece = stream.push(token)
            text += piece
            if certain := stop.push(piece):
                certain = certain.removeprefix(" ") if first else certain
                if certain:
                    yield certain
            if stop.stopped:
                break
            logits, state = self.engine.read([token], state)
            trail.append((len(text), state))
            _shorten(trail, stop.given)
        _shorten(trail, stop.given)
        read, state = trail[0]
        self.state = self.engine.read(self.engine.encode(text[read : stop.given] + END_OF_TURN), state)[1]
        self._before.append((message, before))


def _shorten(trail: deque, given: int) -> None:
    """Drops states from the front that the answer can no longer end at.

    The first one left has read the most of those that have read no more than `given` characters; of several the
    earliest, since the later ones have read a part of the next character too.
    """
    read = max(count for count, _ in trail if count <= given)
    while trail[0][0] < read:
        trail.popleft()


def one_paragraph(text: str) -> str:
    """Without blank lines, which would end the turn."""
    return re.sub(r"\n\s*\n", "\n", text.strip().replace("\r\n", "\n"))
