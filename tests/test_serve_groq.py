"""In: Groq's own client, as it is. Out: its endpoints under /openai/v1, with its timing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import groq
import pytest
from groq import AsyncGroq, Groq
from small_api import ALIAS, Api, roomy_model, serving_api

import openlpu
from openlpu.engine.embed import embed

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
OPTIONS: Any = {"model": ALIAS, "messages": MESSAGES, "seed": 1, "max_completion_tokens": 10}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openlpu.Model]:
    with roomy_model(tmp_path_factory.mktemp("models")) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def api(model: openlpu.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving_api(model, tmp_path_factory.mktemp("data")) as running:
        yield running


@pytest.fixture
def client(api: Api) -> Iterator[Groq]:
    with Groq(api_key="x", base_url=api.url, max_retries=0) as made:
        yield made


def in_loop(api: Api, ask: Any) -> Any:
    async def run() -> Any:
        async with AsyncGroq(api_key="x", base_url=api.url, max_retries=0) as client:
            return await ask(client)

    return asyncio.run(run())


def test_models(client: Groq) -> None:
    assert [card.id for card in client.models.list().data] == ["tiny", ALIAS]
    assert client.models.retrieve(ALIAS).id == ALIAS


def timed(usage: Any) -> None:
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    for seconds in (usage.queue_time, usage.prompt_time, usage.completion_time):
        assert 0 <= seconds < 60
    assert usage.prompt_time > 0
    assert usage.total_time == pytest.approx(usage.prompt_time + usage.completion_time)


def test_chat(client: Groq, api: Api) -> None:
    whole: Any = client.chat.completions.create(**OPTIONS, n=2)
    timed(whole.usage)
    assert whole.x_groq.id.startswith("req_")

    def joined(chunks: list[Any]) -> None:
        for choice in whole.choices:
            parts = [p for c in chunks for p in c.choices if p.index == choice.index]
            assert "".join(p.delta.content or "" for p in parts) == choice.message.content
        told = [chunk.x_groq for chunk in chunks if chunk.x_groq is not None]
        assert told[0].id == told[-1].id
        timed(told[-1].usage)
        assert told[-1].usage.completion_tokens == whole.usage.completion_tokens

    joined(list(client.chat.completions.create(**OPTIONS, n=2, stream=True)))

    async def ask(client: AsyncGroq) -> None:
        answer = await client.chat.completions.create(**OPTIONS, n=2)
        assert answer.choices == whole.choices
        stream = await client.chat.completions.create(**OPTIONS, n=2, stream=True)
        joined([chunk async for chunk in stream])

    in_loop(api, ask)


def test_tools_and_json(client: Groq) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    function = {"name": "f", "parameters": {**schema, "additionalProperties": False}}
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=90,
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.name == "f"
    form: Any = {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": function["parameters"]},
    }
    text = (
        client.chat.completions.create(**OPTIONS, response_format=form).choices[0].message.content
    )
    assert text is not None
    assert text.startswith("{")


def test_embeddings(client: Groq, api: Api, model: openlpu.Model) -> None:
    expected = embed(model, [model.tokenize("one")])[0].tolist()
    assert client.embeddings.create(model=ALIAS, input="one").data[0].embedding == expected

    async def ask(client: AsyncGroq) -> Any:
        return (await client.embeddings.create(model=ALIAS, input=["one"])).data[0].embedding

    assert in_loop(api, ask) == expected


def test_errors_are_the_clients_own(client: Groq) -> None:
    with pytest.raises(groq.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
    with pytest.raises(groq.BadRequestError, match="reasoning_format is not supported"):
        client.chat.completions.create(**OPTIONS, reasoning_format="hidden")


def test_the_other_endpoints_are_there_too(api: Api) -> None:
    for path, body in (
        ("completions", {"prompt": "Hi", "max_tokens": 3}),
        ("responses", {"input": "Hi", "max_output_tokens": 3}),
    ):
        answer = api.post(f"/openai/v1/{path}", {"model": "tiny", **body}).json()
        assert answer["x_groq"]["id"].startswith("req_")
        assert answer["usage"]["total_time"] > 0
