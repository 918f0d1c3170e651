"""In: an engine, and a sequence being answered. Out: Stream, its text by pieces; Result, it all."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from openlpu.engine.batcher import Engine
from openlpu.engine.sequence import Answer, FinishReason, Sequence
from openlpu.engine.text import AnswerText, Decoder


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts in tokens, times in seconds from the request on."""

    prompt_tokens: int
    reused_tokens: int
    """Prompt tokens whose K/V was there from an earlier turn."""
    generated_tokens: int
    first_token_s: float
    total_s: float
    seed: int | None
    """The seed of a sampled answer; None for a greedy one."""

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed per second, up to the first token of the answer."""
        return (self.prompt_tokens - self.reused_tokens) / max(self.first_token_s, 1e-9)

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second after the first; 0 for fewer than two."""
        later = self.generated_tokens - 1
        return later / max(self.total_s - self.first_token_s, 1e-9) if later > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """A whole answer. print(result) prints its text."""

    text: str
    tokens: tuple[int, ...]
    """Ids of the answer, without the token that ended it; a stop string's tokens are included."""
    finish_reason: FinishReason
    """"stop": the model or a stop string ended it; "length": max_tokens or the context did;
    "cancelled": it was left early."""
    stats: Stats

    def __str__(self) -> str:
        return self.text


class Stream:
    """An iterator over the pieces of an answer (str, never empty); then `result` has all of it.

    Leaving early is fine: `close`, or just forget it.
    """

    def __init__(
        self, engine: Engine, sequence: Sequence, answer: Answer, decoder: Decoder, *, closes: bool
    ) -> None:
        """closes: whether the sequence is given back at the end."""
        self._engine = engine
        self._sequence = sequence
        self._answer = answer
        self._closes = closes
        self._parts: list[str] = []
        text = AnswerText(decoder, stop=answer.sampling.stop)
        self._pieces = _pieces(engine, answer, text)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> str:
        try:
            piece = next(self._pieces)
        except BaseException:
            self._release()
            raise
        self._parts.append(piece)
        return piece

    def result(self) -> Result:
        """Run to the end, if it is not there yet, and return everything."""
        for _ in self:
            pass
        if self._answer.error is not None:
            raise self._answer.error
        return Result(
            text=self.text,
            tokens=tuple(self._answer.generated),
            finish_reason=self._answer.finish_reason or "cancelled",
            stats=self.stats,
        )

    @property
    def text(self) -> str:
        """The pieces so far."""
        return "".join(self._parts)

    @property
    def stats(self) -> Stats:
        """Counts and times so far."""
        answer = self._answer
        now = answer.last_token_s or answer.clock()
        return Stats(
            prompt_tokens=answer.prompt_length,
            reused_tokens=answer.reused,
            generated_tokens=len(answer.generated),
            first_token_s=(answer.first_token_s or now) - answer.started_s,
            total_s=now - answer.started_s,
            seed=None if answer.sampling.greedy else answer.sampling.seed,
        )

    def close(self) -> None:
        """Stop here."""
        self._pieces.close()
        self._answer.cancel()  # a generator that never began has nothing to close
        self._release()

    def __del__(self) -> None:
        # The collector may run in the middle of a step: only marks are left for the engine.
        self._answer.cancel()
        if self._closes:
            self._engine.forget(self._sequence)

    def _release(self) -> None:
        if self._closes:
            self._engine.close(self._sequence)


def _pieces(engine: Engine, answer: Answer, text: AnswerText) -> Generator[str, None, None]:
    """Step the engine until the answer is done. Not a method: a Stream that is forgotten half-way
    must not be kept alive by its own generator."""
    told = 0
    try:
        while True:
            done = answer.done  # before the tokens: another thread's step may bring the last one
            while told < len(answer.generated) and not text.stopped:
                told += 1
                if piece := text.push(answer.generated[told - 1]):
                    yield piece
            if text.stopped or done:
                break
            engine.step()
        if text.stopped:
            engine.stop(answer, told)
        if answer.error is not None:
            raise answer.error
        if piece := text.flush():
            yield piece
    finally:
        answer.cancel()  # an abandoned answer takes no further steps
