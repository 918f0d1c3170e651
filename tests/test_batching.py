"""In: many requests at once, little memory, equal beginnings. Out: answers as each is alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from openlpu.engine.batcher import Engine
from openlpu.engine.clock import ChipClock
from openlpu.engine.compiled import Compiled
from openlpu.engine.families import random_model
from openlpu.engine.logprobs import log_sum, token_logprob
from openlpu.engine.pages import PageTable
from openlpu.engine.planner import Limits, plan
from openlpu.engine.runner import Runner
from openlpu.engine.sampling import Sampling
from openlpu.engine.sequence import Answer, Request, Sequence
from openlpu.engine.speculation import PromptLookup
from openlpu.engine.verify import random_tokens
from openlpu.errors import DoesNotFit, RequestError
from openlpu.graph.step import PAGE
from openlpu.store import Store

VOCABULARY = 272


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return random_model("llama")


@pytest.fixture(scope="module")
def host(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with closing(compiled.host(store=Store(tmp_path_factory.mktemp("store")))) as runner:
        yield runner


def engine_on(runner: Runner, **options: object) -> Engine:
    return Engine(runner, context=400, vocab_size=VOCABULARY, **options)  # type: ignore[arg-type]


def finish(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


# -- the same bits ------------------------------------------------------------------------------


def mixed_requests(count: int) -> list[tuple[list[int], Sampling, Request]]:
    """Prompts of all lengths, many with equal beginnings, some that repeat themselves."""
    rng = random.Random(5)
    stems = [random_tokens(200, VOCABULARY, seed=i) for i in range(3)]
    found = []
    for i in range(count):
        stem = rng.choice(stems)[: rng.choice((5, 64, 65, 128, 190))]
        own = random_tokens(rng.randint(1, 70), VOCABULARY, seed=100 + i)
        prompt = stem + own * rng.choice((1, 1, 2))
        sampling = Sampling(
            temperature=rng.choice((0.0, 0.7, 1.5)),
            top_p=rng.choice((1.0, 0.9)),
            seed=i,
            max_tokens=rng.randint(1, 30),
            frequency_penalty=rng.choice((0.0, 0.5)),
        )
        if i % 6 == 0:  # greedy answers of random weights repeat themselves
            sampling = Sampling(max_tokens=100)
        logprobs = rng.choice((None, 0, 3))
        found.append((prompt, sampling, Request(logprobs=logprobs, priority=rng.choice((0, 1)))))
    return found


def outcome(answer: Answer) -> object:
    assert answer.error is None, answer.error
    return answer.generated, answer.finish_reason, answer.logprobs


@pytest.fixture(scope="module")
def alone(host: Runner) -> list[object]:
    found = []
    for prompt, sampling, request in mixed_requests(24):
        engine = engine_on(host, share_prefixes=False)
        answer = engine.submit(prompt, sampling, replace(request, speculate=False))
        finish(engine)
        found.append(outcome(answer))
    return found


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("most_pages", [None, 9])
def test_answers_under_load_are_those_alone(
    host: Runner, alone: list[object], share: bool, most_pages: int | None
) -> None:
    """In random order, joining and being cancelled at any time, with memory for few of them."""
    rng = random.Random(7)
    requests = list(enumerate(mixed_requests(24)))
    engine = engine_on(host, share_prefixes=share, most_pages=most_pages)
    for _ in range(2):  # the second time, beginnings are known
        rng.shuffle(requests)
        answers = {}
        for i, (prompt, sampling, request) in requests:
            answers[i] = engine.submit(prompt, sampling, request)
            if rng.random() < 0.3:
                engine.submit(prompt[:40], sampling).cancel()
            for _ in range(rng.randint(0, 2)):
                engine.step()
        finish(engine)
        assert [outcome(answers[i]) for i in range(24)] == alone
    taken = [answer.preempted for answer in answers.values()]
    assert (max(taken) > 0) == (most_pages is not None)
    assert sum(taken) < 2 * len(taken)  # not again and again for what was only found
    assert (max(answer.reused for answer in answers.values()) >= PAGE) == share
    if most_pages is None:
        assert sum(answer.accepted for answer in answers.values()) > 0
    assert engine.sequences == engine.pages.held == 0


@pytest.mark.parametrize("share", [True, False])
def test_answers_may_be_cancelled_in_the_middle_of_a_step(
    host: Runner, alone: list[object], share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As other threads do, at every point where a step looks at what is busy or asks for memory."""
    rng = random.Random(11)
    engine = engine_on(host, share_prefixes=share, most_pages=9)
    doomed: list[Answer] = []

    def and_cancel(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object, **kwargs: object) -> None:
            if doomed and rng.random() < 0.5:
                doomed.pop(rng.randrange(len(doomed))).cancel()
            function(*args, **kwargs)

        return call

    monkeypatch.setattr(engine.pages, "extend", and_cancel(engine.pages.extend))
    monkeypatch.setattr(engine.pages, "find", and_cancel(engine.pages.find))
    monkeypatch.setattr(engine.pages, "release", and_cancel(engine.pages.release))
    answers = {}
    for i, (prompt, sampling, request) in enumerate(mixed_requests(24)):
        doomed.append(engine.submit(prompt, sampling, replace(request, priority=2)))
        answers[i] = engine.submit(prompt, sampling, request)
        doomed.append(engine.submit(prompt, sampling, request))
        for _ in range(rng.randint(0, 3)):
            engine.step()
    finish(engine)
    assert [outcome(answers[i]) for i in range(24)] == alone
    assert engine.sequences == engine.pages.held == 0


