"""In: a Generation. Out: its answers in the words of completions, whole or as events.

What /v1/chat/completions and /v1/completions have in common; they differ in what a choice is.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from fastapi import Request, Response

from openlpu.serve.endpoint import Endpoint, json_response
from openlpu.serve.generation import Choice, Generation, Piece
from openlpu.serve.schema.base import StreamOptions
from openlpu.serve.stream import DONE, EventStream, event, while_connected

_MARK = "\0"


class Telling(ABC):
    """One request's answer. Chunks of plain text are put together from parts made once."""

    def __init__(
        self,
        endpoint: Endpoint,
        generation: Generation,
        *,
        model: str,
        prefix: str,
        kind: str,
        options: StreamOptions | None,
    ) -> None:
        """prefix: of the id. kind: what the document calls itself."""
        self.endpoint = endpoint
        self.generation = generation
        self.tokenizer = endpoint.service.model.tokenizer
        self._with_usage = options is not None and bool(options.include_usage)
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": endpoint.service.fingerprint,
        }

    async def respond(
        self, request: Request, started: Awaitable[None], *, stream: bool | None
    ) -> Response:
        """The answer, once the generation is started. Raises ApiError, LpuError, ClientGone."""
        try:
            async with while_connected(request.receive):
                await started
                if not stream:
                    return json_response(await self.whole())
        except BaseException:
            self.generation.close()
            raise
        return EventStream(self.events(), close=self.generation.close)

    # -- whole ----------------------------------------------------------------------------------

    async def whole(self) -> dict[str, Any]:
        """One document."""
        generation, endpoint = self.generation, self.endpoint
        texts = [""] * len(generation.choices)
        async for found in generation.pieces():
            for choice, piece in found:
                texts[choice.index] += piece.text
        generation.close()
        document: dict[str, Any] = {
            **self._head,
            "choices": self.choices(texts),
            "usage": generation.usage(timed=endpoint.groq),
            "service_tier": "default",
        }
        if endpoint.groq:
            document["x_groq"] = {"id": endpoint.request_id}
        if endpoint.receipt:
            document["lpu_receipt"] = await asyncio.to_thread(generation.receipt)
        return document

    @abstractmethod
    def choices(self, texts: list[str]) -> list[dict[str, Any]]:
        """The choices of a document, from the texts of all of them."""

    # -- events ---------------------------------------------------------------------------------

    async def events(self) -> AsyncIterator[str]:
        """Chunks, several in one text if they come together, and [DONE]."""
        generation, endpoint = self.generation, self.endpoint
        groq = {"x_groq": {"id": endpoint.request_id}} if endpoint.groq else {}
        openings = [self.opening(choice) for choice in generation.choices]
        yield "".join(self.chunk(part, **groq) for part in openings if part is not None)
        plain = [self._around_text(choice) for choice in generation.choices]
        left = len(generation.choices)
        async for found in generation.pieces():
            chunks: list[str] = []
            for choice, piece in found:
                parts = self.parts(choice, piece)
                if parts is not None:
                    chunks += map(self.chunk, parts)
                elif piece.text:
                    before, after = plain[choice.index]
                    chunks.append(f"{before}{json.dumps(piece.text)}{after}")
                if choice.finish_reason is not None:
                    left -= 1
                    last = {}
                    if groq and not left:
                        usage = generation.usage(timed=True)
                        last = {"x_groq": {"id": endpoint.request_id, "usage": usage}}
                    chunks.append(self.chunk(self.closing(choice), **last))
            yield "".join(chunks)
        generation.close()
        yield await self._end()

    def chunk(self, choice: dict[str, Any], **extra: Any) -> str:
        """One event about one choice."""
        usage = {"usage": None} if self._with_usage else {}
        return event({**self._head, "choices": [choice], **usage, **extra})

    async def _end(self) -> str:
        """The chunk without choices, if one is wanted, and [DONE]."""
        told: dict[str, Any] = {}
        if self._with_usage:
            told["usage"] = self.generation.usage(timed=self.endpoint.groq)
        if self.endpoint.receipt:
            told["lpu_receipt"] = await asyncio.to_thread(self.generation.receipt)
        return (event({**self._head, "choices": [], **told}) if told else "") + DONE

    def _around_text(self, choice: Choice) -> tuple[str, str]:
        """What stands before and after the text in the chunks of a choice."""
        before, _, after = self.chunk(self.text_part(choice, _MARK)).partition(json.dumps(_MARK))
        return before, after

    @abstractmethod
    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """The part of the first chunk, if there is one before any token."""

    @abstractmethod
    def text_part(self, choice: Choice, text: str) -> dict[str, Any]:
        """The part of a chunk that has text and nothing else."""

    @abstractmethod
    def parts(self, choice: Choice, piece: Piece) -> list[dict[str, Any]] | None:
        """The parts of chunks for a piece; None: only its text counts."""

    @abstractmethod
    def closing(self, choice: Choice) -> dict[str, Any]:
        """The part of the chunk that tells why a choice has ended."""
