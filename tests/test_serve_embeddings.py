"""In: OpenAI's client. Out: /v1/embeddings answers it and refuses by name; its receipts hold."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from tiny_chat import write_tiny_chat

import openlpu
from openlpu import knobs
from openlpu.engine.embed import embed
from openlpu.engine.sequence import Answer
from openlpu.serve import embeddings
from openlpu.serve.errors import ApiError, error_body
from openlpu.serve.receipt import read_receipt, replay


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openlpu.Model]:
    folder = write_tiny_chat(tmp_path_factory.mktemp("models") / "tiny")
    cache = str(tmp_path_factory.mktemp("cache"))
    with knobs.override(CACHE=cache), openlpu.load(str(folder), threads=2) as loaded:
        yield loaded


class Feed:
    """Like the worker's: ends when the answer does. Whoever waits steps the engine."""

    def __init__(self, model: openlpu.Model, answer: Answer) -> None:
        self.model, self.answer = model, answer

    async def __aiter__(self) -> AsyncIterator[int]:
        while not self.answer.done:
            await asyncio.to_thread(self.model.engine.step)
        if False:
            yield 0

    def cancel(self) -> None:
        self.answer.cancel()


class Worker:
    def __init__(self, model: openlpu.Model) -> None:
        self.model, self.most = model, 0

    async def submit(self, *asked: Any) -> Feed:
        answer = self.model.engine.submit(*asked)
        self.most = max(self.most, self.model.engine.sequences)
        return Feed(self.model, answer)


class Bench:
    """The router in an application of its own."""

    def __init__(self, model: openlpu.Model) -> None:
        self.model, self.charged, self.worker = model, [], Worker(model)
        self.app = FastAPI()
        self.app.include_router(embeddings.router, prefix="/v1")
        self.app.state.service = SimpleNamespace(
            model=model,
            worker=self.worker,
            settings=SimpleNamespace(aliases=("text-embedding-3-small",)),
            metrics=SimpleNamespace(observe_answer=lambda answer: None),
        )
        self.app.add_exception_handler(ApiError, self.refused)  # type: ignore[arg-type]
        self.app.add_exception_handler(RequestValidationError, self.malformed)  # type: ignore[arg-type]
        self.app.middleware("http")(self.with_caller)

    async def with_caller(self, request: Request, call_next: Any) -> Any:
        request.state.caller = SimpleNamespace(charge=lambda *used: self.charged.append(used))
        return await call_next(request)

    async def refused(self, request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error_body(error), error.status)

    async def malformed(self, request: Request, error: RequestValidationError) -> JSONResponse:
        where = str(error.errors()[0]["loc"][1])
        return JSONResponse(error_body(ApiError(400, "malformed", param=where)), 400)

    @property
    def http(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://here/v1")

    @property
    def client(self) -> AsyncOpenAI:
        return AsyncOpenAI(
            api_key="x", base_url="http://here/v1", http_client=self.http, max_retries=0
        )


@pytest.fixture
def bench(model: openlpu.Model) -> Bench:
    return Bench(model)


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_openais_client_gets_the_same_bits_in_every_form(bench: Bench, encoding: Any) -> None:
    model = bench.model
    texts = ["one", "another text", "one", "Ünï¢öde 🙂"]
    tokens = [model.tokenize(text) for text in texts]
    expected = embed(model, tokens)

    async def ask() -> None:
        options = {} if encoding is None else {"encoding_format": encoding}
        for given in (texts, tokens):
            answer = await bench.client.embeddings.create(model="tiny", input=given, **options)
            assert [part.index for part in answer.data] == [0, 1, 2, 3]
            if encoding == "base64":
                found = [_decoded(part.embedding) for part in answer.data]
            else:
                found = [part.embedding for part in answer.data]
            assert np.array_equal(np.array(found), expected.astype(np.float64))
            assert answer.usage.prompt_tokens == sum(map(len, tokens))
            assert answer.usage.total_tokens == answer.usage.prompt_tokens
        for alone in (texts[1], tokens[1]):
            answer = await bench.client.embeddings.create(
                model="text-embedding-3-small", input=alone, dimensions=48, user="me"
            )
            assert np.array_equal(np.array(answer.data[0].embedding), expected[1])

    asyncio.run(ask())
    count = sum(map(len, tokens))
    assert bench.charged[:2] == [("tiny", count, 0, 0)] * 2


def _decoded(text: Any) -> list[float]:
    import base64

    return np.frombuffer(base64.b64decode(text), "<f4").tolist()


def test_long_lists_go_a_few_at_a_time(bench: Bench) -> None:
    texts = [f"text {i}" for i in range(60)]
    expected = embed(bench.model, [bench.model.tokenize(text) for text in texts])

    async def ask() -> None:
        found = await asyncio.gather(
            *(bench.client.embeddings.create(model="tiny", input=texts) for _ in range(2))
        )
        for answer in found:
            rows = np.array([part.embedding for part in answer.data])
            assert np.array_equal(rows, expected)

    asyncio.run(ask())
    assert 2 < bench.worker.most <= 2 * embeddings._AT_ONCE
    assert bench.model.engine.sequences == 0


def test_a_receipt_of_embeddings_holds(bench: Bench) -> None:
    async def ask() -> dict[str, Any]:
        body = {"model": "tiny", "input": ["one", "two"]}
        async with bench.http as http:
            plain = await http.post("/embeddings", json=body)
            assert "lpu_receipt" not in plain.json()
            told = await http.post("/embeddings", json=body, headers={"x-lpu-receipt": "true"})
        assert told.json()["data"] == plain.json()["data"]
        receipt: dict[str, Any] = told.json()["lpu_receipt"]
        return receipt

    found = replay(bench.model, read_receipt(json.dumps(asyncio.run(ask()))))
    assert [part.same for part in found] == [True, True]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": [""]}, "input"),
    ({"input": [[]]}, "input"),
    ({"input": [1, "a"]}, "input"),
    ({"input": ["a", 1]}, "input"),
    ({"input": [["a"]]}, "input"),
    ({"input": [1.5]}, "input"),
    ({"input": [True]}, "input"),
    ({"input": [-1]}, "input"),
    ({"input": [264]}, "input"),
    ({"input": [10**30]}, "input"),
    ({"input": {"a": 1}}, "input"),
    ({"input": None}, "input"),
    ({"input": "x" * 257}, "input"),
    ({"input": "x" * 1_000_000}, "input"),
    ({"input": [[1] * 257, [1]]}, "input"),
    ({"input": ["x"] * 2049}, "input"),
    ({"dimensions": 47}, "dimensions"),
    ({"dimensions": 0}, "dimensions"),
    ({"encoding_format": "hex"}, "encoding_format"),
    ({"truncate": True}, "truncate"),
    ({"user": 5}, "user"),
]