@pytest.mark.parametrize("length", range(54, 64))
def test_who_waits_for_the_memory_of_others_is_not_refused(host: Runner, length: int) -> None:
    """The urgent one's prompt takes all of the pool; one that decodes needs a page just then."""
    engine = engine_on(host, most_pages=5, prompt_rows=(PAGE, PAGE))
    short = engine.submit(random_tokens(length, VOCABULARY), Sampling(max_tokens=20))
    while not short.generated:
        engine.step()
    prompt = random_tokens(300, VOCABULARY, seed=1)
    urgent = engine.submit(prompt, Sampling(max_tokens=9), Request(priority=1))
    finish(engine)
    assert short.error is urgent.error is None
    assert len(short.generated) == 20
    assert len(urgent.generated) == 9


def test_a_sequence_too_large_for_the_pool_fails_alone(host: Runner) -> None:
    engine = engine_on(host, most_pages=3)
    large = engine.submit(random_tokens(300, VOCABULARY), Sampling(max_tokens=2))
    small = engine.submit(random_tokens(30, VOCABULARY), Sampling(max_tokens=2))
    finish(engine)
    assert isinstance(large.error, DoesNotFit)
    assert small.error is None
    assert len(small.generated) == 2


def test_a_cancelled_answer_gives_its_memory_back_at_the_next_step(host: Runner) -> None:
    engine = engine_on(host)
    answers = [
        engine.submit(random_tokens(100, VOCABULARY, seed=i), Sampling(max_tokens=99))
        for i in range(2)
    ]
    while not all(answer.generated for answer in answers):
        engine.step()
    held = engine.pages.held
    answers[0].cancel()
    engine.step()
    assert engine.pages.held == held // 2
    assert answers[0].finish_reason == "cancelled"


# -- whose turn it is ---------------------------------------------------------------------------


def waiting(pending: int, cached: int = 0) -> Sequence:
    return Sequence(tokens=[1] * (cached + pending), cached=cached)


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    limits = Limits(rows=512, rows_of_a_sequence=512, prompt_rows=(32, 128), drafted_rows=8)
    long, short = waiting(4000), waiting(16)
    assert [(s.sequence, s.rows) for s in plan([long, short], limits)] == [(long, 116), (short, 16)]
    decoding = waiting(1, 30)
    shares = plan([long, decoding, short], limits)
    assert [(s.sequence, s.rows) for s in shares] == [(decoding, 1), (long, 112), (short, 16)]


