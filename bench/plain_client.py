"""In: requests, a port. Out: what was told, in one form for all endpoints, whole or streamed.

A client over bare sockets, so that a test can hang up, read slowly, and see every byte. A stream is
checked while it is put together: nothing may be missing, come twice, or contradict itself.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mixed_requests import Asked

JSON = dict[str, Any]


@dataclass(slots=True)
class Told:
    """An answer. Those to equal requests are equal, whatever else happens."""

    status: int
    choices: list[JSON] = field(default_factory=list)
    """Text, calls, why it ended, log probabilities; or an embedding."""
    usage: tuple[int, int] = (0, 0)
    """Tokens of the prompts, of the answers."""
    receipt: JSON | None = None
    error: Any = None
    cached: int = field(default=0, compare=False)
    """Tokens of the prompts that were not computed again."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole HTTP answer."""

    status: int
    body: bytes


def message(
    path: str, content: bytes, headers: dict[str, str] | None = None, *, method: str = "POST"
) -> bytes:
    """A request's bytes."""
    fields = {
        "host": "127.0.0.1",
        "content-type": "application/json",
        "content-length": str(len(content)),
        "connection": "close",
        **(headers or {}),
    }
    lines = [f"{method} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in fields.items()), "", ""]
    return "\r\n".join(lines).encode() + content


async def exchange(port: int, sent: bytes, *, pause_s: float = 0.0) -> Reply:
    """Send bytes and wait for the end of what comes. pause_s: before each small read."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(sent)
        received = b""
        while piece := await reader.read(1 << 10 if pause_s else 1 << 20):
            received += piece
            if pause_s:
                await asyncio.sleep(pause_s)
    finally:
        writer.close()
    return parsed(received)


async def ask(
    port: int,
    asked: Asked,
    *,
    stream: bool = False,
    headers: dict[str, str] | None = None,
    pause_s: float = 0.0,
) -> Told:
    """Send a request and wait for the end of its answer, which has a receipt."""
    body = dict(asked.body)
    if stream:
        body["stream"] = True
        if not asked.path.endswith("/responses"):
            body["stream_options"] = {"include_usage": True}
    headers = {"x-lpu-receipt": "true", **(headers or {})}
    sent = message(asked.path, json.dumps(body).encode(), headers)
    reply = await exchange(port, sent, pause_s=pause_s)
    if reply.status != 200:
        return Told(reply.status, error=json.loads(reply.body)["error"])
    if stream:
        return _streamed(asked, [*events(reply.body)])
    return _whole(asked, json.loads(reply.body))


async def leave(
    port: int, asked: Asked, *, after: int, headers: dict[str, str] | None = None
) -> bool:
    """Send a request and hang up after so many events; whether it was still under way."""
    content = json.dumps({**asked.body, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = b""
    writer.write(message(asked.path, content, headers))
    try:
        while received.count(b"data: ") < after and (piece := await reader.read(1 << 16)):
            received += piece
        return not received.endswith(b"0\r\n\r\n")
    finally:
        writer.transport.abort()


def parsed(received: bytes) -> Reply:
    """The answer out of a connection's bytes."""
    start, _, rest = received.partition(b"\r\n\r\n")
    lines = start.decode("latin-1").lower().split("\r\n")
    fields = dict(line.split(": ", 1) for line in lines[1:])
    if fields.get("transfer-encoding") == "chunked":
        body, size = b"", -1
        while size:
            line, _, rest = rest.partition(b"\r\n")
            size = int(line, 16)
            body, rest = body + rest[:size], rest[size + 2 :]
        assert not rest
    else:
        body = rest
        assert len(body) == int(fields["content-length"])
    return Reply(int(lines[0].split(" ")[1]), body)


def events(body: bytes) -> Iterator[JSON]:
    """The documents of a stream, which must have an end."""
    texts = body.decode().split("\n\n")
    assert texts.pop() == "", "the last event is cut"
    named = texts[0].startswith("event: ")
    if not named:
        last = texts.pop()
        assert last == "data: [DONE]", last
    for text in texts:
        kind, data = text.split("\ndata: ") if named else ("", text.removeprefix("data: "))
        event = json.loads(data)
        assert not named or event["type"] == kind.removeprefix("event: ")
        yield event


# -- one form -----------------------------------------------------------------------------------


def _whole(asked: Asked, document: JSON) -> Told:
    if asked.path.endswith("/embeddings"):
        choices = [{"embedding": entry["embedding"]} for entry in document["data"]]
    elif asked.path.endswith("/responses"):
        choices = [_response(document)]
    else:
        assert [c["index"] for c in document["choices"]] == [*range(len(document["choices"]))]
        choices = [_choice(c, c.get("message", c)) for c in document["choices"]]
    return _told(choices, document)


def _told(choices: list[JSON], document: JSON) -> Told:
    usage, receipt = document["usage"], document["lpu_receipt"]
    prompt = usage.get("input_tokens", usage.get("prompt_tokens"))
    answer = usage.get("output_tokens", usage.get("completion_tokens", 0))
    assert usage["total_tokens"] == prompt + answer
    assert answer == sum(len(one["tokens"]) for one in receipt["answers"])
    if len(choices) == len(receipt["answers"]):  # else it told the best of several
        for choice, kept in zip(choices, receipt["answers"], strict=True):
            if choice["logprobs"] is not None and not choice["calls"]:
                values = [logprob for _, logprob, _ in kept["token_logprobs"]]
                assert _values(choice["logprobs"]) == values
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    return Told(200, choices, (prompt, answer), receipt, cached=details.get("cached_tokens", 0))


def _values(logprobs: Any) -> list[float]:
    if isinstance(logprobs, dict):
        return list(logprobs["token_logprobs"])
    return [entry["logprob"] for entry in logprobs]


def _choice(choice: JSON, said: JSON) -> JSON:
    """A choice of chat completions or completions."""
    logprobs = choice["logprobs"]
    if logprobs is not None and "content" in logprobs:
        logprobs = logprobs["content"]
    calls = [call["function"] for call in said.get("tool_calls", [])]
    text = said.get("content", said.get("text")) or ""
    return {
        "text": text,
        "calls": calls,
        "logprobs": logprobs,
        "finish_reason": choice["finish_reason"],
    }


def _response(response: JSON) -> JSON:
    texts = [item["content"][0] for item in response["output"] if item["type"] == "message"]
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    return {
        "text": [part["text"] for part in texts],
        "calls": [{name: call[name] for name in ("name", "arguments")} for call in calls],
        "logprobs": [entry for part in texts for entry in part["logprobs"]],
        "finish_reason": response["status"],
        "form": [item["type"] for item in response["output"]],
    }


def _streamed(asked: Asked, found: list[JSON]) -> Told:
    if "error" in found[-1]:
        return Told(200, error=found[-1]["error"])
    if asked.path.endswith("/responses"):
        return _streamed_response(found)
    *chunks, last = found
    assert not last["choices"]
    assert len({chunk["id"] for chunk in found}) == 1
    choices: dict[int, JSON] = {}
    for chunk in chunks:
        (part,) = chunk["choices"]
        delta = part.get("delta", part)
        choice = choices.setdefault(
            part["index"], {"text": "", "calls": [], "logprobs": None, "finish_reason": None}
        )
        assert choice["finish_reason"] is None, "more of a choice that has ended"
        choice["text"] += delta.get("content", delta.get("text")) or ""
        choice["finish_reason"] = part["finish_reason"]
        for call in delta.get("tool_calls", []):
            if "id" in call:
                assert call["index"] == len(choice["calls"])
                choice["calls"].append({"name": call["function"]["name"], "arguments": ""})
            choice["calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        if part["logprobs"] is not None:
            choice["logprobs"] = _joined(choice["logprobs"], part["logprobs"])
    told = [choices[i] for i in range(len(choices))]
    for choice in told:
        assert choice["finish_reason"] is not None
        if choice["logprobs"] is None and asked.body.get("logprobs") not in (None, False):
            choice["logprobs"] = _nothing(asked)
    return _told(told, last)


def _joined(before: Any, part: JSON) -> Any:
    if "content" in part:
        return [*(before or []), *part["content"]]
    if before is None:
        return part
    return {n: None if part[n] is None else before[n] + part[n] for n in part}


def _nothing(asked: Asked) -> Any:
    """The log probabilities of an answer without tokens."""
    if asked.path.endswith("/chat/completions"):
        return []
    tops: list[Any] | None = [] if asked.body["logprobs"] else None
    return {"tokens": [], "token_logprobs": [], "top_logprobs": tops, "text_offset": []}


def _streamed_response(found: list[JSON]) -> Told:
    assert [event["sequence_number"] for event in found] == [*range(len(found))]
    response = found[-1]["response"]
    if response["status"] == "failed":
        return Told(200, error=response["error"])
    texts = [""] * len(response["output"])
    logprobs: list[JSON] = []
    for event in found:
        if event["type"].endswith(".delta"):
            texts[event["output_index"]] += event["delta"]
            logprobs += event.get("logprobs", [])
    told = _response(response)
    for item, text in zip(response["output"], texts, strict=True):
        whole = item["content"][0]["text"] if item["type"] == "message" else item["arguments"]
        assert text == whole
    assert logprobs == told["logprobs"]
    return _told([told], response)
