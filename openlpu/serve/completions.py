"""In: the beginning of a text. Out: how the model goes on, whole or as events; /v1/completions."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from openlpu.engine.logprobs import TokenLogprob
from openlpu.serve.endpoint import STREAMED, Endpoint, Receipt, endpoint_of
from openlpu.serve.errors import ApiError
from openlpu.serve.generation import Choice, Generation, Piece, Structure
from openlpu.serve.schema.completions import Completion, CompletionRequest
from openlpu.serve.service import Service
from openlpu.serve.telling import Telling

router = APIRouter()
_MOST_TOKENS = 16  # if not given


@router.post("/completions", response_model=Completion, responses=STREAMED)
async def create_completion(
    body: CompletionRequest, request: Request, x_lpu_receipt: Receipt = "false"
) -> Response:
    """Go on with a text."""
    endpoint = endpoint_of(request, receipt=x_lpu_receipt == "true")
    service = endpoint.service
    service.check_model(body.model)
    n = body.n or 1
    made = body.best_of or n
    if made < n:
        raise ApiError(400, f"best_of is {made}, fewer than n, {n}", param="best_of")
    if made > n and body.stream:
        message = "best_of greater than n cannot be streamed: the best are known at the end"
        raise ApiError(400, message, param="best_of")
    if body.echo and body.logprobs is not None:
        message = "logprobs of an echoed prompt are not supported; leave echo or logprobs out"
        raise ApiError(400, message, param="echo")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", param="stream_options")
    prompts = await service.prompts_of(lambda: _prompts(service, body), "prompt")
    asked = body.model_dump(
        include={"response_format", "regex", "grammar"}, exclude_none=True, by_alias=True
    )
    structure = Structure(asked.get("response_format"), body.regex, body.grammar, asked=asked)
    generation = Generation(service, structure, endpoint.caller)
    started = generation.start(
        prompts,
        body.sampling(body.max_tokens or _MOST_TOKENS, service.model.compiled.config.vocab_size),
        n=made,
        logprobs=0 if body.logprobs is None and made > n else body.logprobs,
        priority=body.priority or 0,
    )
    told = _Told(body, endpoint, generation, best=(n, made))
    return await told.respond(request, started, stream=body.stream)


def _prompts(service: Service, body: CompletionRequest) -> list[list[int]]:
    """The tokens of each prompt. Raises ApiError, RequestError."""
    given = body.prompt
    if isinstance(given, str):
        return [service.encode(given, special=False)]
    if isinstance(given[0], int):
        return [[token for token in given if isinstance(token, int)]]
    return [
        service.encode(one, special=False) if isinstance(one, str) else one
        for one in given
        if not isinstance(one, int)
    ]


class _Told(Telling):
    """The answer as text_completion."""

    def __init__(
        self,
        body: CompletionRequest,
        endpoint: Endpoint,
        generation: Generation,
        *,
        best: tuple[int, int],
    ) -> None:
        """best: how many of how many choices of a prompt are told."""
        super().__init__(
            endpoint,
            generation,
            model=body.model,
            prefix="cmpl",
            kind="text_completion",
            options=body.stream_options,
        )
        self._best = best
        self._echo = bool(body.echo)
        self._others = body.logprobs
        self._offsets: dict[int, _Offsets] = {}

    def choices(self, texts: list[str]) -> list[dict[str, Any]]:
        n, made = self._best
        chosen: list[Choice] = []
        every = self.generation.choices
        for start in range(0, len(every), made):
            of_prompt = every[start : start + made]
            if made > n:
                of_prompt = sorted(
                    sorted(of_prompt, key=_mean_logprob, reverse=True)[:n], key=_index
                )
            chosen += of_prompt
        return [
            {
                "index": i,
                "text": self._echoed(c) + texts[c.index],
                "logprobs": self._logprobs(c, c.feed.answer.logprobs[: c.told]),
                "finish_reason": c.finish_reason,
            }
            for i, c in enumerate(chosen)
        ]

    def _echoed(self, choice: Choice) -> str:
        return self.endpoint.service.model.detokenize(choice.prompt) if self._echo else ""

    def _logprobs(self, choice: Choice, found: list[TokenLogprob]) -> dict[str, Any] | None:
        if self._others is None:
            return None
        text = self.tokenizer.token_text
        offsets = self._offsets.setdefault(choice.index, _Offsets(self))
        tops = [{text(i): p for i, p in reversed(((t.token, t.logprob), *t.top))} for t in found]
        return {
            "tokens": [text(t.token) for t in found],
            "token_logprobs": [t.logprob for t in found],
            "top_logprobs": tops if self._others else None,
            "text_offset": [offsets.of(t.token) for t in found],
        }

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        return self.text_part(choice, self._echoed(choice)) if self._echo else None

    def text_part(self, choice: Choice, text: str) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": None, "finish_reason": None}

    def parts(self, choice: Choice, piece: Piece) -> list[dict[str, Any]] | None:
        found = self._logprobs(choice, piece.logprobs) if piece.tokens else None
        return (
            None if found is None else [{**self.text_part(choice, piece.text), "logprobs": found}]
        )

    def closing(self, choice: Choice) -> dict[str, Any]:
        return {**self.text_part(choice, ""), "finish_reason": choice.finish_reason}


class _Offsets:
    """Where each token's text begins in the answer's."""

    def __init__(self, told: Telling) -> None:
        self._stream = told.tokenizer.stream()
        self._length = 0

    def of(self, token: int) -> int:
        start = self._length
        self._length += len(self._stream.push(token))
        return start


def _index(choice: Choice) -> int:
    return choice.index


def _mean_logprob(choice: Choice) -> float:
    found = choice.feed.answer.logprobs[: choice.told]
    return sum(t.logprob for t in found) / max(1, len(found))
