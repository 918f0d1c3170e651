"""In: the tokens of an answer, one at a time. Out: text that is certain, cut before a stop string.

Two things are held back: bytes of a character that is not complete (by the tokenizer's stream), and
text that may yet turn out to be the beginning of a stop string.
"""

from __future__ import annotations

from typing import Protocol


class Decoder(Protocol):
    """A tokenizer's stream: the pushes and the flush together are the decoded text."""

    def push(self, token: int, /) -> str: ...

    def flush(self) -> str: ...


class AnswerText:
    """Turns tokens into text. After `stopped`, nothing more comes."""

    def __init__(self, decoder: Decoder, *, stop: tuple[str, ...] = ()) -> None:
        self._decoder = decoder
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that the token makes certain; often empty."""
        return self._take(self._decoder.push(token))

    def flush(self) -> str:
        """What was held back, once no token follows."""
        text = self._take(self._decoder.flush())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _take(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for at in map(self._held.find, self._stop) if at >= 0]
        if found:
            certain, self._held, self.stopped = self._held[: min(found)], "", True
            return certain
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
