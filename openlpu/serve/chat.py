"""In: a conversation. Out: the model's answer to it, whole or as events; /v1/chat/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from openlpu.engine.logprobs import TokenLogprob
from openlpu.load.tokenizer import Tokenizer
from openlpu.serve.endpoint import STREAMED, Endpoint, Receipt, endpoint_of
from openlpu.serve.errors import ApiError
from openlpu.serve.generation import Choice, Generation, Piece, Structure
from openlpu.serve.schema.chat import ChatCompletion, ChatRequest
from openlpu.serve.telling import Telling
from openlpu.serve.tools import CallParser, ToolCall, ToolUse, parse_answer, read_tools

router = APIRouter()


@router.post("/chat/completions", response_model=ChatCompletion, responses=STREAMED)
async def create_chat_completion(
    body: ChatRequest, request: Request, x_lpu_receipt: Receipt = "false"
) -> Response:
    """Answer a conversation."""
    endpoint = endpoint_of(request, receipt=x_lpu_receipt == "true")
    service = endpoint.service
    service.check_model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        message = "max_tokens is the old name of max_completion_tokens; give one of them"
        raise ApiError(400, message, param="max_tokens")
    structure = _structure(body)
    messages = [message.plain() for message in body.messages]
    use = structure.use

    def made() -> list[list[int]]:
        return [service.encode(service.prompts.render(messages, use), special=True)]

    prompts = await service.prompts_of(made, "messages")
    generation = Generation(service, structure, endpoint.caller)
    most = body.max_completion_tokens or body.max_tokens or service.model.context
    started = generation.start(
        prompts,
        body.sampling(most, service.model.compiled.config.vocab_size),
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        priority=body.priority or 0,
    )
    told = _Told(body, endpoint, generation, use)
    return await told.respond(request, started, stream=body.stream)


def _structure(body: ChatRequest) -> Structure:
    """Raises StructureError."""
    names = {"response_format", "tools", "tool_choice", "parallel_tool_calls", "regex", "grammar"}
    asked = body.model_dump(include=names, exclude_none=True, by_alias=True)
    use = read_tools(asked.get("tools"), asked.get("tool_choice"), asked.get("parallel_tool_calls"))
    return Structure(asked.get("response_format"), body.regex, body.grammar, use, asked)


class _Told(Telling):
    """The answer as chat.completion, or chat.completion.chunks."""

    def __init__(
        self, body: ChatRequest, endpoint: Endpoint, generation: Generation, use: ToolUse | None
    ) -> None:
        super().__init__(
            endpoint,
            generation,
            model=body.model,
            prefix="chatcmpl",
            kind="chat.completion.chunk" if body.stream else "chat.completion",
            options=body.stream_options,
        )
        self._with_logprobs = bool(body.logprobs)
        self._use = use
        self._parsers: dict[int, CallParser] = {}

    def choices(self, texts: list[str]) -> list[dict[str, Any]]:
        return [self._choice(c, texts[c.index]) for c in self.generation.choices]

    def _choice(self, choice: Choice, text: str) -> dict[str, Any]:
        content, calls = (text, []) if self._use is None else parse_answer(text)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = [call.as_json() for call in calls]
        logprobs = choice.feed.answer.logprobs[: choice.told]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(logprobs),
            "finish_reason": _reason(choice, calls),
        }

    def _logprobs(self, found: list[TokenLogprob]) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None
        return {"content": [spelled(self.tokenizer, one) for one in found], "refusal": None}

    def opening(self, choice: Choice) -> dict[str, Any]:
        if self._use is not None:
            self._parsers[choice.index] = CallParser()
        return _delta(choice, {"role": "assistant", "content": "", "refusal": None})

    def text_part(self, choice: Choice, text: str) -> dict[str, Any]:
        return _delta(choice, {"content": text})

    def parts(self, choice: Choice, piece: Piece) -> list[dict[str, Any]] | None:
        parser = self._parsers.get(choice.index)
        if parser is None and not self._with_logprobs:
            return None
        deltas: list[dict[str, Any]] = [{"content": piece.text}] if piece.text else []
        if parser is not None:
            deltas = parser.push(piece.text)
            if choice.finish_reason is not None:
                deltas += parser.flush()
        found = self._logprobs(piece.logprobs) if piece.tokens else None
        if found is not None and not deltas:
            deltas = [{}]
        # The first one has the log probabilities of the whole piece.
        return [_delta(choice, d, found if i == 0 else None) for i, d in enumerate(deltas)]

    def closing(self, choice: Choice) -> dict[str, Any]:
        parser = self._parsers.get(choice.index)
        return _delta(choice, {}, reason=_reason(choice, parser.calls if parser else []))


def _reason(choice: Choice, calls: list[ToolCall]) -> str | None:
    """Why a choice has ended; calls that were cut are no reason."""
    made = choice.finish_reason == "stop" and calls and calls[-1].whole
    return "tool_calls" if made else choice.finish_reason


def _delta(
    choice: Choice,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    *,
    reason: str | None = None,
) -> dict[str, Any]:
    """The part of a chunk that is about one choice."""
    return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}


def spelled(tokenizer: Tokenizer, found: TokenLogprob) -> dict[str, Any]:
    """A token with its log probability, text and bytes."""
    top = [_spelled(tokenizer, token, logprob) for token, logprob in found.top]
    return {**_spelled(tokenizer, found.token, found.logprob), "top_logprobs": top}


def _spelled(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}
