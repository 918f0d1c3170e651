"""In: sequences with tokens to compute, and a Runner. Out: their next tokens, a step at a time.

Sequences join and leave at every step. What a step computes is planned first (see planner), then
run as one frozen Batch. Full pages are shared by sequences that begin alike; when memory is short,
the youngest of the least urgent sequences gives its pages up and computes them again later. By the
contract none of this changes a bit.

One lock makes every call whole, so that several Python threads may use sequences of one engine;
each sequence belongs to one of them. `submit`, `forget` and Answer.cancel never wait for a step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Items
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from openlpu.engine.clock import Clock, wall_clock
from openlpu.engine.logprobs import token_logprob
from openlpu.engine.pages import PageTable
from openlpu.engine.planner import Limits, Share, plan
from openlpu.engine.runner import HasStates, Runner, page_rows
from openlpu.engine.sampler import choose
from openlpu.engine.sampling import Sampling
from openlpu.engine.sequence import Answer, Request, Sequence, token_ids
from openlpu.errors import DoesNotFit, LpuError, NumericOverflow, RequestError
from openlpu.graph.step import PAGE, Batch

F32 = NDArray[np.float32]

_PROMPT_ROWS = (32, 128)  # 15 to 60 ms of a small model on two cores
_DRAFTED_ROWS = 8


class Engine:
    """Runs any number of sequences together on one runner."""

    def __init__(
        self,
        runner: Runner,
        *,
        context: int,
        vocab_size: int,
        clock: Clock = wall_clock,
        most_pages: int | None = None,
        share_prefixes: bool = True,
        prompt_rows: tuple[int, int] = _PROMPT_ROWS,
    ) -> None:
        """context: most positions of one sequence. vocab_size: token ids are below it. most_pages:
        of the K/V pool. share_prefixes: whether K/V of equal beginnings are computed once.
        prompt_rows: least and most rows of prompts in a step for which others wait."""
        self.runner = runner
        self.context = context
        self.clock = clock
        self._vocab_size = vocab_size
        self._limits = Limits(
            runner.max_rows, runner.rows_of_a_sequence, prompt_rows, _DRAFTED_ROWS
        )
        self.pages = PageTable(
            runner, limit=most_pages, share=share_prefixes and runner.shares_pages
        )
        self._open: list[Sequence] = []  # oldest first
        self._slots: dict[int, Sequence] = {}
        self._submitted: deque[Sequence] = deque()
        self._forgotten: deque[Sequence] = deque()
        self._readers_turn = False
        self.prompt_tokens = 0
        """Of all answers, computed so far; those found in shared pages are not among them."""
        self._lock = threading.RLock()

    # -- sequences ------------------------------------------------------------------------------

    def open(self) -> Sequence:
        """An empty sequence. Give it back with `close`."""
        with self._lock:
            self._reclaim()
            sequence = Sequence()
            self._open.append(sequence)
            return sequence

    def close(self, sequence: Sequence) -> None:
        """Forget a sequence and free its pages; closing twice is harmless."""
        with self._lock:
            if any(other is sequence for other in self._open):
                self.rewind(sequence, 0)
                self._open = [other for other in self._open if other is not sequence]

    def forget(self, sequence: Sequence) -> None:
        """Close a sequence at the next `open` or `step`; safe wherever the collector runs."""
        self._forgotten.append(sequence)

    def _reclaim(self) -> None:
        while self._forgotten:
            self.close(self._forgotten.popleft())
        while self._submitted:
            self._open.append(self._submitted.popleft())
        for sequence in [s for s in self._open if s.submitted and not s.busy]:
            self.close(sequence)

    def rewind(self, sequence: Sequence, length: int) -> None:
        """Cut a sequence to its first `length` tokens; what is cached of them stays."""
        with self._lock:
            del sequence.tokens[length:]
            self._cut_cached(sequence, length)
            if sequence.answer is not None:
                sequence.answer.cancel()  # whoever still reads it must not wait for ever
            sequence.answer = None

    def _cut_cached(self, sequence: Sequence, length: int) -> None:
        """Keep the K/V of the first `length` tokens; a page that others may hold is kept whole or
        not at all, for it cannot be written any more."""
        cached = min(sequence.cached, length)
        if cached % PAGE and self.pages.is_shared(sequence.pages[cached // PAGE]):
            cached -= cached % PAGE
        sequence.cached, sequence.found = cached, 0
        self.pages.release(sequence.pages, keep=cached)
        if not cached and self._slots.pop(sequence.slot, None) is not None:
            sequence.slot = -1

    # -- answers --------------------------------------------------------------------------------

    def ask(
        self,
        sequence: Sequence,
        tokens: Items[int],
        sampling: Sampling,
        request: Request | None = None,
    ) -> Answer:
        """Start an answer to `tokens`, the whole conversation; what is cached of it is reused.

        Raises RequestError if it does not leave room for one token.
        """
        ids = self._checked(tokens, before=1)  # room for one token of the answer
        answer = self._answer(ids, sampling, request or Request())
        with self._lock:
            # The last token is computed again in any case: its logits are needed.
            self.rewind(sequence, min(sequence.shared_prefix(ids), len(ids) - 1))
            answer.reused = sequence.cached
            sequence.tokens = ids
            sequence.answer = answer
            return answer

    def submit(
        self, tokens: Items[int], sampling: Sampling, request: Request | None = None
    ) -> Answer:
        """Start an answer on a sequence of its own, which is closed when the answer ends. Never
        waits for a step. Raises RequestError like `ask`."""
        request = request or Request()
        if request.reader is not None and not isinstance(self.runner, HasStates):
            raise RequestError("states cannot be read here; use the host engine or the reference")
        ids = self._checked(tokens, before=1 if request.reader is None else 0)
        answer = self._answer(ids, sampling, request)
        self._submitted.append(Sequence(tokens=ids, answer=answer, submitted=True))
        return answer

    def _answer(self, ids: list[int], sampling: Sampling, request: Request) -> Answer:
        for token, _ in sampling.logit_bias:
            if token >= self._vocab_size:
                raise RequestError(
                    f"logit_bias names token {token:,}, and the vocabulary has {self._vocab_size:,}"
                )
        if sampling.ignore_eos:
            request = replace(request, end_ids=frozenset())
        if request.reader is not None:
            request = replace(request, speculate=False)
        return Answer(
            sampling=sampling,
            prompt_length=len(ids),
            limit=min(self.context, len(ids) + sampling.max_tokens),
            request=request,
            reused=0,
            clock=self.clock,
        )

    def stop(self, answer: Answer, length: int) -> None:
        """End an answer after `length` tokens; steps of other streams may have gone beyond."""
        with self._lock:
            answer.finish_reason, answer.error = "stop", None
            del answer.generated[length:]

    @property
    def sequences(self) -> int:
        """How many are open."""
        with self._lock:
            self._reclaim()
            return len(self._open)

    @property
    def busy(self) -> bool:
        """Whether an answer is unfinished, so that `step` has something to do."""
        with self._lock:
            self._reclaim()
            return any(s.busy for s in self._open)

    # -- steps ----------------------------------------------------------------------------------

    def step(self) -> list[tuple[Sequence, int]]:
        """Compute one step over all sequences with unfinished answers; the tokens it sampled.

        None are sampled while prompts are on their way; see `busy` for the end. A token that ended
        an answer is among them, but not in the sequence. A sequence whose logits are not finite is
        left out; its answer holds the error.
        """
        with self._lock:
            self._reclaim()
            # Answers may be cancelled at any time, by other threads: one order for the whole step.
            order = self._by_urgency()
            shares = self._reserved(self._planned(order), order)
            computing = {id(share.sequence) for share in shares}
            self._give_back(s for s in self._open if id(s) not in computing)
            for share in shares:
                share.sequence.found = 0
            if not shares:
                return []
            sampled: list[tuple[Sequence, int]] = []
            if shares[0].sequence.reads:
                self._read(shares)
                self._reclaim()
                return sampled
            logits = self._run(shares, "last")
            row = 0
            for share in shares:
                if share.sequence.pending == 0:
                    count = 1 + len(share.draft)
                    tokens = self._sample(share, logits[row : row + count])
                    sampled += [(share.sequence, token) for token in tokens]
                    row += count
            self._reclaim()
            return sampled

    def _planned(self, order: list[Sequence]) -> list[Share]:
        """What the next step computes, if memory allows."""
        running = []
        for sequence in order:
            if sequence.slot >= 0 or self._take_slot(sequence):
                self._begin(sequence)
                running.append(sequence)
        running = self._leading(running)
        readers = [s for s in running if s.reads]
        others = [s for s in running if not s.reads]
        if not (readers and others):
            return plan(running, self._limits)
        # No step can end both before and after the head: they take turns.
        self._readers_turn = not self._readers_turn
        if not self._readers_turn:
            return plan(others, self._limits)
        rows = min(self._limits.rows, self._limits.prompt_rows[1])
        return plan(readers, replace(self._limits, rows=rows))

    def _by_urgency(self) -> list[Sequence]:
        """Those with unfinished answers; the sort keeps equal ones in order of age."""
        return sorted((s for s in self._open if s.busy), key=lambda s: -s.priority)

    def _take_slot(self, sequence: Sequence) -> bool:
        """Give the sequence a slot, if need be one that a finished answer still keeps."""
        if len(self._slots) >= self.runner.slots:
            idle = next((s for s in self._slots.values() if s.idle), None)
            if idle is None:
                return False
            self._cut_cached(idle, 0)
        taken = next(i for i in range(len(self._slots) + 1) if i not in self._slots)
        sequence.slot = taken
        self._slots[taken] = sequence
        return True

    def _begin(self, sequence: Sequence) -> None:
        """Hold the pages that are known for what comes next of its tokens."""
        answer = sequence.answer
        assert answer is not None
        at_end_of_page = sequence.cached == PAGE * len(sequence.pages)
        # A reader wants the states of all tokens.
        if at_end_of_page and sequence.pending > PAGE and not sequence.reads:
            self.pages.find(sequence.pages, sequence.tokens[:-1])
            found = PAGE * len(sequence.pages) - sequence.cached
            sequence.cached += found
            sequence.found = found
            if not answer.preempted:  # then they are its own
                answer.reused += found
        if answer.first_step_s is None:
            answer.first_step_s = self.clock()

    def _give_back(self, sequences: Iterable[Sequence]) -> None:
        """Let those that compute nothing in this step hold nothing that it found: others need the
        memory, and it will be found again."""
        for sequence in sequences:
            found, answer = sequence.found, sequence.answer
            if found and answer is not None:
                if not answer.preempted:
                    answer.reused -= found
                self._cut_cached(sequence, sequence.cached - found)

    def _leading(self, running: list[Sequence]) -> list[Sequence]:
        """All but those whose next page another one computes already: they will find it."""
        computed: set[object] = set()
        found = []
        for sequence in running:
            if sequence.pending > 1 and not sequence.reads:
                whole = sequence.pages[: sequence.cached // PAGE]
                prefix = self.pages.next_prefix(whole, sequence.tokens)
                if prefix in computed and sequence.pending > PAGE and not sequence.cached % PAGE:
                    continue
                if prefix is not None:
                    computed.add(prefix)
            found.append(sequence)
        return found

    def _reserved(self, shares: list[Share], order: list[Sequence]) -> list[Share]:
        """The shares whose K/V have room; those that go after them give up theirs if need be."""
        places = {id(sequence): place for place, sequence in enumerate(order)}
        kept: list[Share] = []
        waiting = deque(sorted(shares, key=lambda share: places[id(share.sequence)]))
        while waiting:
            share = waiting.popleft()
            sequence = share.sequence
            if sequence.slot < 0:
                continue  # gave up its pages meanwhile
            stop = sequence.cached + share.rows + len(share.draft)
            try:
                self.pages.extend(sequence.pages, stop)
            except DoesNotFit as error:
                place = places[id(sequence)]
                if self._preempt(order[place + 1 :]):
                    waiting.appendleft(share)
                elif not any(s.pages for s in order[:place]) and sequence.answer is not None:
                    sequence.answer.error = error  # alone, and still too large
                continue  # or those before it go on, now or in their turn; it waits for them
            kept.append(share)
        return [share for share in kept if share.sequence.slot >= 0]

    def _preempt(self, later: list[Sequence]) -> bool:
        """Take the pages of one sequence: one whose answer is finished, or the last of `later`."""
        for victim in [*(s for s in self._open if s.idle), *reversed(later)]:
            if not victim.pages:
                continue
            if victim.found and victim.found == victim.cached:
                self._give_back([victim])  # nothing is lost
            else:
                self._cut_cached(victim, 0)
                if victim.busy and victim.answer is not None:
                    victim.answer.preempted += 1
            return True
        return False

    def _read(self, shares: list[Share]) -> None:
        """One step of readers, who take the states of its rows."""
        assert isinstance(self.runner, HasStates)
        states = self._run(shares, "all", self.runner.states)
        row = 0
        for share in shares:
            sequence, answer = share.sequence, share.sequence.answer
            assert answer is not None
            assert answer.request.reader is not None
            try:
                first = sequence.cached - share.rows
                answer.request.reader.take(first, states[row : row + share.rows])
            except LpuError as error:
                answer.error = error
            row += share.rows
            if not sequence.pending and not answer.done:
                answer.finish_reason = "stop"

    def _sample(self, share: Share, logits: F32) -> list[int]:
        """Tokens chosen from logits [1 + drafted, V], while the draft turns out right."""
        sequence, answer = share.sequence, share.sequence.answer
        assert answer is not None
        found: list[int] = []
        for i, row in enumerate(logits):
            if answer.done:
                break  # cancelled meanwhile, or ended
            constraint = answer.request.constraint
            try:
                token = choose(
                    row,
                    answer.sampling,
                    tokens=sequence.tokens,
                    prompt_length=answer.prompt_length,
                    allowed=None if constraint is None else constraint.allowed(),
                )
            except NumericOverflow as error:
                answer.error = error
                break
            if answer.request.logprobs is not None and token not in answer.request.end_ids:
                answer.logprobs.append(token_logprob(row, token, answer.request.logprobs))
            answer.append(token)
            found.append(token)
            if token in answer.request.end_ids:
                break
            sequence.tokens.append(token)
            if i < len(share.draft):
                if token != share.draft[i]:
                    break
                self._cached(sequence, 1)  # its K/V were computed with the draft
        if share.draft:
            right = sum(a == b for a, b in zip(found, share.draft, strict=False))
            answer.proposed += len(share.draft)
            answer.accepted += right
            sequence.lookup.learn(len(share.draft), right)
        return found

    def _cached(self, sequence: Sequence, rows: int) -> None:
        """So many more tokens have their K/V."""
        start = sequence.cached
        sequence.cached += rows
        if sequence.answer is not None:
            prompt_length = sequence.answer.prompt_length
            self.prompt_tokens += max(0, min(sequence.cached, prompt_length) - start)
        if start // PAGE != sequence.cached // PAGE:
            self.pages.offer(sequence.pages, sequence.tokens, start, sequence.cached)

    def _run(
        self,
        shares: Items[Share],
        wanted: Literal["all", "last"],
        compute: Callable[[Batch], F32] | None = None,
    ) -> F32:
        """Logits [L, V] of one step over pages that are reserved, or what else `compute` gives."""
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        rows_wanted: list[int] = []
        for share in shares:
            sequence = share.sequence
            start, stop = sequence.cached, sequence.cached + share.rows
            rows = [*sequence.tokens[start:stop], *share.draft]
            tokens += rows
            positions += range(start, start + len(rows))
            slots += [sequence.slot] * len(rows)
            count = len(tokens)
            if wanted == "all":
                rows_wanted += range(count - len(rows), count)
            elif stop == len(sequence.tokens):
                rows_wanted += range(count - 1 - len(share.draft), count)
        last = max(self._slots, default=-1) + 1
        held = [self._slots[s].pages if s in self._slots else [] for s in range(last)]
        found = (compute or self.runner.step)(
            Batch(
                tokens=np.array(tokens, np.int32),
                positions=np.array(positions, np.int32),
                slots=np.array(slots, np.int32),
                wanted=np.array(rows_wanted, np.int32),
                pages=page_rows(held),
            )
        )
        for share in shares:
            self._cached(share.sequence, share.rows)
        return found

    # -- logits ---------------------------------------------------------------------------------

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

    def compute(self, parts: Items[tuple[Sequence, int]], *, wanted: Literal["all", "last"]) -> F32:
        """One step over the next `rows` pending tokens of each (sequence, rows): logits [L, V] of
        "all" rows, or of the "last" row of each sequence that the step completes."""
        with self._lock:
            for sequence, rows in parts:
                if sequence.slot < 0 and not self._take_slot(sequence):
                    raise RequestError(
                        f"{self.runner.slots} sequences are kept, and no more fit; close one"
                    )
                self.pages.extend(sequence.pages, sequence.cached + rows)
            return self._run([Share(sequence, rows) for sequence, rows in parts], wanted)

    def _checked(self, tokens: Items[int], *, before: int) -> list[int]:
        ids = token_ids(tokens, vocab_size=self._vocab_size)
        if not ids:
            raise RequestError("there are no tokens; give a prompt that is not empty")
        if before + len(ids) > self.context:
            more = f" and {before:,} more" if before else ""
            raise RequestError(
                f"{len(ids):,} tokens{more} do not fit the context of {self.context:,}; "
                "shorten the prompt"
            )
        return ids