def test_a_step_of_prompts_is_short_if_some_wait_and_long_if_many_do() -> None:
    limits = Limits(rows=512, rows_of_a_sequence=512, prompt_rows=(32, 128), drafted_rows=8)
    few, many = [waiting(16) for _ in range(8)], [waiting(100) for _ in range(20)]
    assert [share.sequence for share in plan(few, limits)] == few[:2]
    assert sum(share.rows for share in plan(many, limits)) == 500
    assert sum(share.rows for share in plan([waiting(1), *many], limits)) == 1 + 128
    assert [share.rows for share in plan(many[:1], limits)] == [100]  # nobody else waits


@given(
    st.lists(st.integers(1, 700), max_size=40),
    st.integers(1, 512),
    st.integers(1, 512),
    st.integers(1, 200),
    st.integers(0, 200),
)
def test_a_plan_keeps_its_limits(
    pending: list[int], rows: int, of_a_sequence: int, least: int, more: int
) -> None:
    limits = Limits(rows, min(rows, of_a_sequence), (least, least + more), 8)
    sequences = [waiting(count) for count in pending]
    shares = plan(sequences, limits)
    assert sum(share.rows for share in shares) <= rows
    assert all(0 < share.rows <= limits.rows_of_a_sequence for share in shares)
    assert all(share.rows <= share.sequence.pending for share in shares)
    assert len({id(share.sequence) for share in shares}) == len(shares)
    assert bool(shares) == bool(pending)
    assert not pending or any(share.sequence is sequences[0] for share in shares)
    decoding = [s for s in sequences if s.pending == 1]
    if decoding:
        prompts = sum(share.rows for share in shares if share.sequence.pending > 1)
        assert prompts <= least + more


def test_urgent_requests_go_first(host: Runner) -> None:
    engine = engine_on(host, prompt_rows=(16, 16))
    engine.submit([1, 2, 3], Sampling(max_tokens=90))
    engine.step()  # from now on 16 rows of prompts a step
    answers = [
        engine.submit(random_tokens(64, VOCABULARY, seed=i), Sampling(max_tokens=1), request)
        for i, request in enumerate((Request(), Request(), Request(priority=1)))
    ]
    finished: list[int] = []
    while len(finished) < 3:
        engine.step()
        finished += [i for i in range(3) if answers[i].done and i not in finished]
    assert finished == [2, 0, 1]


# -- pages of equal beginnings ------------------------------------------------------------------


class Pool:
    def __init__(self, pages: int) -> None:
        self.pages = pages

    def grow(self, pages: int) -> None:
        self.pages = pages


def found(table: PageTable, tokens: list[int]) -> list[int]:
    pages: list[int] = []
    table.find(pages, tokens)
    return pages


def test_kept_pages_go_when_there_is_no_other_room() -> None:
    table = PageTable(Pool(4), limit=4)
    tokens = list(range(3 * PAGE))
    first: list[int] = []
    table.extend(first, len(tokens))
    table.offer(first, tokens, 0, len(tokens))
    pages = list(first)
    table.release(first)
    assert (table.held, table.kept, table.free) == (0, 3, 4)
    assert found(table, [*tokens[: 2 * PAGE], *[7] * PAGE]) == pages[:2]
    other: list[int] = []
    table.extend(other, 2 * PAGE)  # the free page, and the last one of the three
    with pytest.raises(DoesNotFit):
        table.extend(other, 3 * PAGE)
    held = pages[:2]
    table.release(held)
    assert found(table, tokens) == pages[:2]


