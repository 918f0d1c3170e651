"""In: the service with a real model, and clients that break every rule. Out: nobody else notices.

The guard's own rules are tested in test_serve_ops.py; here the faults meet the engine behind it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from small_api import Api, roomy_model, serving_api
from small_service import bearer, received, until
from test_serve_structured import REFUSED_SCHEMAS
from tiny_chat import write_tiny_chat

import openlpu
from openlpu import knobs
from openlpu.engine.batcher import Engine
from openlpu.host import HostModel
from openlpu.serve.app import malformed
from openlpu.serve.database import Database
from openlpu.serve.embeddings import EmbeddingRequest
from openlpu.serve.keys import KeyStore
from openlpu.serve.schema.base import Body
from openlpu.serve.schema.chat import ChatRequest
from openlpu.serve.schema.completions import CompletionRequest
from openlpu.serve.schema.responses import ResponseRequest
from openlpu.serve.tokens import DetokenizeRequest, TokenizeRequest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
LONG = {"model": "tiny", "prompt": "Hi", "max_tokens": 1800, "ignore_eos": True}
SHORT = {"model": "tiny", "prompt": "Hi", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
JSON_TYPE = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openlpu.Model]:
    with roomy_model(tmp_path_factory.mktemp("models")) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def right(model: openlpu.Model, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What SHORT is answered while nothing is wrong."""
    with serving_api(model, tmp_path_factory.mktemp("data")) as api:
        return said(api, SHORT)


def said(api: Api, body: dict[str, Any]) -> str:
    answer = api.post(COMPLETIONS, body)
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def raw(body: dict[str, Any], path: str = COMPLETIONS) -> bytes:
    """A request as it goes over the wire."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(content) + content


@contextlib.contextmanager
def connected(
    api: Api, count: int, *, buffer_bytes: int | None = None
) -> Iterator[list[socket.socket]]:
    """Open connections."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.socket()) for _ in range(count)]
        for client in clients:
            if buffer_bytes is not None:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            client.settimeout(20)
            client.connect(("127.0.0.1", api.port))
        yield clients


def idle(api: Api) -> bool:
    """Whether the engine does nothing and holds nothing for anybody."""
    worker, engine = api.worker, api.service.model.engine
    return worker.running == worker.waiting == engine.sequences == engine.pages.held == 0


