"""In: sequences with tokens to compute, and a Runner. Out: their next tokens, a step at a time.

Each step takes one token of every sequence that is decoding, then fills up with pieces of waiting
prompts, oldest first. By the contract no row's bits depend on its neighbours, so this order is
about speed only.

One lock makes every call whole, so that several Python threads may use sequences of one engine;
each sequence belongs to one of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from openlpu.engine.pages import PageTable
from openlpu.engine.runner import Runner, page_rows
from openlpu.engine.sampler import choose
from openlpu.engine.sampling import Sampling
from openlpu.engine.sequence import Answer, Sequence, token_ids
from openlpu.errors import NumericOverflow, RequestError
from openlpu.graph.step import Batch

F32 = NDArray[np.float32]


class Engine:
    """Runs any number of sequences together on one runner."""

    def __init__(self, runner: Runner, *, context: int, vocab_size: int) -> None:
        """context: most positions of one sequence. vocab_size: token ids are below it."""
        self.runner = runner
        self.context = context
        self._vocab_size = vocab_size
        self._pages = PageTable(runner)
        self._sequences: dict[int, Sequence] = {}
        self._forgotten: deque[Sequence] = deque()
        self._lock = threading.RLock()

    def open(self) -> Sequence:
        """An empty sequence. Give it back with `close`."""
        with self._lock:
            self._reclaim()
            slot = next(i for i in range(len(self._sequences) + 1) if i not in self._sequences)
            sequence = self._sequences[slot] = Sequence(slot)
            return sequence

    def close(self, sequence: Sequence) -> None:
        """Forget a sequence and free its pages; closing twice is harmless."""
        with self._lock:
            if self._sequences.get(sequence.slot) is sequence:
                self.rewind(sequence, 0)
                del self._sequences[sequence.slot]

    def forget(self, sequence: Sequence) -> None:
        """Close a sequence at the next `open` or `step`; safe wherever the collector runs."""
        self._forgotten.append(sequence)

    def _reclaim(self) -> None:
        while self._forgotten:
            self.close(self._forgotten.popleft())

    def rewind(self, sequence: Sequence, length: int) -> None:
        """Cut a sequence to its first `length` tokens; what is cached of them stays."""
        with self._lock:
            del sequence.tokens[length:]
            sequence.cached = min(sequence.cached, length)
            self._pages.release(sequence.pages, keep=sequence.cached)
            if sequence.answer is not None:
                sequence.answer.cancel()  # whoever still reads it must not wait for ever
            sequence.answer = None

    def ask(
        self,
        sequence: Sequence,
        tokens: Items[int],
        sampling: Sampling,
        *,
        end_ids: frozenset[int] = frozenset(),
    ) -> Answer:
        """Start an answer to `tokens`, the whole conversation; what is cached of it is reused.

        Raises RequestError if it does not leave room for one token.
        """
        ids = self._checked(tokens, before=1)  # room for one token of the answer
        with self._lock:
            # The last token is computed again in any case: its logits are needed.
            reused = min(sequence.shared_prefix(ids), len(ids) - 1)
            self.rewind(sequence, reused)
            sequence.tokens = ids
            sequence.answer = Answer(
                sampling=sampling,
                prompt_length=len(ids),
                limit=min(self.context, len(ids) + sampling.max_tokens),
                end_ids=frozenset() if sampling.ignore_eos else end_ids,
                reused=reused,
            )
            return sequence.answer

    def stop(self, answer: Answer, length: int) -> None:
        """End an answer after `length` tokens; steps of other streams may have gone beyond."""
        with self._lock:
            answer.finish_reason, answer.error = "stop", None
            del answer.generated[length:]

    @property
    def busy(self) -> bool:
        """Whether an answer is unfinished, so that `step` has something to do."""
        with self._lock:
            return any(s.answer and not s.answer.done for s in self._sequences.values())

    def step(self) -> list[tuple[Sequence, int]]:
        """Compute one step over all sequences with unfinished answers; the tokens it sampled.

        None are sampled while prompts are on their way; see `busy` for the end. A token that ended
        an answer is among them, but not in the sequence. A sequence whose logits are not finite is
        left out; its answer holds the error.
        """
        with self._lock:
            self._reclaim()
            return self._step()

    def _step(self) -> list[tuple[Sequence, int]]:
        waiting = [s for s in self._sequences.values() if s.answer and not s.answer.done]
        waiting.sort(key=lambda s: s.pending > 1)  # decoding first; the sort keeps ages in order
        plan, room = [], self.runner.max_rows
        for sequence in waiting:
            rows = min(sequence.pending, room)
            if rows:
                plan.append((sequence, rows))
                room -= rows
        if not plan:
            return []
        complete = [sequence for sequence, rows in plan if rows == sequence.pending]
        logits = self.compute(plan, wanted="last")
        sampled = []
        for sequence, row in zip(complete, logits, strict=True):
            answer = sequence.answer
            if answer is None or answer.done:
                continue  # cancelled meanwhile
            try:
                token = choose(
                    row, answer.sampling, tokens=sequence.tokens, prompt_length=answer.prompt_length
                )
            except NumericOverflow as error:
                answer.error = error
                continue
            answer.append(token)
            if token not in answer.end_ids:
                sequence.tokens.append(token)
            sampled.append((sequence, token))
        return sampled

    def score(
        self, sequence: Sequence, tokens: Items[int], *, piece: int | None = None
    ) -> Iterator[F32]:
        """Append tokens and yield their logits float32 [rows, V], up to `piece` rows at a time."""
        ids = self._checked(tokens, before=len(sequence.tokens))
        rows = min(piece or self.runner.max_rows, self.runner.max_rows)
        for start in range(0, len(ids), rows):
            part = ids[start : start + rows]
            sequence.tokens += part
            yield self.compute([(sequence, len(part))], wanted="all")

    def last_logits(
        self, sequence: Sequence, tokens: Items[int], *, piece: int | None = None
    ) -> F32:
        """Append tokens and return the logits float32 [V] of the last one."""
        sequence.tokens += self._checked(tokens, before=len(sequence.tokens))
        rows = min(piece or self.runner.max_rows, self.runner.max_rows)
        while True:
            logits = self.compute([(sequence, min(rows, sequence.pending))], wanted="last")
            if not sequence.pending:
                row: F32 = logits[0]
                return row

    def compute(self, plan: Items[tuple[Sequence, int]], *, wanted: Literal["all", "last"]) -> F32:
        """One step over the next `rows` pending tokens of each (sequence, rows): logits [L, V] of
        "all" rows, or of the "last" row of each sequence that the step completes."""
        with self._lock:
            return self._compute(plan, wanted)

    def _compute(self, plan: Items[tuple[Sequence, int]], wanted: Literal["all", "last"]) -> F32:
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows_wanted: list[int] = []
        for sequence, rows in plan:
            start, stop = sequence.cached, sequence.cached + rows
            self._pages.extend(sequence.pages, stop)
            tokens += sequence.tokens[start:stop]
            positions += range(start, stop)
            slots += [sequence.slot] * rows
            if wanted == "all":
                rows_wanted += range(len(tokens) - rows, len(tokens))
            elif stop == len(sequence.tokens):
                rows_wanted.append(len(tokens) - 1)
        held = [self._sequences[s].pages if s in self._sequences else [] for s in self._slots()]
        logits = self.runner.step(
            Batch(
                tokens=np.array(tokens, np.int32),
                positions=np.array(positions, np.int32),
                slots=np.array(slots, np.int32),
                wanted=np.array(rows_wanted, np.int32),
                pages=page_rows(held),
            )
        )
        for sequence, rows in plan:
            sequence.cached += rows
        return logits

    def _slots(self) -> range:
        return range(max(self._sequences, default=-1) + 1)

    def _checked(self, tokens: Items[int], *, before: int) -> list[int]:
        ids = token_ids(tokens, vocab_size=self._vocab_size)
        if not ids:
            raise RequestError("there are no tokens; give a prompt that is not empty")
        if before + len(ids) > self.context:
            raise RequestError(
                f"a prompt of {len(ids):,} tokens and {before:,} more do not fit the context of "
                f"{self.context:,}; shorten the prompt"
            )
        return ids