@settings(max_examples=60)
@given(st.integers(0, 2**32))
def test_pages_are_never_lent_twice(seed: int) -> None:
    """Random lending: pages have one holder unless they are shared, and then equal tokens."""
    rng = random.Random(seed)
    table = PageTable(Pool(4), limit=12)
    content: dict[int, tuple[int, ...]] = {}  # page -> every token up to its end
    held: list[tuple[list[int], list[int]]] = []
    for _ in range(60):
        if held and rng.random() < 0.4:
            pages, tokens = held.pop(rng.randrange(len(held)))
            keep = rng.choice((0, 0, PAGE))
            if keep and len(pages) > 1:
                table.release(pages, keep=keep)
                held.append((pages, tokens[:keep]))
            else:
                table.release(pages)
            continue
        tokens = [t for _ in range(rng.randint(1, 4)) for t in [rng.randrange(2)] * PAGE]
        pages = found(table, tokens)
        for place, page in enumerate(pages):
            assert content[page] == tuple(tokens[: (place + 1) * PAGE])
        known = len(pages) * PAGE
        try:
            table.extend(pages, len(tokens))
        except DoesNotFit:
            table.release(pages)
            continue
        for place in range(known // PAGE, len(pages)):
            content[pages[place]] = tuple(tokens[: (place + 1) * PAGE])
        table.offer(pages, tokens, known, len(tokens))
        held.append((pages, tokens))
        owners: dict[int, tuple[int, ...]] = {}
        for other_pages, other_tokens in held:
            for place, page in enumerate(other_pages):
                before = tuple(other_tokens[: (place + 1) * PAGE])
                assert owners.setdefault(page, before) == before
        assert table.held == len(owners)
    for pages, _ in held:
        table.release(pages)
    assert table.held == 0
    table.forget_kept()
    assert table.kept == 0


def test_a_second_turn_does_not_write_a_shared_page(host: Runner) -> None:
    engine = engine_on(host)
    tokens = random_tokens(2 * PAGE + 10, VOCABULARY)
    sequence, other = engine.open(), engine.open()
    for each in (sequence, other):
        engine.ask(each, tokens, Sampling(max_tokens=1))
        finish(engine)
    assert sequence.pages[:2] == other.pages[:2]
    branched = tokens[: PAGE + 20] + random_tokens(50, VOCABULARY, seed=1)
    answer = engine.ask(sequence, branched, Sampling(max_tokens=4))
    assert answer.reused == PAGE
    finish(engine)
    assert sequence.pages[0] == other.pages[0]
    assert sequence.pages[1] != other.pages[1]
    again = engine_on(host, share_prefixes=False)
    expected = again.submit(branched, Sampling(max_tokens=4))
    finish(again)
    assert answer.generated == expected.generated


def test_an_equal_beginning_is_computed_once_though_all_come_together(host: Runner) -> None:
    """Four of the prompts are equal, one branches after two pages; the first one is cancelled."""
    prompt = random_tokens(4 * PAGE + 10, VOCABULARY)
    branched = prompt[: 2 * PAGE + 5] + random_tokens(PAGE, VOCABULARY, seed=1)
    prompts = [prompt, prompt, branched, prompt, prompt]

    def answers_of(**options: object) -> tuple[list[Answer], int]:
        engine = engine_on(host, prompt_rows=(40, 40), **options)
        answers = [engine.submit(p, Sampling(max_tokens=3), Request(logprobs=2)) for p in prompts]
        for _ in range(3):
            engine.step()
        answers[0].cancel()
        finish(engine)
        return answers, engine.pages.held

    shared, held = answers_of()
    alone, _ = answers_of(share_prefixes=False)
    assert held == 0
    for mine, other in zip(shared[1:], alone[1:], strict=True):
        assert (mine.generated, mine.logprobs) == (other.generated, other.logprobs)
    assert [a.reused for a in alone] == [0] * 5
    assert [a.reused >= PAGE for a in shared] == [False, True, True, True, True]
    assert [a.reused for a in shared[3:]] == [4 * PAGE] * 2
    assert shared[2].reused == 2 * PAGE


# -- proposals ----------------------------------------------------------------------------------


def test_what_followed_before_is_proposed() -> None:
    lookup = PromptLookup()
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    assert lookup.propose(tokens, 8) == [4, 5, 6, 7]
    lookup.learn(4, 4)
    assert lookup.propose(tokens, 8) == [4, 5, 6, 7, 8, 9]
    assert lookup.propose(tokens, 2) == [4, 5]
    lookup.learn(2, 0)
    assert lookup.propose(tokens, 8) == []  # a pause
    assert PromptLookup().propose([1, 2], 8) == []


def test_proposals_save_steps_and_change_nothing(host: Runner) -> None:
    """A model that repeats itself: greedy answers of random weights soon do."""
    found = []
    for speculate in (True, False):
        engine = engine_on(host)
        answer = engine.submit(
            random_tokens(20, VOCABULARY), Sampling(max_tokens=120), Request(speculate=speculate)
        )
        steps = 0
        while engine.busy:
            engine.step()
            steps += 1
        found.append((answer.generated, steps, answer.accepted))
    assert found[0][0] == found[1][0]
    assert found[1][1:] == (120, 0)
    assert found[0][1] == 120 - found[0][2] < 120


# -- constraints, biases, log probabilities -----------------------------------------------------


class OnlyEven:
    """Even tokens, five of them."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def allowed(self) -> NDArray[np.bool_]:
        return np.arange(VOCABULARY) % 2 == 0

    def advance(self, token: int) -> None:
        self.seen.append(token)

    @property
    def done(self) -> bool:
        return len(self.seen) == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_holds_and_ends_an_answer(host: Runner, temperature: float) -> None:
    engine, rule = engine_on(host), OnlyEven()
    sampling = Sampling(temperature=temperature, seed=1, top_k=40, max_tokens=50)
    answer = engine.submit([1, 2, 3] * 9, sampling, Request(constraint=rule))
    finish(engine)
    assert answer.generated == rule.seen
    assert len(rule.seen) == 5
    assert all(token % 2 == 0 for token in rule.seen)
    assert answer.finish_reason == "stop"


def test_a_bias_chooses_and_forbids(host: Runner) -> None:
    engine = engine_on(host)
    plain, chosen, without = (
        engine.submit([1, 2, 3], Sampling(max_tokens=1, logit_bias=bias))
        for bias in ({}, {17: 100.0}, {17: 0.0})
    )
    finish(engine)
    assert chosen.generated == [17]
    assert without.generated == plain.generated
    banned = engine.submit([1, 2, 3], Sampling(max_tokens=1, logit_bias={plain.generated[0]: -100}))
    finish(engine)
    assert banned.generated != plain.generated


@pytest.mark.parametrize("bias", [{"a": 1}, {1: 101}, {-1: 1}, 5, {1: math.nan}])
def test_a_bias_that_is_none_is_refused(bias: object) -> None:
    with pytest.raises(RequestError, match="logit_bias"):
        Sampling(logit_bias=bias)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_log_probabilities_are_those_of_the_definition(scale: float) -> None:
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal(50_000) * scale).astype(np.float32)
    wide = logits.astype(np.longdouble)
    exact = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    found = token_logprob(logits, 123, 20)
    assert found.logprob == pytest.approx(float(exact[123]), abs=2e-5)
    order = np.argsort(-logits, kind="stable")[:20]
    assert [i for i, _ in found.top] == order.tolist()
    assert [p for _, p in found.top] == pytest.approx(exact[order].astype(float), abs=2e-5)
    assert math.exp(log_sum(logits[:1])[1]) == pytest.approx(1.0)


# -- time ---------------------------------------------------------------------------------------


def test_an_engine_lives_in_the_time_of_its_clock(host: Runner) -> None:
    clock = ChipClock(1000)
    engine = engine_on(host, clock=clock)
    answer = engine.submit([1, 2, 3], Sampling(max_tokens=3))
    while engine.busy:
        clock.ran(500)
        engine.step()
    assert answer.started_s == 0.0
    assert answer.first_token_s == 0.5
    assert answer.last_token_s == 1.5
    clock.wait_until(4.0)
    clock.wait_until(2.0)
    assert clock() == 4.0