def refusal(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer that is none: a short line."""
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert len(error["message"]) < 400
    return error


# -- clients that go ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_before_the_first_token(
    model: openlpu.Model, right: str, tmp_path: Path, stream: bool
) -> None:
    """At once, in the queue, and while a long prompt is computed."""
    with serving_api(model, tmp_path, most_running=2) as api:
        prompt = {**LONG, "prompt": [*range(32, 127)] * 19, "max_tokens": 200, "stream": stream}
        for patience_s in (0.0, 0.02, 0.1):
            with connected(api, 6) as clients:
                for client in clients:
                    client.sendall(raw(prompt))
                time.sleep(patience_s)
        until(lambda: idle(api))
        assert said(api, SHORT) == right


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_in_the_middle_stops_the_engine(
    model: openlpu.Model, right: str, tmp_path: Path, stream: bool
) -> None:
    with serving_api(model, tmp_path) as api:
        before = model.engine.pages.kept
        with connected(api, 1) as (client,):
            client.sendall(raw({**LONG, "n": 4, "stream": stream}))
            begun = api.worker.steps
            until(lambda: api.worker.running == 4 and api.worker.steps > begun + 5)
            if stream:
                assert client.recv(10).startswith(b"HTTP/1.1 2")
        until(lambda: idle(api))
        steps = api.worker.steps
        time.sleep(0.1)
        assert api.worker.steps == steps
        # Four answers of 1,800 tokens would have taken 116 pages.
        assert model.engine.pages.kept - before < 100
        assert said(api, SHORT) == right


def test_who_never_ends_its_request_holds_nothing(
    model: openlpu.Model, right: str, tmp_path: Path
) -> None:
    """Nothing sent, half a header, half a body, half a chunk; the others are answered meanwhile."""
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"
    halves = (
        b"",
        head,
        head + b"content-length: 100\r\n\r\n{",
        head + b"transfer-encoding: chunked\r\n\r\n64\r\n{",
        raw(LONG)[:-1],
    )
    with (
        serving_api(model, tmp_path, head_timeout_s=1.0, body_timeout_s=1.0) as api,
        connected(api, 100) as clients,
    ):
        for index, client in enumerate(clients):
            client.sendall(halves[index % len(halves)])
        assert said(api, SHORT) == right
        for index, client in enumerate(clients):
            answer = received(client)
            status = b"" if not halves[index % len(halves)] else b"HTTP/1.1 408 "
            assert answer.startswith(status), answer
        assert idle(api)
        assert api.guard.open_requests == api.guard.held_bytes == 0


def test_streams_that_nobody_reads_hinder_nobody(
    model: openlpu.Model, right: str, tmp_path: Path
) -> None:
    """What is not read fills the system's buffers, then the answer waits until its time is up."""
    messages = [{"role": "user", "content": "Hi"}]
    talkative = {"model": "tiny", "messages": messages, "max_tokens": 1800, "ignore_eos": True}
    talkative |= {"n": 4, "stream": True, "logprobs": True, "top_logprobs": 20}
    with (
        serving_api(model, tmp_path, request_timeout_s=4.0) as api,
        connected(api, 2, buffer_bytes=4096) as clients,
    ):
        for client in clients:
            client.sendall(raw(talkative, CHAT).replace(b"host", b"connection: close\r\nhost", 1))
        until(lambda: api.worker.running == 8)
        for _ in range(5):
            assert said(api, SHORT) == right
        until(lambda: api.guard.open_requests == 0, 15)
        until(lambda: idle(api))
        for client in clients:
            assert b"[DONE]" not in received(client)
        assert said(api, SHORT) == right


# -- bodies -------------------------------------------------------------------------------------


def nested(depth: int, begin: str = '{"a":', end: str = "}") -> str:
    return begin * depth + "1" + end * depth


MESSAGES = '"model":"tiny","max_tokens":2,"messages":[{"role":"user","content":"Hi"}]'
TOOL = '"tools":[{"type":"function","function":{"name":"f","parameters":%s}}]'
SCHEMA = '"response_format":{"type":"json_schema","json_schema":{"name":"x","schema":%s}}'
PARTS = {
    **{f"tool {depth} deep": TOOL % nested(depth) for depth in (100, 800, 20_000)},
    **{f"schema {depth} deep": SCHEMA % nested(depth) for depth in (100, 800, 20_000)},
    **{f"metadata {depth} deep": f'"metadata":{nested(depth)}' for depth in (100, 800, 20_000)},
    **{f"seed {value}"[:20]: f'"seed":{value}' for value in ("NaN", "1e400", "9" * 4000)},
    **{f"top_p {value}": f'"top_p":{value}' for value in ("NaN", "-Infinity", "1e999")},
    "NaN in a schema": SCHEMA % '{"type":"number","minimum":NaN}',
    "NaN in a tool": TOOL % '{"const":NaN}',
    "digits in a tool": TOOL % ('{"const":%s}' % ("9" * 4000)),
    "digits": f'"n":{"9" * 5000}',
    "surrogate as a name": '"\\ud800":1',
    "surrogate in metadata": '"metadata":{"\\ud800":1}',
    "surrogate in a tool": TOOL % '{"\\ud800":"\\udfff"}',
    "surrogate in a regex": '"regex":"\\ud800"',
    "surrogate in logit_bias": '"logit_bias":{"\\ud800":1}',
    "null byte as a name": '"\\u0000":1',
    "null byte in a grammar": '"grammar":"start: \\u0000"',
    "a comma too many": '"n":1,',
}
BODIES: dict[str, bytes] = {
    **{name: f"{{{MESSAGES},{part}}}".encode() for name, part in PARTS.items()},
    "no UTF-8": b'{"model":"\xff\xfe"}',
    "cut UTF-8": f"{{{MESSAGES[:-4]}".encode() + b"\xf0\x9f",
    "null bytes": b"\0" * 1000,
    "many keys": b"{" + b",".join(b'"k%d":1' % i for i in range(50_000)) + b"}",
    "many messages": b'{"model":"tiny","messages":[%s]}' % b",".join([b'{"role":"x"}'] * 50_000),
    "surrogate": f"{{{MESSAGES}}}".replace("Hi", "\\ud83d").encode(),
    "gzip": b"\x1f\x8b" + b"\0" * 100,
}


def test_malformed_bodies_are_refused_in_a_line(
    model: openlpu.Model, right: str, tmp_path: Path
) -> None:
    """Each as it is and in chunks; none is a failure of the service."""
    with serving_api(model, tmp_path) as api:
        for name, body in BODIES.items():
            for content in (body, iter([body[:7], body[7:]])):
                answer = api.post(CHAT, content=content, headers=JSON_TYPE)
                # A tool's parameters are only shown to the model, so what is odd there is fine.
                assert answer.status_code in ((200, 400) if "tool" in name else (400,)), name
                if answer.status_code == 400:
                    assert refusal(answer)["type"] == "invalid_request_error", name
        digits = {"model": "tiny", "input": "Hi", "dimensions": 10**4000}
        refusal(api.post("/v1/embeddings", digits))
        assert said(api, SHORT) == right
        events = [json.loads(line)["event"] for line in api.log.getvalue().splitlines()]
        assert set(events) == {"request"}


MILLION = [{}] * 1_000_000
SAID = {"model": "x", "messages": [{"role": "user", "content": "Hi"}]}
MILLIONS: list[tuple[type[Body], dict[str, Any]]] = [
    (ChatRequest, {"model": "x", "messages": MILLION}),
    (ChatRequest, {**SAID, "messages": [{"role": "assistant", "tool_calls": MILLION}]}),
    (ChatRequest, {**SAID, "messages": [{"role": "user", "content": MILLION}]}),
    (ChatRequest, {**SAID, "logit_bias": dict.fromkeys(map(str, range(1_000_000)), "")}),
    (ChatRequest, {**SAID, "metadata": dict.fromkeys(map(str, range(1_000_000)), 1)}),
    (ChatRequest, {**SAID, **dict.fromkeys(map(str, range(1_000_000)))}),
    (ChatRequest, {**SAID, "messages": [dict.fromkeys(map(str, range(1_000_000)))]}),
    (ChatRequest, {**SAID, "stop": MILLION}),
    (ChatRequest, {**SAID, "tools": MILLION}),
    (ChatRequest, {**SAID, "modalities": MILLION}),
    (CompletionRequest, {"model": "x", "prompt": MILLION}),
    (CompletionRequest, {"model": "x", "prompt": [MILLION]}),
    (CompletionRequest, {"model": "x", "prompt": [[1], MILLION]}),
    (ResponseRequest, {"model": "x", "input": MILLION}),
    (ResponseRequest, {"model": "x", "input": [{"role": "user", "content": MILLION}]}),
    (ResponseRequest, {"model": "x", "input": "Hi", "tools": MILLION}),
    (ResponseRequest, {"model": "x", "input": "Hi", "include": MILLION}),
    (EmbeddingRequest, {"model": "x", "input": MILLION}),
    (EmbeddingRequest, {"model": "x", "input": [MILLION]}),
    (TokenizeRequest, {"messages": MILLION}),
    (DetokenizeRequest, {"tokens": MILLION}),
]


@pytest.mark.parametrize(("kind", "body"), MILLIONS)
def test_a_million_faults_are_told_as_one(kind: type[Body], body: dict[str, Any]) -> None:
    """Whoever checks bodies serves all the others, too: nobody can make it count."""
    started_s = time.process_time()
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() < 20
    assert malformed(caught.value.errors()).status == 400
    assert time.process_time() - started_s < 1


def test_bodies_that_are_too_long_are_not_kept(
    model: openlpu.Model, right: str, tmp_path: Path
) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(50):
            yield b" " * 10_000

    with serving_api(model, tmp_path, body_bytes=100_000) as api:
        contents: list[Any] = [b"{" * 100_001, chunks(), b'{"prompt":"' + b"x" * 200_000 + b'"}']
        for content in contents:
            answer = api.post(COMPLETIONS, content=content, headers=JSON_TYPE)
            assert (answer.status_code, refusal(answer)["code"]) == (413, "request_too_large")
        for prompt in ("x" * 90_000, [1] * 20_000):  # short enough to read, too long to answer
            answer = api.post(COMPLETIONS, {"model": "tiny", "prompt": prompt})
            assert answer.status_code == 400
            assert refusal(answer)["code"] == "context_length_exceeded" or "context" in answer.text
        assert api.guard.held_bytes == 0
        assert said(api, SHORT) == right


# -- too much -----------------------------------------------------------------------------------


def test_more_requests_than_pages_are_all_answered_right(
    model: openlpu.Model, right: str, tmp_path: Path
) -> None:
    """Six pages for 12 answers of three pages each; what can never fit is refused."""
    assert isinstance(model.runner, HostModel)
    asked = [
        {**SHORT, "prompt": chr(65 + i) * (20 + i), "max_tokens": 120, "seed": i, "temperature": 1}
        for i in range(12)
    ]
    with serving_api(model, tmp_path / "roomy") as api:
        alone = [said(api, body) for body in asked]
    roomy = model.engine
    model.engine = Engine(
        model.runner,
        context=model.context,
        vocab_size=model.compiled.config.vocab_size,
        most_pages=6,
    )
    try:
        with serving_api(model, tmp_path / "tight") as api, ThreadPoolExecutor(14) as clients:
            too_long = [
                clients.submit(api.post, COMPLETIONS, {**SHORT, **change})
                for change in ({"prompt": "x" * 1000}, {"prompt": "x" * 300, "max_tokens": 1500})
            ]
            assert list(clients.map(lambda body: said(api, body), asked)) == alone
            for answer in too_long:
                assert answer.result().status_code == 400
                assert "page" in refusal(answer.result())["message"]
            assert said(api, SHORT) == right
            until(lambda: idle(api))
            page = api.get("/metrics").text
            assert "lpu_preemptions_total 0.0" not in page
    finally:
        model.engine = roomy


EXPLODING = ("product of anyOf", "a ring", "long const")


def test_schemas_that_explode_hinder_nobody(
    model: openlpu.Model, right: str, tmp_path: Path
) -> None:
    bombs = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
        for schema in map(REFUSED_SCHEMAS.get, EXPLODING)
    ]
    bombs += [{"regex": "(((a{1000}){1000}){1000})"}, {"grammar": 'start: start "a"'}]
    with serving_api(model, tmp_path) as api, ThreadPoolExecutor(len(bombs)) as clients:
        answers = [clients.submit(api.chat, **bomb) for bomb in bombs]
        waited_s = 0.0
        while not all(answer.done() for answer in answers):
            began_s = time.monotonic()
            assert said(api, SHORT) == right
            waited_s = max(waited_s, time.monotonic() - began_s)
        for answer in answers:
            assert answer.result().status_code == 400
            assert refusal(answer.result())["param"] in ("response_format", "regex", "grammar")
        assert waited_s < 3.0
        assert idle(api)


