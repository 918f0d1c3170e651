"""In: sequences with tokens to compute, the most urgent first. Out: whose rows a step computes.

Who is decoding goes first: a row each, and a few proposed ones while the batch is small. The other
rows go to prompts, in two rounds: a page of each, so that a short prompt never waits for a long
one, then the rest in order. By the contract no row's bits depend on its neighbours: all of this is
about time only.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from openlpu.engine.sequence import Sequence
from openlpu.graph.step import PAGE

_STEPS_OF_THOSE_WAITING = 4


@dataclass(frozen=True, slots=True)
class Limits:
    """rows: of a step. rows_of_a_sequence: of them. prompt_rows: of prompts (least, most), where
    others wait for the step. drafted_rows: up to so many rows of a step may be proposals and the
    tokens they follow; a step of few rows takes hardly longer than one of one row."""

    rows: int
    rows_of_a_sequence: int
    prompt_rows: tuple[int, int]
    drafted_rows: int


@dataclass(frozen=True, slots=True)
class Share:
    """One sequence's part of a step: the next `rows` of its pending tokens, then `draft`."""

    sequence: Sequence
    rows: int
    draft: tuple[int, ...] = ()


def plan(sequences: Items[Sequence], limits: Limits) -> list[Share]:
    """The next step. sequences: those with unfinished answers; the most urgent first."""
    prompts = [s for s in sequences if s.pending > 1]
    # The most urgent one always has a row: all others may wait for the memory that it holds.
    kept_row = bool(sequences) and sequences[0].pending > 1
    decoding = [s for s in sequences if s.pending == 1][: limits.rows - kept_row]
    shares = [Share(s, 1) for s in decoding]
    if not prompts:
        shares = _drafted(shares, limits)
    room = min(limits.rows - len(shares), _prompt_rows(prompts, limits, waited_for=bool(decoding)))
    given = dict.fromkeys(range(len(prompts)), 0)
    for most in (PAGE, limits.rows_of_a_sequence):
        for i, sequence in enumerate(prompts):
            wanted = min(sequence.pending, most, limits.rows_of_a_sequence) - given[i]
            rows = max(0, min(wanted, room))
            given[i] += rows
            room -= rows
    return shares + [Share(prompts[i], rows) for i, rows in given.items() if rows]


def _prompt_rows(prompts: Items[Sequence], limits: Limits, *, waited_for: bool) -> int:
    """Most rows of prompts in the step. The fewer, the sooner the first of them have their first
    tokens, and those that decode their next; the more, the less a row costs. So the fewest that
    are not dear, but more when many wait, for then it is the queue that takes the time."""
    least, most = limits.prompt_rows
    if len(prompts) == 1 and not waited_for:
        return limits.rows
    waiting = sum(min(s.pending, limits.rows_of_a_sequence) for s in prompts)
    wanted = max(least, waiting // _STEPS_OF_THOSE_WAITING)
    return min(wanted, most) if waited_for else wanted


def _drafted(shares: list[Share], limits: Limits) -> list[Share]:
    """The same rows, and proposals for as many sequences as the step has room for."""
    room = min(limits.rows, limits.drafted_rows) - len(shares)
    found = []
    for share in shares:
        sequence, answer = share.sequence, share.sequence.answer
        most = min(room, limits.rows_of_a_sequence - 1)
        if most > 0 and answer is not None and answer.request.speculate:
            most = min(most, answer.limit - len(sequence.tokens) - 1)
            draft = tuple(sequence.lookup.propose(sequence.tokens, most)) if most > 0 else ()
            room -= len(draft)
            share = Share(sequence, share.rows, draft)
        found.append(share)
    return found
