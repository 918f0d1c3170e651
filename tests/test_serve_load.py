"""In: 200 requests of all kinds, sent alone and in crowds. Out: the same answers, bit for bit.

Each way of sending must show that what it is about has happened: prefixes found, proposals taken,
memory given up, clients gone. Otherwise it would prove nothing.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mixed_requests import Asked, mixed_requests
from plain_client import Told, ask, leave, message
from small_api import ALIAS, roomy_model, serving_api
from small_service import until

import openlpu
from openlpu.engine import batcher
from openlpu.engine.batcher import Engine

REQUESTS = mixed_requests(200, 4, model=ALIAS)
LEAVERS = 30
PATIENCE_S = 120


@dataclass(frozen=True, slots=True)
class Way:
    """How the requests are sent. pages: of K/V memory, None: enough. places: answers under way."""

    clients: int
    prefixes: bool
    speculation: bool
    pages: int | None = None
    places: int = 256

    def __str__(self) -> str:
        prefixes = "prefixes" if self.prefixes else "plain"
        speculation = "-speculation" if self.speculation else ""
        memory = "" if self.pages is None else f"-{self.pages}-pages"
        return f"{self.clients}-{prefixes}{speculation}{memory}"


ALONE = Way(1, prefixes=False, speculation=False)
WAYS = (
    Way(1, prefixes=True, speculation=True),
    Way(8, prefixes=True, speculation=True),
    Way(8, prefixes=True, speculation=False, pages=56),
    Way(8, prefixes=False, speculation=True, pages=56),
    Way(8, prefixes=False, speculation=False, pages=56),
    Way(64, prefixes=True, speculation=True, pages=80),
    Way(64, prefixes=True, speculation=False, pages=80),
    Way(64, prefixes=False, speculation=True, pages=80),
    Way(64, prefixes=False, speculation=False, pages=80, places=24),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What all requests were told, by number, and what the service counted meanwhile."""

    told: list[Told]
    counts: dict[str, float]
    gone: int
    """Clients that hung up on an answer under way."""


def sent(model: openlpu.Model, data: Path, way: Way, *, seed: int) -> Outcome:
    """All requests, whole or streamed, in an order that the seed gives (alone: their own)."""
    with pytest.MonkeyPatch.context() as patch:
        # Proposals in crowds, too; there are none while prompts are on their way.
        patch.setattr(batcher, "_DRAFTED_ROWS", 64)
        model.engine = Engine(
            model.runner,
            context=model.context,
            vocab_size=model.compiled.config.vocab_size,
            most_pages=way.pages,
            share_prefixes=way.prefixes,
            prompt_rows=(512, 512) if way.speculation else (32, 128),
        )
    changes: dict[str, Any] = {"speculate": way.speculation, "most_running": way.places}
    with serving_api(model, data, **changes) as api:
        told, gone = asyncio.run(_crowd(api.port, way, random.Random(seed)))
        until(lambda: model.engine.sequences == api.worker.running == 0)
        assert model.engine.pages.held == 0
        assert len(told) == len(REQUESTS)
        return Outcome([told[i] for i in range(len(told))], _counts(api.get("/metrics").text), gone)


async def _crowd(port: int, way: Way, rng: random.Random) -> tuple[dict[int, Told], int]:
    """Answers by number, and how many others left in the middle of theirs."""
    told: dict[int, Told] = {}
    gone = 0
    work: list[tuple[int, Asked, int]] = [
        (i, asked, asked.may_stream and rng.randrange(2)) for i, asked in enumerate(REQUESTS)
    ]
    if way.clients > 1:
        work += [(-1, _endless(rng), rng.randrange(7)) for _ in range(LEAVERS)]
        rng.shuffle(work)
    queue = iter(work)

    async def client() -> None:
        nonlocal gone
        for i, asked, how in queue:
            if i < 0:
                was_under_way = await leave(port, asked, after=how)
                gone += was_under_way
            else:
                told[i] = await ask(port, asked, stream=bool(how))

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        for _ in range(way.clients):
            group.create_task(client())
    return told, gone


def _endless(rng: random.Random) -> Asked:
    """A stream that would go on for long, with a prompt that others have, too."""
    prompt = rng.choice([r.body["prompt"] for r in REQUESTS if "prompt" in r.body])
    options = {"max_tokens": 400, "ignore_eos": True, "n": rng.randint(1, 2)}
    return Asked("/v1/completions", {"model": ALIAS, "prompt": prompt, **options})


