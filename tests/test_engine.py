"""In: tiny random models. Out: pages, batching, answers and their text behave as they say."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import house
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openlpu.engine.batcher import Engine
from openlpu.engine.bench import peak_memory_bytes
from openlpu.engine.compiled import Compiled, Precision
from openlpu.engine.evaluate import perplexity, row_losses
from openlpu.engine.families import FAMILIES, random_model
from openlpu.engine.pages import PageTable
from openlpu.engine.profile import bytes_per_row, stages, weight_bytes
from openlpu.engine.runner import ReferenceRunner
from openlpu.engine.sampling import Sampling
from openlpu.engine.sequence import Answer, Request, Sequence
from openlpu.engine.text import AnswerText
from openlpu.engine.verify import Differences, engine_for, random_tokens, rows_of
from openlpu.errors import DoesNotFit, NumericOverflow, RequestError
from openlpu.graph.step import PAGE, Batch
from openlpu.knobs import override
from openlpu.passes.recipe import Materializer
from openlpu.store import Store


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return random_model("llama")


@pytest.fixture(scope="module")
def runner(compiled: Compiled) -> ReferenceRunner:
    return compiled.reference()


@pytest.fixture
def engine(compiled: Compiled, runner: ReferenceRunner) -> Engine:
    return engine_for(runner, compiled)


def tokens_of(seed: int, count: int = 12) -> list[int]:
    return random_tokens(count, 272, seed=seed)


def answered(engine: Engine, sequence: Sequence, tokens: list[int], sampling: Sampling) -> Answer:
    answer = engine.ask(sequence, tokens, sampling)
    while not answer.done:
        engine.step()
    return answer


# -- pages ------------------------------------------------------------------------------------


class Pool:
    pages = 2

    def grow(self, pages: int) -> None:
        self.pages = pages


def test_pages_are_lent_once_and_come_back() -> None:
    pool = Pool()
    table = PageTable(pool)
    first: list[int] = []
    second: list[int] = []
    table.extend(first, 1)
    table.extend(second, 3 * PAGE)
    table.extend(first, PAGE + 1)
    assert pool.pages >= 5
    assert len(first) == 2
    assert len(second) == 3
    assert not set(first) & set(second)
    table.release(second, keep=PAGE)
    assert len(second) == 1
    table.release(first)
    assert first == []
    assert table.free == pool.pages - 1


def test_a_pool_with_a_limit_says_what_does_not_fit() -> None:
    table = PageTable(Pool(), limit=3)
    with pytest.raises(DoesNotFit, match="4 pages needed, 3 available"):
        table.extend([], 4 * PAGE)


# -- the batcher ------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_neighbours(engine: Engine, temperature: float) -> None:
    sampling = [Sampling(temperature=temperature, seed=i, max_tokens=4 + i) for i in range(4)]
    alone = []
    for i in range(4):
        sequence = engine.open()
        alone.append(answered(engine, sequence, tokens_of(i, 3 + 20 * i), sampling[i]).generated)
        engine.close(sequence)
    opened = [engine.open() for _ in range(4)]
    together = []
    for i, sequence in enumerate(opened):  # each one joins while the others are under way
        together.append(engine.ask(sequence, tokens_of(i, 3 + 20 * i), sampling[i]))
        engine.step()
    while engine.busy:
        engine.step()
    assert [answer.generated for answer in together] == alone
    assert [len(tokens) for tokens in alone] == [4, 5, 6, 7]
    for sequence in opened:
        engine.close(sequence)


def test_a_prompt_longer_than_a_step_goes_in_pieces(compiled: Compiled) -> None:
    runner = compiled.reference()
    runner.max_rows = 7
    whole = rows_of(compiled.reference(), compiled, tokens_of(1, 40))
    assert np.array_equal(rows_of(runner, compiled, tokens_of(1, 40)), whole)
    engine = engine_for(runner, compiled)
    sequence = engine.open()
    answer = answered(engine, sequence, tokens_of(1, 40), Sampling(max_tokens=1))
    assert answer.generated == [int(np.argmax(whole[-1]))]


def test_a_second_turn_computes_only_what_is_new(engine: Engine) -> None:
    sampling = Sampling(max_tokens=3)
    sequence = engine.open()
    first = answered(engine, sequence, tokens_of(1), sampling)
    assert first.reused == 0
    conversation = [*tokens_of(1), *first.generated, *tokens_of(2)]
    second = answered(engine, sequence, conversation, sampling)
    assert second.reused == 12 + 2  # the last sampled token never ran
    other = engine.open()
    assert answered(engine, other, conversation, sampling).generated == second.generated
    third = answered(engine, sequence, conversation, sampling)
    assert third.reused == len(conversation) - 1
    assert third.generated == second.generated
    branched = [*conversation[:5], 1, 2, 3]
    assert answered(engine, sequence, branched, sampling).reused == 5


def test_slots_are_reused_and_pages_return(engine: Engine) -> None:
    a, b = engine.open(), engine.open()
    sampling = Sampling(max_tokens=2)
    answered(engine, a, tokens_of(1, 100), sampling)
    answered(engine, b, tokens_of(2), sampling)
    assert (a.slot, b.slot) == (0, 1)
    engine.close(a)
    assert a.pages == []
    c = engine.open()
    answered(engine, c, tokens_of(3), sampling)
    assert c.slot == 0
    engine.close(a)  # a second time, while the slot has another owner
    assert engine.ask(c, tokens_of(3), sampling).reused == 11
    assert (b.slot, c.slot) == (1, 0)


def test_an_answer_ends_at_the_context(compiled: Compiled, runner: ReferenceRunner) -> None:
    engine = Engine(runner, context=16, vocab_size=272)
    sequence = engine.open()
    answer = answered(engine, sequence, tokens_of(1, 12), Sampling())
    assert len(answer.generated) == 4
    assert answer.finish_reason == "length"
    with pytest.raises(RequestError, match="context of 16"):
        engine.ask(sequence, tokens_of(1, 16), Sampling())
    with pytest.raises(RequestError, match="no tokens"):
        engine.ask(sequence, [], Sampling())
    with pytest.raises(RequestError, match="vocabulary"):
        engine.ask(sequence, [272], Sampling())


def test_an_end_token_is_no_part_of_the_answer(engine: Engine) -> None:
    sequence = engine.open()
    plain = answered(engine, sequence, tokens_of(1), Sampling(max_tokens=6)).generated
    end_ids = frozenset({plain[3]})
    answer = engine.ask(sequence, tokens_of(1), Sampling(max_tokens=6), Request(end_ids=end_ids))
    while not answer.done:
        engine.step()
    assert answer.generated == plain[: plain.index(plain[3])]
    assert answer.finish_reason == "stop"


def test_a_poisoned_row_fails_alone(compiled: Compiled) -> None:
    """Logits that are not finite end that answer, and no other."""

    class Poisoned(ReferenceRunner):
        def step(self, batch: Batch) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
            logits = super().step(batch)
            logits[batch.slots[batch.wanted] == 1, 5] = np.nan
            return logits

    source = Materializer(compiled.weights)
    engine = engine_for(Poisoned(compiled.graph, source), compiled)
    good, bad = engine.open(), engine.open()
    answers = [engine.ask(s, tokens_of(1), Sampling(max_tokens=3)) for s in (good, bad)]
    while engine.busy:
        engine.step()
    assert len(answers[0].generated) == 3
    assert isinstance(answers[1].error, NumericOverflow)


# -- text -------------------------------------------------------------------------------------


class Letters:
    """A decoder whose tokens are bytes."""

    def __init__(self) -> None:
        import codecs

        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(bytes([token]))

    def flush(self) -> str:
        return self._utf8.decode(b"", True)


def pieces_of(text: str, *stop: str) -> list[str]:
    answer, pieces = AnswerText(Letters(), stop=stop), []
    for byte in text.encode():
        pieces.append(answer.push(byte))
        if answer.stopped:
            return pieces
    return [*pieces, answer.flush()]


def test_a_stop_string_ends_the_text_across_tokens() -> None:
    assert "".join(pieces_of("one two three", "two")) == "one "
    assert "".join(pieces_of("one two", "two!")) == "one two"
    assert "".join(pieces_of("aab", "aab", "ab")) == ""
    assert "".join(pieces_of("xab", "bc", "ab")) == "x"
    assert pieces_of("abcabd", "abd")[:4] == ["", "", "abc", ""]


def test_no_piece_holds_a_cut_character() -> None:
    pieces = pieces_of("né 🙂 語")
    assert "".join(pieces) == "né 🙂 語"
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces_of("語🙂", "🙂")) == "語"


@given(st.text("ab语", max_size=30), st.lists(st.text("ab语", min_size=1, max_size=4), max_size=3))
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    got = "".join(pieces_of(text, *stop))
    # A stop string is seen as soon as it is complete: the shortest end decides, then the start.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    if not ends:
        assert got == text
    else:
        first_end = min(end for end, _ in ends)
        assert got == text[: min(start for end, start in ends if end == first_end)]


def test_a_bias_of_no_token_is_refused(engine: Engine, compiled: Compiled) -> None:
    biased = Sampling(logit_bias=((compiled.config.vocab_size, 1.0),))
    with pytest.raises(RequestError, match="logit_bias names token"):
        engine.submit([1, 2], biased)
    sequence = engine.open()
    with pytest.raises(RequestError, match="logit_bias names token"):
        engine.ask(sequence, [1, 2], biased)
    engine.close(sequence)


class Pieces:
    """Each token is a whole text."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def push(self, token: int) -> str:
        return self._texts[token]

    def flush(self) -> str:
        return ""


