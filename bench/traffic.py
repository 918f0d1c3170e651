"""In: prompts, and the address of a server. Out: when each token of each answer came.

A closed loop: so many clients, each of which sends its next request when its answer has ended.
Prompts are token ids, so that no server's tokenizer counts, and nothing ends before its length.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of one kind: prompt_tokens (least, most), answer_tokens, how many at once, how many
    in all."""

    name: str
    prompt_tokens: tuple[int, int]
    answer_tokens: int
    clients: int
    requests: int


@dataclass(slots=True)
class Answered:
    """One answer, in seconds since the load began."""

    sent_s: float
    texts_s: list[float] = field(default_factory=list)
    """When each piece of text came. A token that is half a character has none of its own."""
    tokens: int = 0

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.texts_s[0] - self.sent_s


@dataclass(frozen=True, slots=True)
class Traffic:
    """What became of a load."""

    answers: list[Answered]
    wall_s: float

    @property
    def requests_per_s(self) -> float:
        return len(self.answers) / self.wall_s

    def first_s(self, share: float) -> float:
        """Time to the first token: this share of the answers had it sooner."""
        found = sorted(answer.first_s for answer in self.answers)
        return found[min(len(found) - 1, int(share * len(found)))]

    @property
    def between_s(self) -> float:
        """Median time from a token to the next one of the same answer."""
        return statistics.median(
            (a.texts_s[-1] - a.texts_s[0]) / (a.tokens - 1) for a in self.answers
        )


class WrongAnswer(Exception):
    """A server did not do the work that is timed."""


async def send(load: Load, url: str, model: str, prompts: list[list[int]], end: int) -> Traffic:
    """Put the load on the server at `url`, which ends in /v1. prompts: one for each request.
    end: the token that would end an answer early. Raises WrongAnswer."""
    left: Iterator[list[int]] = iter(prompts)
    answers: list[Answered] = []
    timeout = aiohttp.ClientTimeout(total=600)
    # llama.cpp's server ends a connection after each stream, so both get a new one each time.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        started_s = time.perf_counter()

        async def client() -> None:
            for prompt in left:
                body = {
                    "model": model,
                    "prompt": prompt,
                    "max_tokens": load.answer_tokens,
                    "temperature": 0,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                    "logit_bias": {str(end): -100},
                }
                answers.append(await _answer(session, f"{url}/completions", body, started_s))

        await asyncio.gather(*(client() for _ in range(load.clients)))
        wall_s = time.perf_counter() - started_s
    for answer in answers:
        if answer.tokens != load.answer_tokens:
            raise WrongAnswer(f"{load.name}: {answer.tokens} tokens of {load.answer_tokens} came")
    return Traffic(answers, wall_s)


async def _answer(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], started_s: float
) -> Answered:
    answer = Answered(time.perf_counter() - started_s)
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise WrongAnswer(f"{response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                now_s = time.perf_counter() - started_s
                chunk = json.loads(line[6:])
                if any(choice["text"] for choice in chunk.get("choices", ())):
                    answer.texts_s.append(now_s)
                if chunk.get("usage"):
                    answer.tokens = chunk["usage"]["completion_tokens"]
    return answer