def test_a_template_that_never_ends_is_cut(tmp_path: Path) -> None:
    bomb = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    folder = write_tiny_chat(tmp_path / "tiny", template=bomb)
    with (
        knobs.override(CACHE=str(tmp_path / "cache")),
        openlpu.load(str(folder), threads=2) as bombed,
        serving_api(bombed, tmp_path / "data") as api,
        ThreadPoolExecutor(3) as clients,
    ):
        answers = [clients.submit(api.chat, stream=stream) for stream in (True, False, False)]
        while not all(answer.done() for answer in answers):
            assert len(said(api, SHORT)) >= 1
            assert api.get("/health").status_code == 200
        for answer in answers:
            assert answer.result().status_code == 400
            assert "chat template" in refusal(answer.result())["message"]


# -- keys and rows ------------------------------------------------------------------------------


def test_a_key_revoked_elsewhere_ends_its_streams_and_no_others(
    model: openlpu.Model, tmp_path: Path
) -> None:
    with serving_api(model, tmp_path) as api, contextlib.closing(Database(tmp_path)) as other:
        keys = KeyStore(other)  # as another process has them
        (bad, bad_secret), (_, good_secret) = keys.add("Bob"), keys.add("Ada")
        lines: dict[str, list[str]] = {bad_secret: [], good_secret: []}

        def stream(secret: str, tokens: int) -> float:
            body = {**LONG, "stream": True, "max_tokens": tokens}
            options: Any = {"json": body, "headers": bearer(secret), "timeout": 30}
            with httpx.stream("POST", api.url + COMPLETIONS, **options) as answer:
                lines[secret] += (line for line in answer.iter_lines() if line)
            return time.monotonic()

        with ThreadPoolExecutor(2) as clients:
            slowed = slow(model, 0.003)
            try:
                bad_end = clients.submit(stream, bad_secret, 1800)
                good_end = clients.submit(stream, good_secret, 900)
                until(lambda: api.worker.running == 2 and api.worker.steps > 5)
                keys.revoke(bad.id)
                revoked_s = time.monotonic()
                assert bad_end.result() - revoked_s < 3.0
            finally:
                slowed()
            good_end.result()
        error = json.loads(lines[bad_secret][-1].removeprefix("data: "))["error"]
        assert error["code"] == "invalid_api_key"
        assert len(lines[bad_secret]) < 1800
        assert lines[good_secret][-1] == "data: [DONE]"
        until(lambda: idle(api))
        assert api.service.usage is not None
        until(lambda: api.service.usage.totals(bad.id).completion_tokens > 0)  # type: ignore[union-attr]
        answer = api.post(COMPLETIONS, SHORT, headers=bearer(bad_secret))
        assert answer.status_code == 401