@given(
    st.lists(st.text("ab语", max_size=6), max_size=12),
    st.lists(st.text("ab语", min_size=1, max_size=6), max_size=4),
)
def test_stop_strings_are_found_as_a_search_of_all_the_text_finds_them(
    texts: list[str], stop: list[str]
) -> None:
    answer, told, all_text = AnswerText(Pieces(texts), stop=tuple(stop)), "", ""
    for token, text in enumerate(texts):
        told, all_text = told + answer.push(token), all_text + text
        found = [all_text.find(s) for s in stop if s in all_text]
        assert answer.stopped == bool(found)
        if found:
            assert told == all_text[: min(found)]
            return
        held = all_text[len(told) :]
        assert all_text.startswith(told)
        assert not held or any(s.startswith(held) for s in stop)
        assert all(not s.startswith(all_text[at:]) for s in stop for at in range(len(told)))
    assert told + answer.flush() == all_text


def test_long_stop_strings_cost_each_letter_once() -> None:
    stops = ["-" * 999 + "b", *(f"c{i}" + "-" * 990 for i in range(63))]
    started_s = time.process_time()
    text = "".join(pieces_of("-" * 5000, *stops))
    assert text == "-" * 5000
    assert time.process_time() - started_s < 2  # minutes, if letters were looked at again


