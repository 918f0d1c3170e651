"""In: the tokens of a sequence so far. Out: tokens that may come next (prompt lookup).

They are those that followed the same last tokens before. A proposal costs rows of a step and never
a bit: the sampler chooses each token as it would have, and the first one that differs ends it.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

_GRAM = 3  # tokens that must stand alike
_FIRST, _MOST = 4, 8  # tokens of a proposal
_PAUSE = 16  # steps without one, after a proposal that was all wrong


class PromptLookup:
    """Proposes, and learns from what became of it how much to propose."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # gram -> where the token after it stands
        self._seen = 0
        self._length = _FIRST
        self._pause = 0

    def propose(self, tokens: Items[int], most: int) -> list[int]:
        """Up to `most` tokens that followed the last ones the last time."""
        if self._pause:
            self._pause -= 1
            return []
        if self._seen > len(tokens):  # the sequence went back
            self._after.clear()
            self._seen = 0
        for end in range(max(self._seen, _GRAM), len(tokens)):
            self._after[tuple(tokens[end - _GRAM : end])] = end
        self._seen = len(tokens)
        at = self._after.get(tuple(tokens[-_GRAM:]))
        if at is None:
            return []
        return list(tokens[at : at + min(most, self._length)])

    def learn(self, proposed: int, accepted: int) -> None:
        """How many of the proposed tokens were right."""
        if accepted == proposed:
            self._length = min(_MOST, self._length + 2)
        else:
            self._length = max(1, accepted + 1)
        if not accepted:
            self._pause = _PAUSE