def test_a_revoked_key_ends_whole_answers_and_who_leaves_has_used_what_was_computed(
    model: openlpu.Model, tmp_path: Path
) -> None:
    with serving_api(model, tmp_path) as api, contextlib.closing(Database(tmp_path)) as other:
        keys = KeyStore(other)
        (bob, bob_secret), (ada, ada_secret) = keys.add("Bob"), keys.add("Ada")
        slowed = slow(model, 0.02)
        try:
            with ThreadPoolExecutor(1) as clients:
                whole = clients.submit(api.post, COMPLETIONS, LONG, headers=bearer(bob_secret))
                until(lambda: api.worker.running == 1 and api.worker.steps > 5)
                keys.revoke(bob.id)
                revoked_s = time.monotonic()
                assert whole.result().status_code == 401
                assert refusal(whole.result())["code"] == "invalid_api_key"
                assert time.monotonic() - revoked_s < 3.0
            inputs = {"model": "tiny", "input": ["x" * 1000] * 40}
            with pytest.raises(httpx.ReadTimeout):
                url, sent = f"{api.url}/v1/embeddings", bearer(ada_secret)
                httpx.post(url, json=inputs, headers=sent, timeout=0.5)
        finally:
            slowed()
        until(lambda: idle(api))
        assert api.service.usage is not None
        until(lambda: api.service.usage.totals(ada.id).prompt_tokens >= 1000)  # type: ignore[union-attr]
        page = httpx.get(api.url + "/metrics", headers=bearer(ada_secret)).text
        assert 'lpu_answers_total{finish_reason="cancelled"}' in page


