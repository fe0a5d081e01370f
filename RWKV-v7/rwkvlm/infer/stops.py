"""Text that ends where one of some strings begins: given out as soon as it cannot be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopText:
    """given: characters given out so far; stopped: whether one of the stops has come, whose text and what follows it are not given out."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.given = 0
        self.stopped = False

    def push(self, text: str) -> str:
        """What is certain now, of the text so far; possibly empty."""
        if self.stopped:
            return ""
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        self.stopped = bool(found)
        cut = min(found) if found else len(held) - self._begun(held)
        self._held = "" if self.stopped else held[cut:]
        self.given += cut
        return held[:cut]

    def _begun(self, text: str) -> int:
        """How many characters at the end of the text may be the beginning of a stop."""
        return max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)

    def finish(self) -> str:
        """What is held back, where no more text comes."""
        held, self._held = self._held, ""
        self.given += len(held)
        return held
