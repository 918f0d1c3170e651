"""In: a model's name. Out: whether a service under mixed load keeps every bit, token and megabyte.

    python bench/soak.py --minutes 20

`lpu serve` runs as a process of its own. What each request is told alone, by a service that shares
and proposes nothing, is what it must be told in the crowd, among clients that leave, read slowly
and send nonsense. bench/README.md says what is checked. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mixed_requests import Asked, mixed_requests
from plain_client import Told, ask, exchange, leave, message

SAMPLE_S = 2.0
# Of the memory, over the second half. The heap's high-water mark rises by a few MiB when more of
# the longest requests meet than ever before, which gets rare; a leak grows with each request.
MOST_GROWTH = 0.02
SPARE = 4  # files and threads that may be more at rest than at the first rest
SETTLE_S = 3.0
MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """The server's process at a moment."""

    at_s: float
    rss_bytes: int
    files: int
    threads: int


@dataclass(slots=True)
class Tally:
    """What happened to requests. wrong: answers that were not as they are alone."""

    answers: int = 0
    streamed: int = 0
    read_slowly: int = 0
    left: int = 0
    refused: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    wrong: list[str] = field(default_factory=list)

    def add(self, told: Told) -> None:
        """What the client was told it used."""
        self.answers += 1
        self.prompt_tokens += told.usage[0]
        self.tokens += told.usage[1]
        self.cached_tokens += told.cached


class Service:
    """A running `lpu serve`."""

    def __init__(self, model: str, data: Path, *options: str) -> None:
        self.data = data
        self.log = data / "log.jsonl"
        command = [sys.executable, "-m", "openlpu", "serve", model, "--port", "0", "--json"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, "--data", str(data), *options], stdout=subprocess.PIPE, stderr=log
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"lpu serve did not start: {self.log.read_text()[-2000:]}")
        ready = json.loads(line)
        self.port = int(ready["url"].rpartition(":")[2])
        self.model = str(ready["model"])

    def sample(self, began_s: float) -> Sample:
        """Memory, open files and threads, now."""
        proc = Path(f"/proc/{self.process.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        return Sample(
            at_s=round(time.monotonic() - began_s, 3),
            rss_bytes=pages * os.sysconf("SC_PAGE_SIZE"),
            files=len(list((proc / "fd").iterdir())),
            threads=len(list((proc / "task").iterdir())),
        )

    def end(self) -> int:
        """Its exit code after SIGTERM."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@contextlib.contextmanager
def serving(model: str, data: Path, *options: str) -> Iterator[Service]:
    service = Service(model, data, *options)
    try:
        yield service
    finally:
        service.end()


def new_key(data: Path, name: str) -> tuple[str, dict[str, str]]:
    """Its id, and the header that shows it."""
    command = [sys.executable, "-m", "openlpu", "keys", "add", name, "--json", "--data", str(data)]
    made = json.loads(subprocess.check_output(command))
    return made["id"], {"authorization": f"Bearer {made['secret']}"}


def kept_usage(data: Path, key_id: str) -> dict[str, int]:
    """The sums that the service's database holds for a key."""
    names = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens")
    with contextlib.closing(sqlite3.connect(data / "service.sqlite3")) as database:
        columns = ", ".join(f"coalesce(sum({name}), 0)" for name in names)
        row = database.execute(f"SELECT {columns} FROM usage WHERE key_id = ?", (key_id,))
        return dict(zip(names, row.fetchone(), strict=True))


# -- load ---------------------------------------------------------------------------------------