def test_metrics_tell_why_answers_ended_as_the_client_was_told(
    model: openlpu.Model, tmp_path: Path
) -> None:
    with serving_api(model, tmp_path) as api:
        text = api.post(COMPLETIONS, SHORT).json()["choices"][0]["text"]
        answer = api.post(COMPLETIONS, {**SHORT, "stop": text[1:3], "n": 3}).json()
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 3
        page = httpx.get(api.url + "/metrics").text
        assert 'lpu_answers_total{finish_reason="stop"} 3.0' in page
        assert f"lpu_prompt_tokens_total {2 * answer['usage']['prompt_tokens']}.0" in page


def slow(model: openlpu.Model, pause_s: float) -> Callable[[], None]:
    """Let each step take longer; the result undoes it."""
    step = model.engine.step

    def slowed() -> Any:
        time.sleep(pause_s)
        return step()

    model.engine.step = slowed  # type: ignore[method-assign]
    return lambda: delattr(model.engine, "step")


def test_a_database_that_cannot_be_read_lets_nobody_in(
    model: openlpu.Model, right: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving_api(model, tmp_path) as api:
        assert api.service.keys is not None
        database = api.service.keys._database

        class Broken:
            def execute(self, *_: Any) -> Any:
                raise sqlite3.OperationalError("disk I/O error")

        with monkeypatch.context() as patch:
            patch.setattr(database, "_connection", Broken())
            time.sleep(0.3)  # what is known of the keys is believed for a quarter of a second
            answer = api.post(COMPLETIONS, SHORT)
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert str(tmp_path) not in answer.text
            refusal(answer)
            assert api.get("/health").status_code == 200
        assert said(api, SHORT) == right
