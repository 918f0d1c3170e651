"""In: OpenAI's own client, as it is. Out: every endpoint, whole and streamed, as it expects it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel
from small_api import ALIAS, Api, roomy_model, serving_api
from small_service import until

import openlpu
from openlpu.engine.embed import embed
from openlpu.serve.receipt import read_receipt, replay

MESSAGES: Any = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi"}]},
]
WEATHER: Any = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"enum": [1, 2]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "strict": True,
}
TOOLS: Any = [{"type": "function", "function": WEATHER}]


class Point(BaseModel):
    x: bool
    y: bool


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openlpu.Model]:
    with roomy_model(tmp_path_factory.mktemp("models")) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def api(model: openlpu.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving_api(model, tmp_path_factory.mktemp("data")) as running:
        yield running


@pytest.fixture
def client(api: Api) -> Iterator[OpenAI]:
    with OpenAI(api_key="x", base_url=api.url + "/v1", max_retries=0) as made:
        yield made


def in_loop(api: Api, ask: Any) -> Any:
    async def run() -> Any:
        async with AsyncOpenAI(api_key="x", base_url=api.url + "/v1", max_retries=0) as client:
            return await ask(client)

    return asyncio.run(run())


def test_models(client: OpenAI) -> None:
    names = [card.id for card in client.models.list()]
    assert names == ["tiny", ALIAS]
    for name in names:
        card = client.models.retrieve(name)
        assert (card.id, card.object, card.owned_by) == (name, "model", "openlpu")
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("org/other")
    assert refused.value.code == "model_not_found"


# -- chat -------------------------------------------------------------------------------------


def test_chat(client: OpenAI, api: Api) -> None:
    options: Any = {
        "model": ALIAS,
        "messages": MESSAGES,
        "seed": 1,
        "n": 2,
        "max_completion_tokens": 12,
        "user": "me",
        "metadata": {"a": "b"},
        "logprobs": True,
        "top_logprobs": 2,
        "stop": ["\0\0"],
        "logit_bias": {"65": -1},
        "parallel_tool_calls": True,
        "service_tier": "auto",
        "store": False,
        "extra_body": {"top_k": 50, "min_p": 0.001, "repetition_penalty": 1.05, "priority": 1},
    }
    whole = client.chat.completions.create(**options)
    assert whole.model == ALIAS
    assert whole.id.startswith("chatcmpl-")
    assert whole.object == "chat.completion"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert whole.usage.prompt_tokens_details is not None
    assert [choice.index for choice in whole.choices] == [0, 1]

    def joined(chunks: list[Any]) -> None:
        assert {chunk.id for chunk in chunks} == {chunks[0].id}
        assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
        for choice in whole.choices:
            parts = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
            assert parts[0].delta.role == "assistant"
            assert "".join(p.delta.content or "" for p in parts) == choice.message.content
            assert [p.finish_reason for p in parts if p.finish_reason] == [choice.finish_reason]
            told = [t for p in parts if p.logprobs for t in p.logprobs.content]
            assert choice.logprobs is not None
            assert told == choice.logprobs.content
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens  # type: ignore[union-attr]
        assert chunks[-1].choices == []

    streamed = {**options, "stream": True, "stream_options": {"include_usage": True}}
    joined(list(client.chat.completions.create(**streamed)))

    async def ask(client: AsyncOpenAI) -> None:
        assert (await client.chat.completions.create(**options)).choices == whole.choices
        joined([chunk async for chunk in await client.chat.completions.create(**streamed)])

    in_loop(api, ask)


def test_a_conversation_goes_on_with_what_was_answered(client: OpenAI) -> None:
    talk = list(MESSAGES)
    for turn in range(3):
        answer = client.chat.completions.create(
            model="tiny", messages=talk, max_tokens=5, seed=turn
        )
        talk += [answer.choices[0].message, {"role": "user", "content": "go on"}]


def test_parsed_answers(client: OpenAI) -> None:
    done = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Point, max_tokens=60, seed=1
    )
    assert isinstance(done.choices[0].message.parsed, Point)
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, response_format=Point, max_tokens=60, seed=1
    ) as stream:
        for _ in stream:
            pass
        again = stream.get_final_completion()
    assert again.choices[0].message.parsed == done.choices[0].message.parsed


def test_tools(client: OpenAI, api: Api) -> None:
    options: Any = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "?"}],
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "parallel_tool_calls": False,
        "max_tokens": 120,
        "seed": 1,
    }
    answer = client.chat.completions.create(**options)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    assert choice.message.tool_calls is not None
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city", "days"}

    def joined(chunks: list[Any]) -> None:
        parts = [t for c in chunks for p in c.choices for t in p.delta.tool_calls or ()]
        assert parts[0].id.startswith("call_")
        assert "".join(p.function.arguments for p in parts) == call.function.arguments  # type: ignore[union-attr]
        assert chunks[-1].choices[0].finish_reason == "tool_calls"

    joined(list(client.chat.completions.create(**options, stream=True)))

    async def ask(client: AsyncOpenAI) -> None:
        joined([c async for c in await client.chat.completions.create(**options, stream=True)])

    in_loop(api, ask)
    talk = [
        {"role": "user", "content": "?"},
        choice.message,
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    after = client.chat.completions.create(model="tiny", messages=talk, max_tokens=3)
    assert after.choices[0].finish_reason == "length"
    del options["parallel_tool_calls"]  # who names a function wants one call
    alone = client.chat.completions.create(**options).choices[0].message.tool_calls
    assert alone is not None
    assert [one.function.arguments for one in alone] == [call.function.arguments]  # type: ignore[union-attr]


def test_a_stop_string_in_a_call_is_no_call_made(client: OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "?"}],
        "tools": TOOLS,
        "tool_choice": "required",
        "max_tokens": 120,
        "seed": 1,
        "stop": ["days"],
    }
    choice = client.chat.completions.create(**options).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.message.tool_calls is not None
    call = choice.message.tool_calls[0]
    assert call.type == "function"
    assert call.function.arguments.endswith('"')
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[-1].choices[0].finish_reason == "stop"
    told = client.responses.create(
        model="tiny",
        input="?",
        tools=[{"type": "function", "strict": True, **TOOLS[0]["function"]}],
        tool_choice="required",
        max_output_tokens=120,
        extra_body={"seed": 1, "stop": ["days"]},
    )
    assert [item.status for item in told.output] == ["incomplete"]


def test_regex_and_grammar(client: OpenAI) -> None:
    for extra, fits in (
        ({"regex": "[ab]{4}"}, lambda text: len(text) == 4 and set(text) <= set("ab")),
        ({"grammar": 'start: "x" ("y" | "z")'}, lambda text: text in ("xy", "xz")),
    ):
        answer = client.chat.completions.create(
            model="tiny", messages=MESSAGES, extra_body=extra, max_tokens=20
        )
        assert fits(answer.choices[0].message.content)
        assert answer.choices[0].finish_reason == "stop"


# -- completions ------------------------------------------------------------------------------


def test_completions(client: OpenAI, api: Api) -> None:
    options: Any = {
        "model": "tiny",
        "prompt": ["Once", "Twice"],
        "seed": 2,
        "n": 2,
        "logprobs": 2,
        "max_tokens": 10,
    }
    whole = client.completions.create(**options)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]

    def joined(chunks: list[Any]) -> None:
        for choice in whole.choices:
            parts = [p for c in chunks for p in c.choices if p.index == choice.index]
            assert "".join(p.text for p in parts) == choice.text
            assert parts[-1].finish_reason == choice.finish_reason
            assert choice.logprobs is not None
            for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
                told = [v for p in parts if p.logprobs for v in getattr(p.logprobs, name)]
                assert told == getattr(choice.logprobs, name)

    joined(list(client.completions.create(**options, stream=True)))

    async def ask(client: AsyncOpenAI) -> None:
        assert (await client.completions.create(**options)).choices == whole.choices
        joined([c async for c in await client.completions.create(**options, stream=True)])

    in_loop(api, ask)


# -- responses --------------------------------------------------------------------------------


def test_responses(client: OpenAI, api: Api) -> None:
    options: Any = {
        "model": "tiny",
        "instructions": "Be brief.",
        "input": "Say hi",
        "max_output_tokens": 12,
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 1,
        "store": False,
        "metadata": {"a": "b"},
        "extra_body": {"seed": 3},
    }
    whole = client.responses.create(**options)
    assert whole.id.startswith("resp_")
    assert whole.status in ("completed", "incomplete")
    assert whole.output_text
    assert whole.usage is not None
    assert whole.usage.output_tokens == 12
    assert whole.store is False
    assert whole.metadata == {"a": "b"}

    def checked(events: list[Any]) -> None:
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type for event in events]
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            f"response.{whole.status}",
        ]
        deltas = [e for e in events if e.type == "response.output_text.delta"]
        assert "".join(e.delta for e in deltas) == whole.output_text
        assert events[-4].text == events[-1].response.output_text == whole.output_text
        assert events[-1].response.usage == whole.usage
        assert sum(len(e.logprobs) for e in deltas) == 12

    checked(list(client.responses.create(**options, stream=True)))
    with client.responses.stream(**options) as stream:
        for _ in stream:
            pass

    async def ask(client: AsyncOpenAI) -> None:
        assert (await client.responses.create(**options)).output_text == whole.output_text
        checked([e async for e in await client.responses.create(**options, stream=True)])

    in_loop(api, ask)
    text = {"role": "user", "content": [{"type": "input_text", "text": "go on"}]}
    talk: Any = [{"role": "user", "content": "Say hi"}, *whole.output, text]
    again = client.responses.create(model="tiny", input=talk, max_output_tokens=4)
    assert again.incomplete_details is not None
    assert again.incomplete_details.reason == "max_output_tokens"


def test_responses_call_functions(client: OpenAI) -> None:
    tool: Any = {"type": "function", **WEATHER}
    options: Any = {
        "model": "tiny",
        "input": "?",
        "tools": [tool],
        "tool_choice": {"type": "function", "name": "weather"},
        "parallel_tool_calls": False,
        "max_output_tokens": 120,
        "extra_body": {"seed": 1},
    }
    whole = client.responses.create(**options)
    (call,) = whole.output
    assert call.type == "function_call"
    assert set(json.loads(call.arguments)) == {"city", "days"}
    events: list[Any] = list(client.responses.create(**options, stream=True))
    deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == call.arguments
    done = next(e for e in events if e.type == "response.function_call_arguments.done")
    assert (done.name, done.arguments) == ("weather", call.arguments)
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    talk: Any = [{"role": "user", "content": "?"}, call, result]
    after = client.responses.create(model="tiny", input=talk, max_output_tokens=3)
    assert after.status == "incomplete"


def test_responses_in_a_schema(client: OpenAI) -> None:
    done = client.responses.parse(
        model="tiny", input="?", text_format=Point, max_output_tokens=60, extra_body={"seed": 2}
    )
    assert isinstance(done.output_parsed, Point)


# -- the rest ---------------------------------------------------------------------------------


def test_embeddings(client: OpenAI, api: Api, model: openlpu.Model) -> None:
    expected = embed(model, [model.tokenize("one")])[0].tolist()
    assert client.embeddings.create(model=ALIAS, input="one").data[0].embedding == expected

    async def ask(client: AsyncOpenAI) -> list[float]:
        return (await client.embeddings.create(model=ALIAS, input=["one"])).data[0].embedding

    assert in_loop(api, ask) == expected


def test_a_receipt_comes_on_demand(client: OpenAI, model: openlpu.Model) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=9, n=2, extra_headers={"x-lpu-receipt": "true"}
    )
    receipt = read_receipt(json.dumps(answer.lpu_receipt))  # type: ignore[attr-defined]
    found = replay(model, receipt)
    assert all(repeated.same for repeated in found)
    assert [r.text for r in found] == [choice.message.content for choice in answer.choices]


def test_errors_are_the_clients_own(client: OpenAI) -> None:
    create: Any = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="gpt-5", messages=MESSAGES)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            create(model="tiny", messages=MESSAGES, stream=stream, extra_body={"best_off": 1})
        assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "best_off")
    with pytest.raises(openai.BadRequestError) as long:
        create(model="tiny", messages=[{"role": "user", "content": "x" * 3000}])
    assert long.value.code == "context_length_exceeded"


def test_an_error_within_a_stream_is_raised(
    client: OpenAI, model: openlpu.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: Any = {"max_tokens": 200, "extra_body": {"ignore_eos": True}, "stream": True}
    stream = client.chat.completions.create(model="tiny", messages=MESSAGES, **options)
    next(stream)
    with monkeypatch.context() as patch:
        patch.setattr(model.engine, "_planned", lambda: 1 // 0)
        with pytest.raises(openai.APIError, match="the engine failed"):
            for _ in stream:
                pass
    assert client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=2).choices


def test_closing_a_stream_ends_the_answer(client: OpenAI, api: Api) -> None:
    options: Any = {"max_tokens": 200, "extra_body": {"ignore_eos": True}, "stream": True}
    with client.chat.completions.create(model="tiny", messages=MESSAGES, **options) as stream:
        next(stream)
    until(lambda: api.worker.running == 0)

    async def leave(client: AsyncOpenAI) -> None:
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.1):
                await client.completions.create(
                    model="tiny", prompt="Hi", n=32, max_tokens=200, extra_body={"ignore_eos": True}
                )

    in_loop(api, leave)
    until(lambda: api.worker.running == 0)