class Crowd:
    """Clients of all kinds, until the time is up."""

    def __init__(
        self,
        service: Service,
        asked: list[Asked],
        alone: list[Told],
        headers: dict[str, str],
        strangers: dict[str, str],
    ) -> None:
        """headers: of those whose usage is summed up; strangers: of all others."""
        self.tally = Tally()
        self._service = service
        self._asked = asked
        self._alone = alone
        self._headers = headers
        self._strangers = strangers

    async def run(self, clients: int, ends_s: float, seed: int) -> None:
        """ends_s: on the monotonic clock."""
        async with asyncio.TaskGroup() as group:
            for i in range(clients):
                group.create_task(self._client(random.Random(f"{seed} {i}"), ends_s))

    async def _client(self, rng: random.Random, ends_s: float) -> None:
        while time.monotonic() < ends_s:
            kind = rng.random()
            try:
                if kind < 0.82:
                    await self._good(rng)
                elif kind < 0.92:
                    await self._leaver(rng)
                else:
                    await self._bad(rng)
            except (AssertionError, OSError, ValueError, KeyError, IndexError) as error:
                self.tally.wrong.append(f"{type(error).__name__}: {error}"[:500])
            if len(self.tally.wrong) > 100:
                return

    async def _good(self, rng: random.Random) -> None:
        number = rng.randrange(len(self._asked))
        asked = self._asked[number]
        stream = asked.may_stream and rng.random() < 0.5
        pause_s = rng.choice((0.01, 0.1)) if stream and rng.random() < 0.1 else 0.0
        told = await ask(
            self._service.port, asked, stream=stream, headers=self._headers, pause_s=pause_s
        )
        self.tally.add(told)
        self.tally.streamed += stream
        self.tally.read_slowly += pause_s > 0
        if told != self._alone[number]:
            self.tally.wrong.append(f"request {number}, {asked.path}: {told.error or 'other bits'}")

    async def _leaver(self, rng: random.Random) -> None:
        """Its prompt and its grammar are like no other's."""
        said = f"{rng.getrandbits(64):x} " * rng.randint(1, 30)
        body: dict[str, Any] = {"model": self._service.model, "prompt": said, "max_tokens": 300}
        if rng.random() < 0.3:
            body["regex"] = f"[a-z ]+{rng.getrandbits(32):x}"
        asked = Asked("/v1/completions", {**body, "ignore_eos": True})
        port, headers = self._service.port, self._strangers
        left = await leave(port, asked, after=rng.randrange(8), headers=headers)
        self.tally.left += left

    async def _bad(self, rng: random.Random) -> None:
        """Nonsense is refused with the right status."""
        content, status = rng.choice(nonsense(self._service.model, self._strangers))
        if status is None:
            _, writer = await asyncio.open_connection("127.0.0.1", self._service.port)
            writer.write(content)
            await asyncio.sleep(rng.random())
            writer.transport.abort()
            return
        reply = await exchange(self._service.port, content)
        assert reply.status == status, f"{content[:60]!r} got {reply.status}"
        self.tally.refused += 1


