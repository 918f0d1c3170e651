"""In: a whole tiny chat model. Out: the Python API answers, streams, scores, keeps its memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_chat import write_tiny_chat

import openlpu
from openlpu import knobs
from openlpu.errors import (
    CheckpointError,
    NumericOverflow,
    RequestError,
    TemplateError,
    UnsupportedTarget,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openlpu.Model]:
    cache = str(tmp_path_factory.mktemp("cache"))
    with knobs.override(CACHE=cache), openlpu.load(str(folder), threads=2) as loaded:
        yield loaded


def test_a_stream_is_the_answer_in_pieces(model: openlpu.Model) -> None:
    stream = model.stream("Hi", max_tokens=24, ignore_eos=True)
    pieces = list(stream)
    result = model.generate("Hi", max_tokens=24, ignore_eos=True)
    assert "".join(pieces) == result.text == str(result) == stream.result().text
    assert all(pieces)
    assert len(result.tokens) == result.stats.generated_tokens == 24
    assert result.finish_reason == "length"
    assert result.stats.prompt_tokens == len(model.prompt_tokens("Hi"))
    assert result.stats.seed is None


def test_the_first_token_is_the_argmax_of_the_logits(model: openlpu.Model) -> None:
    tokens = model.prompt_tokens("Hi")
    assert model.generate("Hi", max_tokens=1, ignore_eos=True).tokens == (
        int(np.argmax(model.logits(tokens))),
    )


def test_all_rows_hold_the_last_row_of_every_prefix(model: openlpu.Model) -> None:
    tokens = model.tokenize("The same bits.")
    rows = model.logits(tokens, all_rows=True)
    assert rows.shape == (len(tokens), 264)
    assert rows.dtype == np.float32
    for length in (1, 5, len(tokens)):
        assert np.array_equal(model.logits(tokens[:length]), rows[length - 1])


def test_host_and_reference_answer_alike(model: openlpu.Model) -> None:
    reference = openlpu.Model(model.checkpoint, model.compiled, model.compiled.reference())
    for options in ({}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}):
        settings = {"max_tokens": 12, **options}
        assert (
            model.generate("Hi", **settings).tokens == reference.generate("Hi", **settings).tokens
        )


def test_a_seed_repeats_an_answer_and_none_reports_its_own(model: openlpu.Model) -> None:
    settings = {"temperature": 1.0, "max_tokens": 16, "ignore_eos": True}
    first = model.generate("Hi", **settings)
    assert first.stats.seed is not None
    assert first.stats.seed < 2**53  # whole in any reader of JSON
    assert model.generate("Hi", seed=first.stats.seed, **settings).tokens == first.tokens
    assert model.generate("Hi", seed=first.stats.seed ^ 1, **settings).tokens != first.tokens


def test_streams_run_side_by_side(model: openlpu.Model) -> None:
    settings = {"temperature": 1.0, "max_tokens": 20, "ignore_eos": True}
    alone = [model.generate(f"Hi {i}", seed=i, **settings).tokens for i in range(3)]
    streams = [model.stream(f"Hi {i}", seed=i, **settings) for i in range(3)]
    next(streams[1])
    assert [stream.result().tokens for stream in streams] == alone


def test_a_stop_string_ends_an_answer(model: openlpu.Model) -> None:
    settings = {"temperature": 1.0, "seed": 4, "max_tokens": 60, "ignore_eos": True}
    text = model.generate("Hi", **settings).text
    stop = text[5:8]
    result = model.generate("Hi", stop=stop, **settings)
    assert result.text == text[: text.index(stop)]
    assert result.finish_reason == "stop"
    assert stop not in result.text


def test_a_stream_left_early_gives_everything_back(model: openlpu.Model) -> None:
    free = model.engine.pages.free
    stream = model.stream("Hi", max_tokens=50, ignore_eos=True)
    next(stream)
    assert model.engine.pages.free == free - 1
    stream.close()
    assert model.engine.pages.free == free
    assert list(stream) == []
    assert stream.result().finish_reason == "cancelled"
    unread = model.stream("Hi")
    del unread
    assert not model.engine.busy
    model.engine.step()  # what the collector left is freed here
    assert model.engine.sequences == 0


def test_python_threads_share_a_model(model: openlpu.Model) -> None:
    settings = {"temperature": 1.0, "max_tokens": 60, "ignore_eos": True}

    def said(i: int) -> list[openlpu.Result]:
        return [model.generate(f"Hi {i} {j}", seed=i, **settings) for j in range(3)]

    alone = [[result.tokens for result in said(i)] for i in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(said, range(3)))
    assert [[result.tokens for result in results] for results in together] == alone
    assert model.engine.sequences == 0


def test_a_stopped_answer_has_no_tokens_of_its_neighbours_steps(model: openlpu.Model) -> None:
    settings = {"temperature": 1.0, "seed": 4, "max_tokens": 60, "ignore_eos": True}
    stop = model.generate("Hi", **settings).text[5:8]
    alone = model.generate("Hi", stop=stop, **settings)
    stopping, other = model.stream("Hi", stop=stop, **settings), model.stream("Ho", **settings)
    other.result()  # its steps serve both
    assert stopping.result().tokens == alone.tokens


def test_a_stream_whose_sequence_was_taken_ends(model: openlpu.Model) -> None:
    chat = openlpu.Chat(model)
    first = chat.send("One")
    next(first)
    chat.send("Two")
    assert first.result().finish_reason == "cancelled"
    chat.close()


def test_tokens_of_any_integer_kind_are_tokens(model: openlpu.Model) -> None:
    tokens = model.prompt_tokens("Hi")
    expected = model.logits(tokens, all_rows=True)
    for kind in (np.int32, np.int64, np.uint16):
        assert np.array_equal(model.logits(np.array(tokens, kind), all_rows=True), expected)
        assert np.array_equal(model.logits(np.array(tokens, kind)), expected[-1])
    sampling = openlpu.Sampling(max_tokens=4)
    answers = [model.answer(t, sampling).result().tokens for t in (tokens, np.array(tokens))]
    assert answers[0] == answers[1]
    assert model.detokenize(np.array([*b"ab"])) == "ab"


@pytest.mark.parametrize("bad", [[1.5], np.array([1.0]), None, 5, "ab", [[1]], [10**12], [-1]])
def test_tokens_that_are_none_are_refused(model: openlpu.Model, bad: Any) -> None:
    for take in (model.logits, model.detokenize):
        with pytest.raises(RequestError, match="token"):
            take(bad)


def test_requests_of_the_wrong_type_are_refused(model: openlpu.Model, folder: Path) -> None:
    for prompt in (None, 5, b"Hi", [5]):
        with pytest.raises(RequestError, match="prompt"):
            model.generate(prompt)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="stop is 5"):
        model.generate("Hi", stop=5)
    for threads in ("2", 1.5, True, -1, 10**6):
        with pytest.raises(RequestError, match="threads is"):
            openlpu.load(str(folder), threads=threads)  # type: ignore[arg-type]
    with knobs.override(THREADS=-1), pytest.raises(RequestError, match="LPU_THREADS is -1"):
        openlpu.load(str(folder))
    for name in ("", " ", None):
        with pytest.raises(RequestError, match="name is empty"):
            openlpu.load(name)  # type: ignore[arg-type]
    assert model.engine.sequences == 0


def test_a_hostile_template_s_megabytes_are_not_tokenized(
    model: openlpu.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "chat", lambda _: "x" * 20_000)
    monkeypatch.setattr(model.tokenizer, "encode", None)
    with pytest.raises(RequestError, match="20,000 characters cannot fit the context of 256"):
        model.generate("Hi")


def test_a_bad_tokenizer_is_told_before_packing(tmp_path: Path) -> None:
    folder = write_tiny_chat(tmp_path / "bad")
    (folder / "tokenizer.json").write_text("{}")
    with knobs.override(CACHE=str(tmp_path / "cache")):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            openlpu.load(str(folder))
        with pytest.raises(UnsupportedTarget, match="mmx"):
            openlpu.load("/no/such/model", kernels="mmx")
    assert not (tmp_path / "cache" / "pack").exists()


def test_text_is_a_user_s_message_unless_raw(model: openlpu.Model) -> None:
    wrapped = model.prompt_tokens("Hi")
    assert wrapped == model.prompt_tokens([{"role": "user", "content": "Hi"}])
    assert wrapped[0] == 256
    assert model.prompt_tokens("Hi", raw=True) == [*b"Hi"]
    assert model.tokenize("<|end|>") == [*b"<|end|>"]
    assert model.detokenize([*"né".encode()]) == "né"
    with pytest.raises(RequestError, match="raw"):
        model.prompt_tokens([{"role": "user", "content": "Hi"}], raw=True)


def test_a_chat_keeps_its_memory(model: openlpu.Model) -> None:
    chat = openlpu.Chat(model, system="Be brief.", sampling=openlpu.Sampling(max_tokens=10))
    first = chat.send("One")
    said = first.result()
    chat.keep(first)
    assert first.stats.reused_tokens == 0
    before = chat.cached_tokens
    second = chat.send("Two")
    result = second.result()
    chat.keep(second)
    assert result.stats.reused_tokens >= before - 10
    assert [m["role"] for m in chat.messages] == ["system", *(["user", "assistant"] * 2)]
    expected = model.generate(chat.messages[:-1], max_tokens=10)
    assert result.tokens == expected.tokens
    with pytest.raises(RequestError, match="context"):
        chat.send("x" * 300)
    assert len(chat.messages) == 5
    chat.reset()
    assert chat.cached_tokens == 0
    assert chat.send("One").result().tokens == said.tokens
    chat.close()
    assert model.engine.sequences == 0


def test_a_chat_goes_on_after_an_answer_was_cut(model: openlpu.Model) -> None:
    chat = openlpu.Chat(model)
    stream = chat.send("One")
    piece = next(stream)
    chat.keep(stream)
    assert chat.messages[-1]["content"] == piece
    follow_up = chat.send("Two").result()
    assert follow_up.tokens == model.generate(chat.messages).tokens
    chat.close()


def test_perplexity_is_that_of_its_logits(model: openlpu.Model) -> None:
    text = "Some text to be scored."
    tokens = model.tokenize(text)
    rows = model.logits(tokens, all_rows=True).astype(np.float64)[:-1]
    losses = np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), tokens[1:]]
    assert model.perplexity(text).value == pytest.approx(np.exp(losses.mean()))


def test_requests_that_cannot_be_met_are_refused(model: openlpu.Model, folder: Path) -> None:
    with pytest.raises(RequestError, match="context of 256"):
        model.generate("x" * 300)
    with pytest.raises(RequestError, match="vocabulary"):
        model.logits([264])
    with pytest.raises(RequestError, match="top_q"):
        model.stream("Hi", top_q=1)
    with pytest.raises(RequestError, match="precision"):
        openlpu.load(str(folder), precision="w2")
    with pytest.raises(RequestError, match="context is 1000"):
        openlpu.load(str(folder), context=1000)
    assert model.engine.sequences == 0


def test_a_model_without_a_template_takes_text(tmp_path: Path) -> None:
    folder = write_tiny_chat(tmp_path / "base", template=None)
    with knobs.override(CACHE=str(tmp_path)), openlpu.load(str(folder)) as base:
        assert base.prompt_tokens("Hi") == [*b"Hi"]
        with pytest.raises(RequestError, match="no chat template"):
            base.generate([{"role": "user", "content": "Hi"}])


def test_a_template_that_fails_says_so(tmp_path: Path) -> None:
    folder = write_tiny_chat(tmp_path / "bad", template="{{ messages[0].content // 2 }}")
    with knobs.override(CACHE=str(tmp_path)):
        bad = openlpu.load(str(folder))
    with bad, pytest.raises(TemplateError, match="chat template failed"):
        bad.generate("Hi")


def test_logits_that_are_not_finite_are_an_error(
    model: openlpu.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(batch: object) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
        return np.full((1, 264), np.nan, np.float32)

    monkeypatch.setattr(model.runner, "step", poisoned)
    with pytest.raises(NumericOverflow):
        model.generate("Hi")
    with pytest.raises(NumericOverflow):
        model.logits([1])