def _counts(page: str) -> dict[str, float]:
    """Prometheus' page as a table."""
    lines = [line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openlpu.Model]:
    with roomy_model(tmp_path_factory.mktemp("models"), threads=1) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def alone(model: openlpu.Model, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The reference: one after the other, and nothing kept, shared or proposed."""
    return sent(model, tmp_path_factory.mktemp("data"), ALONE, seed=0)


def test_the_requests_are_mixed(alone: Outcome) -> None:
    counts = alone.counts
    for name in ("cached", "proposed", "accepted"):
        assert counts[f"lpu_{name}_tokens_total"] == 0
    assert counts["lpu_preemptions_total"] == 0
    for told in alone.told:
        assert told.status == 200
        assert told.error is None
    prompts = [told.usage[0] for told in alone.told]
    answers = [len(a["tokens"]) for told in alone.told for a in told.receipt["answers"]]
    assert min(prompts) == 1
    assert sum(n > 500 for n in prompts) > 20
    assert min(answers) <= 2
    assert sum(n > 50 for n in answers) > 10
    kinds = Counter(r.path.removeprefix("/openai") for r in REQUESTS)
    assert min(kinds.values()) >= 5, kinds
    assert len(kinds) == 4
    fields = Counter(name for r in REQUESTS for name in r.body)
    rare = ("n", "best_of", "echo", "grammar", "regex", "response_format", "text", "tools", "stop")
    rare += ("top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "logit_bias")
    assert min(fields[name] for name in rare) >= 3, fields
    reasons = Counter(c["finish_reason"] for t in alone.told for c in t.choices if len(c) > 1)
    assert min(reasons[name] for name in ("stop", "length", "completed", "incomplete")) > 2, reasons
    assert sum(bool(c.get("calls")) for told in alone.told for c in told.choices) > 5


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_bit_is_the_same(
    way: Way, model: openlpu.Model, alone: Outcome, tmp_path: Path
) -> None:
    found = sent(model, tmp_path, way, seed=WAYS.index(way) + 1)
    for number, (mine, reference) in enumerate(zip(found.told, alone.told, strict=True)):
        assert mine == reference, f"request {number}: {json.dumps(REQUESTS[number].body)[:2000]}"
    _is_proven(way, found)


def _is_proven(way: Way, found: Outcome) -> None:
    """What the way of sending is about has happened."""
    counts = found.counts
    print(way, {n: v for n, v in counts.items() if re.search("(acc|prop|cach|preem).*_total", n)})
    assert (counts["lpu_cached_tokens_total"] > 1000) == way.prefixes
    assert (sum(told.cached for told in found.told) > 1000) == way.prefixes
    assert (counts["lpu_accepted_tokens_total"] > 10) == way.speculation
    assert (counts["lpu_proposed_tokens_total"] > 0) == way.speculation
    assert (counts["lpu_preemptions_total"] > 5) == (way.pages is not None)
    if way.clients > 1:
        few = counts[f'lpu_batch_sequences_bucket{{le="{way.clients / 4}"}}']
        assert counts["lpu_batch_sequences_count"] > few, "they never were a crowd"
        assert found.gone > LEAVERS // 2
        told = [n for name, n in counts.items() if re.search('requests_total.*"499"', name)]
        assert sum(told) > LEAVERS // 4


def test_a_message_beside_tools_has_all_its_log_probabilities(
    model: openlpu.Model, tmp_path: Path
) -> None:
    """Spaces and what may begin a call are held back; their tokens are told with what follows."""
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    body = {"model": ALIAS, "input": "?", "tools": [tool], "logit_bias": {"32": 6, "60": 6}}
    body |= {"seed": 1, "max_output_tokens": 60, "include": ["message.output_text.logprobs"]}
    with serving_api(model, tmp_path) as api:
        asked = Asked("/v1/responses", body)
        for stream in (False, True):
            told = asyncio.run(ask(api.port, asked, stream=stream))
            (choice,) = told.choices
            assert choice["form"] == ["message"]
            assert len(choice["logprobs"]) == told.usage[1] == 60


LETTERS = b"x" * (1 << 20)
CHAT = "/v1/chat/completions"
GOOD = json.dumps({"model": ALIAS, "messages": [{"role": "user", "content": "?"}]}).encode()


@pytest.mark.parametrize(
    ("body", "missing"),
    [
        pytest.param(b'{"model": ' + LETTERS, 0, id="no JSON"),
        pytest.param(b'"\xff' + LETTERS, 0, id="no UTF-8"),
        pytest.param(GOOD[:-1] + b', "user": "' + LETTERS + b'"}', 0, id="good"),
        pytest.param(GOOD + LETTERS, 1, id="cut off"),
    ],
)
def test_no_body_waits_for_the_garbage_collector(
    body: bytes, missing: int, model: openlpu.Model, tmp_path: Path
) -> None:
    """It comes after so many objects, whatever they hold: gigabytes, of some hundred bodies."""

    async def send(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        content = message(CHAT, body)
        writer.write(content[: len(content) - missing])
        await writer.drain()
        if not missing:
            await reader.read()
        writer.transport.abort()

    with serving_api(model, tmp_path) as api:
        asyncio.run(send(api.port))  # what is made once is made
        gc.disable()
        tracemalloc.start(1)
        try:
            for _ in range(6):
                asyncio.run(send(api.port))
            until(lambda: tracemalloc.get_traced_memory()[0] < 2 * len(LETTERS))
        finally:
            tracemalloc.stop()
            gc.enable()
