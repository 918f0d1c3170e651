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
        self._stops = [_Search(text) for text in stop]
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
        begins = [at for at in (stop.take(text) for stop in self._stops) if at is not None]
        held, self._held = self._held + text, ""
        if begins:
            self.stopped = True
            return held[: len(held) - len(text) + min(begins)]
        keep = max((stop.matched for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


class _Search:
    """One stop string. Looks once at each letter, however often the beginning of the string comes
    (Knuth, Morris, Pratt)."""

    def __init__(self, wanted: str) -> None:
        self._wanted = wanted
        self.matched = 0
        """How long an end of the text so far is a beginning of the string."""
        # After i letters of the string, the longest shorter beginning that they end with.
        self._shorter = [0] * (len(wanted) + 1)
        length = 0
        for i in range(1, len(wanted)):
            length = self._next(length, wanted[i])
            self._shorter[i + 1] = length

    def take(self, text: str) -> int | None:
        """Where the string begins, counted from this text's own beginning; None if it has not come
        to its end."""
        for i, letter in enumerate(text):
            self.matched = self._next(self.matched, letter)
            if self.matched == len(self._wanted):
                return i + 1 - len(self._wanted)
        return None

    def _next(self, length: int, letter: str) -> int:
        while length and self._wanted[length] != letter:
            length = self._shorter[length]
        return length + (self._wanted[length] == letter)
