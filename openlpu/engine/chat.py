"""In: a Model and what a person says. Out: Chat: a conversation that keeps its K/V between turns.

Each turn renders the whole conversation and computes only what the sequence does not hold yet:
usually the new message. A template that rewrites earlier turns is followed exactly; its change only
costs the time to compute from there on.
"""

from __future__ import annotations

from openlpu.engine.answer import Stream
from openlpu.engine.model import Model
from openlpu.engine.sampling import Sampling
from openlpu.errors import LpuError


class Chat:
    """One conversation on one sequence of the model's engine."""

    def __init__(
        self, model: Model, *, system: str | None = None, sampling: Sampling | None = None
    ) -> None:
        """system: the first message, unless None. Raises RequestError without a chat template."""
        self._model = model
        self._sampling = sampling or Sampling()
        self._first = [{"role": "system", "content": system}] if system is not None else []
        self._sequence = model.engine.open()
        self.messages: list[dict[str, str]] = list(self._first)

    def send(self, text: str) -> Stream:
        """The answer to a message. Give the stream to `keep` when it has ended or was left.

        Raises RequestError if the conversation fills the context; it is then as before.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            tokens = self._model.prompt_tokens(self.messages)
            return self._model.answer(tokens, self._sampling, keep=self._sequence)
        except LpuError:
            self.messages.pop()
            raise

    def keep(self, stream: Stream) -> None:
        """Make what the stream said part of the conversation."""
        stream.close()
        self.messages.append({"role": "assistant", "content": stream.text})

    @property
    def cached_tokens(self) -> int:
        """Tokens whose K/V is kept."""
        return self._sequence.cached

    def reset(self) -> None:
        """Begin again, with the system message only."""
        self.messages = list(self._first)
        self._model.engine.rewind(self._sequence, 0)

    def close(self) -> None:
        """Give the sequence back."""
        self._model.engine.close(self._sequence)
