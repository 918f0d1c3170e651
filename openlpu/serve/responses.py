"""In: a conversation as items. Out: a response, whole or as typed events; /v1/responses."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from itertools import zip_longest
from typing import Any

from fastapi import APIRouter, Request, Response

from openlpu.engine.logprobs import TokenLogprob
from openlpu.serve.chat import spelled
from openlpu.serve.endpoint import STREAMED, Endpoint, Receipt, endpoint_of, json_response
from openlpu.serve.errors import ApiError
from openlpu.serve.generation import Generation, Structure
from openlpu.serve.schema.responses import ModelResponse, ResponseRequest
from openlpu.serve.stream import EventStream, while_connected
from openlpu.serve.tools import CallParser, ToolUse, read_tools

router = APIRouter()


@router.post("/responses", response_model=ModelResponse, responses=STREAMED)
async def create_response(
    body: ResponseRequest, request: Request, x_lpu_receipt: Receipt = "false"
) -> Response:
    """Answer a conversation. Nothing is kept."""
    endpoint = endpoint_of(request, receipt=x_lpu_receipt == "true")
    service = endpoint.service
    service.check_model(body.model)
    with_logprobs = bool(body.include)
    if body.top_logprobs and not with_logprobs:
        message = "top_logprobs needs include: ['message.output_text.logprobs']"
        raise ApiError(400, message, param="top_logprobs")
    asked = body.structure()
    use = read_tools(*(asked.get(n) for n in ("tools", "tool_choice", "parallel_tool_calls")))
    structure = Structure(asked.get("response_format"), body.regex, body.grammar, use, asked)
    messages = body.messages()

    def made() -> list[list[int]]:
        return [service.encode(service.prompts.render(messages, use), special=True)]

    prompts = await service.prompts_of(made, "input")
    generation = Generation(service, structure, endpoint.caller)
    told = _Told(body, endpoint, generation, use)
    most = body.max_output_tokens or service.model.context
    try:
        async with while_connected(request.receive):
            await generation.start(
                prompts,
                body.sampling(most, service.model.compiled.config.vocab_size),
                logprobs=(body.top_logprobs or 0) if with_logprobs else None,
                priority=body.priority or 0,
            )
            if not body.stream:
                async for _ in told.events():
                    pass
                return json_response(told.last)
    except BaseException:
        generation.close()
        raise
    return EventStream(told.events(), close=generation.close, failed=told.failed)


class _Told:
    """One answer as items and events. The whole response is what its last event holds."""

    def __init__(
        self, body: ResponseRequest, endpoint: Endpoint, generation: Generation, use: ToolUse | None
    ) -> None:
        self.last: dict[str, Any] = {}
        """The response, when all events are made."""
        self._body = body
        self._endpoint = endpoint
        self._generation = generation
        self._tokenizer = endpoint.service.model.tokenizer
        self._parser = None if use is None else CallParser(lambda: f"call_{secrets.token_hex(12)}")
        self._unsaid: list[TokenLogprob] = []  # of tokens whose text is no message's yet
        self._number = 0
        self._output: list[dict[str, Any]] = []
        self._open = False  # whether the last item is not whole yet
        self._head = self._heading()

    def _heading(self) -> dict[str, Any]:
        """What the request says, as responses repeat it."""
        body = self._body
        given = body.model_dump(exclude_none=True, by_alias=True)
        text = given.get("text", {})
        return {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "background": False,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "model": body.model,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "system_fingerprint": self._endpoint.service.fingerprint,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": {"type": "text"}, **text},
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": given.get("tools", []),
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "user": body.user,
        }

    async def events(self) -> AsyncIterator[str]:
        """All of them, several in one text if they come together."""
        generation, parser = self._generation, self._parser
        begun = {**self._head, "status": "in_progress", "incomplete_details": None}
        begun |= {"output": [], "usage": None}
        yield self._event("response.created", response=begun) + self._event(
            "response.in_progress", response=begun
        )
        choice = generation.choices[0]
        async for found in generation.pieces():
            told = ""
            for _, piece in found:
                if parser is None:
                    if piece.tokens or piece.text:
                        told += self._said(piece.text, piece.logprobs)
                    continue
                # Token by token: which of them a message has must not depend on what came together.
                for text, logprob in zip_longest(piece.texts, piece.logprobs):
                    told += self._read(text, logprob)
                if choice.finish_reason is not None:
                    told += self._changes(parser.flush())
                    if self._unsaid and not parser.calls:
                        told += self._said("", self._unsaid)
            yield told
        cut = choice.finish_reason == "length"
        told = "" if self._output else self._begin_message()
        calls = parser.calls if parser is not None else []
        in_call = self._open and self._output[-1]["type"] == "function_call"
        is_whole = calls[-1].whole if in_call else not cut
        told += self._finish("completed" if is_whole else "incomplete")
        generation.close()
        prompt, completion = generation.prompt_tokens, generation.completion_tokens
        self.last = {
            **self._head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "completed_at": None if cut else int(time.time()),
            "output": self._output,
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": generation.cached_tokens},
                "output_tokens": completion,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + completion,
            },
        }
        if self._endpoint.groq:
            self.last["usage"] |= generation.timing()
            self.last["x_groq"] = {"id": self._endpoint.request_id}
        if self._endpoint.receipt:
            self.last["lpu_receipt"] = await asyncio.to_thread(generation.receipt)
        kind = "response.incomplete" if cut else "response.completed"
        yield told + self._event(kind, response=self.last)

    def failed(self, error: ApiError) -> str:
        """The last event of an answer that cannot go on."""
        code = "server_error" if error.status >= 500 else error.code or error.type
        return self._event(
            "response.failed",
            response={
                **self._head,
                "status": "failed",
                "error": {"code": code, "message": error.message},
                "incomplete_details": None,
                "output": self._output,
                "usage": None,
            },
        )

    # -- items ----------------------------------------------------------------------------------

    def _read(self, text: str, logprob: TokenLogprob | None) -> str:
        """Events for what a token makes certain, where calls may be."""
        assert self._parser is not None
        in_call = self._parser.in_call
        deltas = self._parser.push(text)
        if logprob is not None and not (in_call or self._parser.in_call):
            self._unsaid.append(logprob)
        return self._changes(deltas)

    def _changes(self, deltas: list[dict[str, Any]]) -> str:
        """Events for deltas as chat completions stream them."""
        told = ""
        for delta in deltas:
            if "content" in delta:
                told += self._said(delta["content"], self._unsaid)
                self._unsaid = []
                continue
            for call in delta["tool_calls"]:
                if "id" in call:
                    self._unsaid = []  # of tokens that opened the call
                    told += self._finish("completed") + self._begin_call(call)
                told += self._argued(call["function"]["arguments"])
        return told

    def _said(self, text: str, logprobs: list[TokenLogprob]) -> str:
        """More text of a message, and the log probabilities of its tokens."""
        told = ""
        if not (self._open and self._output[-1]["type"] == "message"):
            told = self._finish("completed") + self._begin_message()
        part = self._output[-1]["content"][0]
        part["text"] += text
        found = [spelled(self._tokenizer, one) for one in logprobs]
        part["logprobs"] += found
        return told + self._event(
            "response.output_text.delta", **self._place(0), delta=text, logprobs=found
        )

    def _begin_message(self) -> str:
        item = {
            "id": f"msg_{secrets.token_hex(16)}",
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
        }
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        told = self._begin({**item, "content": []})
        self._output[-1]["content"].append(part)
        return told + self._event("response.content_part.added", **self._place(0), part=part)

    def _begin_call(self, call: dict[str, Any]) -> str:
        return self._begin(
            {
                "id": f"fc_{secrets.token_hex(16)}",
                "type": "function_call",
                "status": "in_progress",
                "call_id": call["id"],
                "name": call["function"]["name"],
                "arguments": "",
            }
        )

    def _argued(self, text: str) -> str:
        """More of a call's arguments."""
        if not text:
            return ""
        self._output[-1]["arguments"] += text
        return self._event("response.function_call_arguments.delta", **self._place(), delta=text)

    def _begin(self, item: dict[str, Any]) -> str:
        self._output.append(item)
        self._open = True
        index = len(self._output) - 1
        return self._event("response.output_item.added", output_index=index, item=item)

    def _finish(self, status: str) -> str:
        """The last item is whole."""
        if not self._open:
            return ""
        self._open = False
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            told = self._event(
                "response.output_text.done",
                **self._place(0),
                text=part["text"],
                logprobs=part["logprobs"],
            ) + self._event("response.content_part.done", **self._place(0), part=part)
        else:
            told = self._event(
                "response.function_call_arguments.done",
                **self._place(),
                name=item["name"],
                arguments=item["arguments"],
            )
        index = len(self._output) - 1
        return told + self._event("response.output_item.done", output_index=index, item=item)

    def _place(self, part: int | None = None) -> dict[str, Any]:
        """Which item an event is about."""
        index = len(self._output) - 1
        found = {"item_id": self._output[-1]["id"], "output_index": index}
        return found if part is None else {**found, "content_index": part}

    def _event(self, kind: str, **fields: Any) -> str:
        data = json.dumps({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return f"event: {kind}\ndata: {data}\n\n"