@pytest.mark.parametrize(("change", "param"), BAD)
def test_bad_requests_are_refused_by_name(bench: Bench, change: dict[str, Any], param: str) -> None:
    async def ask() -> httpx.Response:
        async with bench.http as http:
            return await http.post("/embeddings", json={"model": "tiny", "input": "a", **change})

    answer = asyncio.run(ask())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert sum(used[1] for used in bench.charged) <= 1  # of a good prompt behind a bad one
    bench.model.engine.step()
    assert bench.model.engine.sequences == 0


def test_errors_are_those_that_openais_client_knows(bench: Bench) -> None:
    async def ask() -> None:
        with pytest.raises(NotFoundError, match="does not exist"):
            await bench.client.embeddings.create(model="other", input="a")
        with pytest.raises(BadRequestError, match="48, and no other"):
            await bench.client.embeddings.create(model="tiny", input="a", dimensions=1536)

    asyncio.run(ask())


def test_a_client_that_leaves_frees_everything(bench: Bench) -> None:
    async def leave() -> None:
        texts = ["x" * 200 + str(i) for i in range(100)]
        begun: list[int] = []
        task = asyncio.create_task(
            embeddings._vectors(
                bench.app.state.service,
                embeddings.final_norm(bench.model.compiled),
                [bench.model.tokenize(text) for text in texts],
                begun,
            )
        )
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert 0 < len(begun) < 100

    asyncio.run(leave())
    bench.model.engine.step()
    assert not bench.model.engine.busy
    assert bench.model.engine.pages.held == 0