# -- evaluation and measures ------------------------------------------------------------------


def test_every_token_but_the_first_is_scored_once(engine: Engine, compiled: Compiled) -> None:
    tokens = tokens_of(3, 50)
    got = perplexity(engine, tokens, window=20)
    losses = []
    for start in (0, 20, 40):
        logits = compiled.reference()
        inputs = tokens[start : min(start + 20, 49)]
        for row, target in zip(
            rows_of(logits, compiled, inputs), tokens[start + 1 :], strict=False
        ):
            wide = row.astype(np.float64)
            losses.append(float(np.log(np.exp(wide).sum()) - wide[target]))
    assert got.scored_tokens == len(losses) == 49
    assert got.mean_loss_nats == pytest.approx(np.mean(losses), rel=1e-12)
    assert got.value == pytest.approx(np.exp(np.mean(losses)))


def test_losses_are_those_of_the_definition() -> None:
    logits = (np.random.default_rng(0).standard_normal((70, 40)) * 30).astype(np.float32)
    targets = [i % 40 for i in range(70)]
    expected = [
        math.log(math.fsum(math.exp(float(x)) for x in row)) - float(row[target])
        for row, target in zip(logits, targets, strict=True)
    ]
    assert np.allclose(row_losses(logits, targets), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(NumericOverflow):
        row_losses(np.full((1, 3), np.nan, np.float32), [0])


@pytest.mark.parametrize(("count", "window"), [(1, 8), (5, 0)])
def test_perplexity_refuses_what_it_cannot_score(engine: Engine, count: int, window: int) -> None:
    with pytest.raises(RequestError):
        perplexity(engine, tokens_of(1, count), window=window)


def test_differing_bits_are_counted() -> None:
    found, base = Differences(), np.zeros((2, 3), np.float32)
    flipped = base.copy()
    flipped.view(np.uint32)[1, 2] = 0b1011
    found.add(base, base)
    assert (found.compared, found.differing) == (192, 0)
    found.add(flipped, base)
    assert found.differing == 3
    found.add(base[:1], base)
    assert found.differing == 3 + 192
    found.add(-base, base)  # -0.0 equals 0.0, but its bits differ
    assert found.differing == 3 + 192 + 6


def test_fusion_lowers_the_bytes_between_ops(compiled: Compiled) -> None:
    traffic = {name: bytes_per_row(graph) for name, graph in compiled.stages}
    names = list(traffic)
    assert traffic[names[-1]] < traffic["quantize_w8"]
    assert weight_bytes(compiled.graph) < weight_bytes(compiled.float_graph) / 3


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_weight_bytes_are_those_of_the_pack(precision: Precision, tmp_path: Path) -> None:
    model = random_model("llama", precision=precision)
    with closing(model.host(store=Store(tmp_path), threads=1, kernels="plain")) as host:
        # The pack fills rows up to whole panels, which shows in so small a model.
        assert host.packed_bytes / 1.2 < weight_bytes(model.graph) <= host.packed_bytes


def test_times_of_random_layers_leave_no_trace(compiled: Compiled, tmp_path: Path) -> None:
    with override(CACHE=str(tmp_path)):
        first = [name for name, _ in compiled.stages].index("quantize_w8") + 1
        upto = replace(compiled, stages=compiled.stages[:first])
        assert stages(upto, timed=True)[-1].layer_1_row_us
    assert list(tmp_path.iterdir()) == []


def test_peak_memory_of_a_child_is_its_own() -> None:
    held = np.ones(300 << 20, np.uint8)
    code = "from openlpu.engine.bench import peak_memory_bytes as p; print(p())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=house.REPOSITORY, capture_output=True, check=True
    )
    assert int(done.stdout) < held.nbytes
    assert peak_memory_bytes() > held.nbytes


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_random_models_say_something(precision: Precision) -> None:
    """A proof over logits that are all NaN, or all the same, would prove nothing."""
    for family in FAMILIES:
        model = random_model(family, precision=precision)
        rows = rows_of(model.reference(), model, tokens_of(1, 30))
        assert np.isfinite(rows).all()
        assert len(set(rows.argmax(axis=1).tolist())) > 3
        assert 0.05 < rows.std() < 50