def nonsense(model: str, headers: dict[str, str]) -> list[tuple[bytes, int | None]]:
    """Bytes, and the status that refuses them; None: they are left half-said."""
    chat, talk = "/v1/chat/completions", {"messages": [{"role": "user", "content": "?"}]}

    def body(**options: Any) -> bytes:
        return json.dumps({"model": model, **talk, **options}).encode()

    whole = message(chat, body(), headers)
    return [
        (message(chat, body(frobnicate=1), headers), 400),
        (message(chat, body()[:-5], headers), 400),
        (message(chat, body(regex="("), headers), 400),
        (message(chat, body(messages=[{"role": "user", "content": "x" * 999_999}]), headers), 400),
        (message(chat, body(), {"authorization": "Bearer lpu-wrong"}), 401),
        (message(chat, body(model="nobody"), headers), 404),
        (message("/v1/nothing", body(), headers), 404),
        (message(chat, body(), headers, method="PUT"), 405),
        (message(chat, b"", {**headers, "content-length": "999999999"}), 413),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
        (whole[: len(whole) // 3], None),
        (whole[:-9], None),
    ]


async def alone(port: int, asked: list[Asked]) -> list[Told]:
    """What each is told when nothing else is under way."""
    return [await ask(port, one) for one in asked]


# -- the verdict --------------------------------------------------------------------------------


def slope(samples: list[Sample]) -> float:
    """Bytes a second, by least squares."""
    times = np.array([s.at_s for s in samples])
    times -= times.mean()
    return float(times @ np.array([float(s.rss_bytes) for s in samples]) / (times @ times))


def verdict(
    samples: list[Sample], rests: tuple[Sample, Sample], tally: Tally, kept: dict[str, int]
) -> dict[str, Any]:
    """Figures, and under "checks" whether each of them is as it must be. rests: the process before
    and after the load."""
    half = samples[len(samples) // 2 :]
    median = statistics.median(s.rss_bytes for s in half)
    growth = slope(half) * (half[-1].at_s - half[0].at_s)
    told = {
        "requests": tally.answers,
        "prompt_tokens": tally.prompt_tokens,
        "cached_tokens": tally.cached_tokens,
        "completion_tokens": tally.tokens,
    }
    return {
        "rss_mib": round(median / MEBIBYTE, 1),
        "slope_mib_per_hour": round(slope(half) * 3600 / MEBIBYTE, 2),
        "growth_of_second_half_mib": round(growth / MEBIBYTE, 2),
        "most_files": max(s.files for s in samples),
        "most_threads": max(s.threads for s in samples),
        "rests": [asdict(rest) for rest in rests],
        "usage_told": told,
        "usage_kept": kept,
        "checks": {
            "every_answer_is_the_same": not tally.wrong,
            "usage_is_kept": told == kept,
            "memory_is_flat": growth <= MOST_GROWTH * median,
            "files_are_closed": rests[1].files <= rests[0].files + SPARE,
            "threads_are_flat": rests[1].threads <= max(s.threads for s in samples[: -len(half)]),
        },
    }


async def soak(
    service: Service, asked: list[Asked], told: list[Told], options: argparse.Namespace
) -> dict[str, Any]:
    """The whole run on a service that is ready."""
    key_id, headers = new_key(service.data, "soak")
    _, strangers = new_key(service.data, "strangers")
    await asyncio.sleep(1)  # until the service knows the keys
    for one in asked[:4]:
        await ask(service.port, one, headers=strangers)
    began_s = time.monotonic()
    rest = service.sample(began_s)
    crowd = Crowd(service, asked, told, headers, strangers)
    ends_s = began_s + 60 * options.minutes
    running = asyncio.create_task(crowd.run(options.clients, ends_s, options.seed))
    samples: list[Sample] = []
    while not running.done():
        await asyncio.wait([running], timeout=SAMPLE_S)
        samples.append(service.sample(began_s))
        if len(samples) % 15 == 0:
            tally, now = crowd.tally, samples[-1]
            print(
                f"{now.at_s:6.0f} s  {tally.answers} answers, {tally.tokens} tokens, "
                f"{len(tally.wrong)} wrong; {now.rss_bytes / MEBIBYTE:.1f} MiB, "
                f"{now.files} files, {now.threads} threads",
                file=sys.stderr,
            )
    await running
    await asyncio.sleep(SETTLE_S)
    loaded = [s for s in samples if s.at_s <= 60 * options.minutes]
    kept = kept_usage(service.data, key_id)
    metrics = await exchange(service.port, message("/metrics", b"", headers, method="GET"))
    found = verdict(loaded, (rest, service.sample(began_s)), crowd.tally, kept)
    lines = [line.rpartition(" ") for line in metrics.body.decode().splitlines()]
    found["counts"] = {
        name.removeprefix("lpu_"): float(value)
        for name, _, value in lines
        if name.startswith("lpu_") and name.endswith(("_total", "_held", "_kept", "_limit"))
    }
    return {**found, "tally": asdict(crowd.tally), "samples": [asdict(s) for s in samples]}


def counts_of(log: Path) -> dict[str, int]:
    """The lines of a service's log by what they tell; requests by their status."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return dict(Counter(str(x.get("status", x["event"])) for x in lines))


def main() -> None:
    """Run it and print what was found; exit code 1 if a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--requests", type=int, default=100, help="different ones")
    parser.add_argument("--letters", type=int, default=1200, help="of the longest prompts")
    parser.add_argument("--kv-gib", default="0.04", help="little, so that memory is given up")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="also write everything there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        plain, data = Path(name) / "plain", Path(name) / "data"
        plain.mkdir()
        data.mkdir()
        with serving(options.model, plain, "--no-prefixes", "--no-speculate") as service:
            asked = mixed_requests(
                options.requests, options.seed, model=service.model, letters=options.letters
            )
            told = asyncio.run(alone(service.port, asked))
        for one, answer in zip(asked, told, strict=True):
            if answer.status != 200 or answer.error is not None:
                sys.exit(f"{one.path} cannot be had alone: {answer.error}")
        with serving(options.model, data, "--kv-gib", options.kv_gib) as service:
            found = asyncio.run(soak(service, asked, told, options))
            found["checks"]["ends_gently"] = service.end() == 0
        found["log"] = counts_of(service.log)
    found["checks"]["no_failures"] = not {"500", "failure", "usage_lost"} & set(found["log"])
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    del found["samples"]
    print(json.dumps(found, indent=1))
    sys.exit(0 if all(found["checks"].values()) else 1)


if __name__ == "__main__":
    main()
