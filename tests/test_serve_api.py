"""In: requests sound and unsound. Out: answers in OpenAI's words, refusals by name, none left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from small_api import ALIAS, Api, serving_api
from small_service import until
from tiny_chat import write_tiny_chat

import openlpu
from openlpu import knobs
from openlpu.engine.sampling import Sampling
from openlpu.engine.sequence import Request
from openlpu.serve.app import Service, create_app
from openlpu.serve.errors import ApiError
from openlpu.serve.receipt import read_receipt, replay
from openlpu.serve.settings import Settings
from openlpu.serve.worker import Worker

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openlpu.Model]:
    folder = write_tiny_chat(tmp_path_factory.mktemp("models") / "tiny")
    cache = str(tmp_path_factory.mktemp("cache"))
    with knobs.override(CACHE=cache), openlpu.load(str(folder), threads=2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def api(model: openlpu.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with serving_api(model, tmp_path_factory.mktemp("data")) as running:
        yield running


def events(answer: httpx.Response) -> list[Any]:
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line[:5] == "data:"]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text_of(chunks: list[Any], index: int = 0) -> str:
    deltas = [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return "".join(delta.get("content") or "" for delta in deltas)


# -- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"seed": 3, "max_tokens": 40},
        {"seed": -1, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1},
        {"seed": 5, "presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"65": 4}},
        {"seed": 6, "regex": "[a-f]{3,9}"},
        {"seed": 7, "response_format": {"type": "json_object"}, "max_tokens": 60},
    ],
)
def test_the_service_says_what_the_library_says(
    api: Api, model: openlpu.Model, options: dict[str, Any]
) -> None:
    answer = api.chat(**options).json()
    choice, usage = answer["choices"][0], answer["usage"]
    chunks = events(api.chat(stream=True, stream_options={"include_usage": True}, **options))
    assert text_of(chunks) == choice["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == choice["finish_reason"]
    assert {
        k: v for k, v in chunks[-1]["usage"].items() if k[-1] == "s" and "details" not in k
    } == {k: v for k, v in usage.items() if "details" not in k}
    assert answer["system_fingerprint"] == f"lpu-1-{model.identity[:32]}"
    if "regex" in options or "response_format" in options:
        return
    plain = {"temperature": 1.0, "max_tokens": 8, **options}
    plain["seed"] = plain.get("seed", 0) % 2**64
    if "logit_bias" in plain:
        plain["logit_bias"] = {int(k): float(v) for k, v in plain["logit_bias"].items()}
    result = model.generate("Hi", **plain)
    assert result.text == choice["message"]["content"]
    assert result.finish_reason == choice["finish_reason"]
    assert usage["completion_tokens"] == len(result.tokens)
    assert usage["prompt_tokens"] == result.stats.prompt_tokens


def test_choices_have_seeds_in_a_row(api: Api) -> None:
    alone = [api.chat(seed=2**64 - 2 + i).json()["choices"][0]["message"] for i in range(2)]
    alone.append(api.chat(seed=0).json()["choices"][0]["message"])
    together = api.chat(seed=2**64 - 2, n=3).json()
    assert [choice["message"] for choice in together["choices"]] == alone
    chunks = events(api.chat(seed=2**64 - 2, n=3, stream=True))
    assert [text_of(chunks, i) for i in range(3)] == [m["content"] for m in alone]
    assert together["usage"]["completion_tokens"] > 3
    assert together["usage"]["prompt_tokens"] == api.chat().json()["usage"]["prompt_tokens"]


def test_a_stop_string_ends_the_text_and_the_tokens(api: Api) -> None:
    options = {"seed": 4, "max_tokens": 60, "ignore_eos": True, "logprobs": True}
    whole = api.chat(**options).json()["choices"][0]
    text = whole["message"]["content"]
    stop = text[6:9]
    for answer in (api.chat(stop=stop, **options), api.chat(stop=["\0never", stop], **options)):
        choice = answer.json()["choices"][0]
        assert choice["message"]["content"] == text[: text.index(stop)]
        assert choice["finish_reason"] == "stop"
        count = answer.json()["usage"]["completion_tokens"]
        assert choice["logprobs"]["content"] == whole["logprobs"]["content"][:count]
    chunks = events(api.chat(stop=stop, stream=True, **options))
    assert text_of(chunks) == text[: text.index(stop)]
    until(lambda: api.worker.running == 0)


def test_log_probabilities_are_those_of_the_model(api: Api) -> None:
    options = {"seed": 9, "logprobs": True, "top_logprobs": 3, "max_tokens": 12}
    choice = api.chat(**options).json()["choices"][0]
    found = choice["logprobs"]["content"]
    for one in found:
        assert bytes(one["bytes"]).decode(errors="replace") == one["token"]
        top = [other["logprob"] for other in one["top_logprobs"]]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert one["logprob"] <= 0
    said = b"".join(bytes(one["bytes"]) for one in found if one["token"] != "<|start|>")
    assert said.decode(errors="replace") == choice["message"]["content"]
    chunks = events(api.chat(stream=True, **options))
    streamed = [
        one
        for c in chunks
        for p in c["choices"]
        for one in (p["logprobs"] or {}).get("content", [])
    ]
    assert streamed == found


def test_completions_have_the_old_form(api: Api, model: openlpu.Model) -> None:
    body = {"model": "tiny", "prompt": "Once", "seed": 1, "max_tokens": 10, "logprobs": 2}
    answer = api.post("/v1/completions", body).json()
    choice = answer["choices"][0]
    told = choice["logprobs"]
    assert answer["object"] == "text_completion"
    assert {len(values) for values in told.values()} == {answer["usage"]["completion_tokens"]}
    assert told["text_offset"] == sorted(told["text_offset"])
    assert told["text_offset"][0] == 0
    for token, logprob, top in zip(
        told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        assert logprob in top.values() or token == "\ufffd"
    tokens = model.tokenize("Once")
    by_tokens = api.post("/v1/completions", {**body, "prompt": tokens}).json()
    assert by_tokens["choices"] == answer["choices"]
    echoed = {**body, "echo": True}
    del echoed["logprobs"]
    said = api.post("/v1/completions", echoed).json()["choices"][0]["text"]
    assert said == "Once" + choice["text"]
    chunks = events(api.post("/v1/completions", {**echoed, "stream": True}))
    assert "".join(c["text"] for chunk in chunks for c in chunk["choices"]) == said


def test_many_prompts_and_the_best_of_many(api: Api) -> None:
    body = {"model": "tiny", "prompt": ["Once", "Twice"], "seed": 1, "max_tokens": 6, "n": 2}
    choices = api.post("/v1/completions", body).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    alone = api.post("/v1/completions", {**body, "prompt": "Twice"}).json()["choices"]
    assert [c["text"] for c in choices[2:]] == [c["text"] for c in alone]
    best = {**body, "prompt": "Once", "n": 2, "best_of": 6, "logprobs": 0}
    told = api.post("/v1/completions", best).json()
    every = api.post("/v1/completions", {**best, "n": 6}).json()
    means = [sum(c["logprobs"]["token_logprobs"]) / 6 for c in every["choices"]]
    kept = sorted(sorted(range(6), key=lambda i: -means[i])[:2])
    assert [c["text"] for c in told["choices"]] == [every["choices"][i]["text"] for i in kept]
    assert told["usage"] == every["usage"]


def test_equal_beginnings_are_told_as_cached(api: Api) -> None:
    long = "The same beginning, again and again. " * 5
    first = api.chat(long, temperature=0).json()
    second = api.chat(long, temperature=0).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == 192
    assert second["choices"] == first["choices"]


def test_tokens_and_back(api: Api, model: openlpu.Model) -> None:
    for prefix in ("", "/openai/v1"):
        found = api.post(f"{prefix}/tokenize", {"prompt": "Ünï <|end|>"}).json()
        assert found["tokens"] == model.tokenize("Ünï <|end|>")
        assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 256)
        back = api.post(f"{prefix}/detokenize", {"tokens": found["tokens"], "model": "tiny"})
        assert back.json() == {"prompt": "Ünï <|end|>"}
    talk = api.post("/tokenize", {"messages": MESSAGES}).json()
    assert talk["tokens"] == model.prompt_tokens("Hi")


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_receipt_repeats_every_bit(
    api: Api, model: openlpu.Model, path: str, stream: bool
) -> None:
    given = {CHAT: {"messages": MESSAGES}, "/v1/completions": {"prompt": "Hi"}}
    body = {"model": ALIAS, "stream": stream, "regex": "[a-z ]{5,20}x"}
    body |= given.get(path, {"input": "Hi", "max_output_tokens": 12})
    body |= {"max_tokens": 12} if path in given else {}
    answer = api.post(path, body, headers={"x-lpu-receipt": "true"})
    if path == "/v1/responses" and stream:
        last = json.loads(answer.text.strip().rsplit("data: ", 1)[1])["response"]
    else:
        last = events(answer)[-1] if stream else answer.json()
    receipt = read_receipt(json.dumps(last["lpu_receipt"]))
    assert all(repeated.same for repeated in replay(model, receipt))
    assert receipt.answers[0].sampling.seed is not None


# -- refusals ---------------------------------------------------------------------------------

FUNCTION = {"type": "function", "function": {"name": "f"}}
PNG = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("path", "changes", "status", "param"),
    [
        (CHAT, {"model": "gpt-5"}, 404, "model"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": "Hi"}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user"}]}, 400, "messages[0]"),
        (CHAT, {"messages": [{"role": "nobody", "content": ""}]}, 400, "messages[0].role"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [PNG]}]},
            400,
            "messages[0].content[0].image_url",
        ),
        (CHAT, {"frobnicate": 1}, 400, "frobnicate"),
        (CHAT, {"functions": []}, 400, "functions"),
        (CHAT, {"temperature": 101}, 400, "temperature"),
        (CHAT, {"temperature": "1"}, 400, "temperature"),
        (CHAT, {"n": 0}, 400, "n"),
        (CHAT, {"n": 129}, 400, "n"),
        (CHAT, {"max_tokens": 0}, 400, "max_tokens"),
        (CHAT, {"max_tokens": 3, "max_completion_tokens": 3}, 400, "max_tokens"),
        (CHAT, {"top_logprobs": 2}, 400, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        (CHAT, {"logit_bias": {"264": 1}}, 400, "logit_bias"),
        (CHAT, {"logit_bias": {"a": 1}}, 400, "logit_bias"),
        (CHAT, {"stream_options": {"include_usage": True}}, 400, "stream_options"),
        (CHAT, {"stop": [""]}, 400, "stop[0]"),
        (CHAT, {"store": True}, 400, "store"),
        (CHAT, {"service_tier": "flex"}, 400, "service_tier"),
        (CHAT, {"tool_choice": "required"}, 400, "tool_choice"),
        (CHAT, {"tools": [FUNCTION], "regex": "a"}, 400, "regex"),
        (CHAT, {"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
        (CHAT, {"regex": "("}, 400, "regex"),
        (CHAT, {"regex": "a", "grammar": 'start: "a"'}, 400, "grammar"),
        (CHAT, {"response_format": {"type": "xml"}}, 400, "response_format"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 400}]}, 400, "messages"),
        ("/v1/completions", {"prompt": "x" * 400}, 400, "prompt"),
        ("/v1/completions", {"prompt": ""}, 400, "prompt"),
        ("/v1/completions", {"prompt": []}, 400, "prompt"),
        ("/v1/completions", {"prompt": [9999]}, 400, "prompt"),
        ("/v1/completions", {"suffix": "x"}, 400, "suffix"),
        ("/v1/completions", {"echo": True, "logprobs": 1}, 400, "echo"),
        ("/v1/completions", {"n": 2, "best_of": 1}, 400, "best_of"),
        ("/v1/completions", {"best_of": 2, "stream": True}, 400, "best_of"),
        ("/v1/responses", {"previous_response_id": "resp_1"}, 400, "previous_response_id"),
        ("/v1/responses", {"store": True}, 400, "store"),
        ("/v1/responses", {"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}, 400, "input[0]"),
        ("/v1/responses", {"top_logprobs": 2}, 400, "top_logprobs"),
        ("/tokenize", {"prompt": None}, 400, "prompt"),
        ("/tokenize", {"model": "gpt-5"}, 404, "model"),
        ("/detokenize", {"tokens": [999]}, 400, "tokens"),
    ],
)
def test_what_is_refused_is_named(
    api: Api, path: str, changes: dict[str, Any], status: int, param: str | None
) -> None:
    sound = {
        CHAT: {"model": "tiny", "messages": MESSAGES},
        "/v1/completions": {"model": "tiny", "prompt": "Hi"},
        "/v1/responses": {"model": "tiny", "input": "Hi"},
        "/tokenize": {"prompt": "Hi"},
        "/detokenize": {"tokens": [1]},
    }
    answer = api.post(path, {**sound[path], **changes})
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert "\n" not in error["message"]
    if error["code"] in ("unsupported_parameter", "missing_required_parameter"):
        assert param is not None
        assert param in error["message"]


def test_what_is_no_request_is_refused(api: Api) -> None:
    json_type = {"content-type": "application/json"}
    for content in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 50_000, b'{"n":' + b"9" * 5000):
        answer = api.post(CHAT, content=content, headers=json_type)
        assert answer.status_code == 400, content[:10]
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert api.chat("x").status_code == 200
    surrogate = b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'
    answer = api.post(CHAT, content=surrogate, headers=json_type)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert api.get("/v1/nothing").status_code == 404
    assert "error" in api.get("/v1/nothing").json()
    wrong = api.get(CHAT)
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "POST"
    assert "error" in wrong.json()


# -- the worker -------------------------------------------------------------------------------

LONG = {"model": "tiny", "prompt": "Hi", "max_tokens": 250, "ignore_eos": True}


def leave(url: str, body: dict[str, Any]) -> None:
    """Ask, and go away in the middle of the answer."""
    path = url + "/v1/completions"
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", path, json=body, timeout=0.2) as answer,
    ):
        next(answer.iter_lines())


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_frees_everything(model: openlpu.Model, tmp_path: Any, stream: bool) -> None:
    with serving_api(model, tmp_path, most_running=2) as api:
        free = model.engine.pages.free
        many = {**LONG, "n": 8, "stream": stream}
        leave(api.url, many)
        until(lambda: api.worker.running == api.worker.waiting == 0)
        until(lambda: model.engine.pages.free == free)
        assert api.chat().status_code == 200


def test_when_too_many_wait_one_more_is_told_to_come_back(
    model: openlpu.Model, tmp_path: Any
) -> None:
    with serving_api(model, tmp_path, most_running=1, most_waiting=2) as api:
        answers: list[httpx.Response] = []

        def ask() -> None:
            answers.append(api.post("/v1/completions", LONG))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses.count(200) >= 3
        for refused in (answer for answer in answers if answer.status_code != 200):
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "server_error"
        assert {
            a.json()["usage"]["completion_tokens"] for a in answers if a.status_code == 200
        } == {250}


def test_a_step_that_fails_ends_its_answers_and_no_others(
    model: openlpu.Model, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, failed = model.engine.step, []

    def fails_once() -> Any:
        if not failed and any(s.busy for s in model.engine._open):
            failed.append(1)
            raise ZeroDivisionError("a secret")
        return step()

    monkeypatch.setattr(model.engine, "step", fails_once)
    with serving_api(model, tmp_path) as api:
        for stream in (False, True):
            failed.clear()
            answer = api.chat(stream=stream)
            error = json.loads(answer.text.strip().rsplit("data: ", 1)[-1])["error"]
            assert answer.status_code == (200 if stream else 500)
            assert error["type"] == "server_error"
            assert "secret" not in answer.text
            assert api.chat().status_code == 200
        assert api.worker.healthy
        until(lambda: api.log.getvalue().count("ZeroDivisionError") == 2)


def test_the_worker_ends_what_is_under_way(model: openlpu.Model) -> None:
    async def ask() -> None:
        worker = Worker(model, most_running=1, most_waiting=5)
        worker.start()
        tokens = model.tokenize("Hi")
        sampling = Sampling(max_tokens=200, ignore_eos=True)
        feed = await worker.submit(tokens, sampling, Request())
        counts = [await anext(feed), await anext(feed)]
        assert counts == sorted(set(counts))
        second = asyncio.create_task(worker.submit(tokens, sampling, Request()))
        third = asyncio.create_task(worker.submit(tokens, sampling, Request(priority=1)))
        await asyncio.sleep(0)
        assert (worker.running, worker.waiting) == (1, 2)
        feed.cancel()
        urgent = await third
        assert not second.done()
        await asyncio.to_thread(worker.close)
        for refused in (second, asyncio.create_task(worker.submit(tokens, sampling, Request()))):
            with pytest.raises(ApiError, match="shutting down"):
                await refused
        with pytest.raises(ApiError, match="shutting down"):
            async for _ in urgent:
                pass
        assert worker.running == worker.waiting == 0

    asyncio.run(ask())
    assert model.engine.sequences == 0


def test_usage_is_charged_once(model: openlpu.Model, tmp_path: Any) -> None:
    with serving_api(model, tmp_path) as api:
        assert api.service.keys is not None
        assert api.service.usage is not None
        key, secret = api.service.keys.add("Ada")
        headers = {"authorization": f"Bearer {secret}"}
        asked = {"model": "tiny", "messages": MESSAGES, "max_tokens": 5}
        used = [api.post(CHAT, {**asked, "n": n}, headers=headers).json()["usage"] for n in (1, 3)]
        assert api.post(CHAT, {**asked, "stream": True}, headers=headers).status_code == 200
        totals = api.service.usage.totals(key.id)
        assert totals.requests == 3
        assert totals.completion_tokens >= sum(usage["completion_tokens"] for usage in used) + 1
        assert totals.prompt_tokens == 3 * used[0]["prompt_tokens"]
        until(lambda: api.log.getvalue().count(f'"endpoint": "{CHAT}"') == 3)


# -- alone ------------------------------------------------------------------------------------


def test_the_application_needs_no_guard(model: openlpu.Model, tmp_path: Any) -> None:
    worker = Worker(model, most_running=4, most_waiting=4)
    service = Service(model, worker, Settings(model="tiny", data=tmp_path))
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    worker.start()
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        until(lambda: server.started)
        body = {"model": "tiny", "input": "Hi"}
        for path in ("/v1/embeddings", "/v1/responses"):
            assert httpx.post(url + path, json=body, timeout=20).status_code == 200
        for stream in (False, True):
            leave(url, {**LONG, "n": 16, "stream": stream})
            until(lambda: worker.running == worker.waiting == 0)
    finally:
        server.should_exit = True
        thread.join(10)
        worker.close()
        listener.close()


def test_the_page_of_the_api_is_complete(api: Api) -> None:
    page = api.get("/openapi.json").json()
    paths = set(page["paths"])
    for path in (
        "models",
        "models/{model}",
        "chat/completions",
        "completions",
        "responses",
        "embeddings",
    ):
        assert {f"/v1/{path}", f"/openai/v1/{path}"} <= paths
    assert {"/tokenize", "/detokenize", "/openai/v1/tokenize", "/openai/v1/detokenize"} <= paths
    names = [op["operationId"] for path in page["paths"].values() for op in path.values()]
    assert len(set(names)) == len(names)
    for path in page["paths"].values():
        for operation in path.values():
            assert {"400", "401", "404", "413", "429", "500", "503"} <= set(operation["responses"])
            assert "422" not in operation["responses"]
    assert "HTTPValidationError" not in json.dumps(page)


def test_one_request_cannot_ask_for_everything(api: Api) -> None:
    body = {"model": "tiny", "prompt": ["a"] * 100, "n": 100}
    answer = api.post("/v1/completions", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")


NOTHING = {
    "/v1/chat/completions": "reasoning_effort audio prediction web_search_options verbosity "
    "functions function_call prompt_cache_retention tools tool_choice stop seed stream_options",
    "/v1/completions": "suffix store stop best_of echo logprobs",
    "/v1/responses": "previous_response_id conversation prompt reasoning max_tool_calls tools text",
}


@pytest.mark.parametrize("path", NOTHING)
def test_nothing_may_be_asked_of_everything(api: Api, path: str) -> None:
    """As many clients do, who send null for whatever their user has not set."""
    body = {"model": ALIAS, **dict.fromkeys(NOTHING[path].split())}
    body |= {"prompt": "Hi"} if path == "/v1/completions" else {}
    body |= {"input": "Hi", "max_output_tokens": 16} if path == "/v1/responses" else {}
    body |= {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in path else {}
    assert api.post(path, body).status_code == 200


def test_what_clients_send_back_is_read(api: Api) -> None:
    part = {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": [part]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": None,
            "provider_specific_fields": None,
            "tool_calls": [{**call, "index": 0}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ]
    plain = [{"role": "user", "content": "Hi"}, {**messages[1], "tool_calls": [call]}, messages[2]]
    answers = [
        api.chat(messages=m, seed=1, tools=[], tool_choice="auto", top_k=-1)
        for m in (messages, plain)
    ]
    assert [a.status_code for a in answers] == [200, 200]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]


@pytest.mark.parametrize(
    "name", ["localhost", "LOCALHOST:8000", "127.0.0.1:9", "[::1]:8000", "x.localhost", "10.0.0.1"]
)
def test_a_service_without_keys_goes_by_its_own_names(api: Api, name: str) -> None:
    assert api.get("/v1/models", headers={"host": name}).status_code == 200


@pytest.mark.parametrize("name", ["evil.example", "localhost.evil.example", "127.0.0.1.evil", ""])
def test_it_does_not_by_others(api: Api, name: str) -> None:
    found = api.get("/v1/models", headers={"host": name})
    assert found.status_code == 403
    assert found.json()["error"]["code"] == "host_not_allowed"


def test_a_body_of_another_type_is_told_so(api: Api) -> None:
    """Pages of other origins can send no other without asking first."""
    found = api.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert found.status_code == 400
    assert "application/json" in found.json()["error"]["message"]
