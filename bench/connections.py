"""In: a model. Out: what `lpu serve` does with 10,000 clients that come at the same moment.

    python bench/connections.py smollm2

Every connection must get one whole answer, or a 503 that says when to come back; directly
afterwards the service must answer as before. The exit code is 1 if it is otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from servers import OpenLpuServer

_ALL_OPEN_S = 5.0  # less than the service's patience with a connection that says nothing
_ANSWER_S = 240.0
_SPARE_FILES = 100


@dataclass(slots=True)
class Flood:
    """What became of the connections."""

    fates: Counter[str] = field(default_factory=Counter)
    """How many had which end; `broken` begins those that must not be."""
    most_open: int = 0
    opened_s: float = 0.0
    refused_s: float = 0.0
    """When the last refusal had come."""
    answered_s: float = 0.0
    """When the last answer had come."""


async def flood(host: str, port: int, request: bytes, right: str, count: int) -> Flood:
    """Open all connections, then send a request over each that is not refused at once."""
    found = Flood()
    began_s = time.perf_counter()
    tried = still_open = 0
    all_tried = asyncio.Event()

    def one_more_tried() -> None:
        nonlocal tried
        tried += 1
        if tried == count:
            found.opened_s = time.perf_counter() - began_s
            all_tried.set()

    async def one() -> None:
        nonlocal still_open
        try:
            reader, writer = await asyncio.open_connection(host, port)
        except OSError as error:
            found.fates[f"broken: no connection, {error}"] += 1
            return
        finally:
            one_more_tried()
        still_open += 1
        found.most_open = max(found.most_open, still_open)
        try:
            answer = asyncio.create_task(reader.read(-1))
            told = asyncio.create_task(all_tried.wait())
            await asyncio.wait((answer, told), return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
            if not answer.done():
                writer.write(request)
            fate = fate_of(await answer, right)
        except OSError as error:
            fate = f"broken: {error}"
        finally:
            still_open -= 1
            writer.transport.abort()
        found.fates[fate] += 1
        ended_s = time.perf_counter() - began_s
        if fate.startswith("503"):
            found.refused_s = ended_s
        else:
            found.answered_s = ended_s

    async with asyncio.timeout(_ANSWER_S), asyncio.TaskGroup() as clients:
        for _ in range(count):
            clients.create_task(one())
        clients.create_task(_later(_ALL_OPEN_S, all_tried))
    return found


async def _later(patience_s: float, event: asyncio.Event) -> None:
    """Set the event, if nobody did it in time."""
    try:
        await asyncio.wait_for(event.wait(), patience_s)
    except TimeoutError:
        event.set()


def fate_of(answer: bytes, right: str) -> str:
    """Its status and reason, or `broken` and why it is no answer that a client can use."""
    head, parted, body = answer.partition(b"\r\n\r\n")
    fields = head.decode("latin-1").lower()
    length = re.search(r"\r\ncontent-length: (\d+)", fields)
    if not parted or length is None or int(length[1]) != len(body):
        return f"broken: {len(answer)} bytes, {answer[:40]!r}"
    status, document = int(fields[9:12]), json.loads(body)
    if status == 200:
        text = document["choices"][0]["text"]
        return "200" if text == right else f"broken: {text!r} instead of {right!r}"
    if status == 503 and "\r\nretry-after: 1" in fields:
        return f"503 {document['error']['message']}"
    return f"broken: {status} {document}"


def ask(url: str, body: dict[str, Any]) -> str:
    """The text of one answer."""
    head = {"content-type": "application/json"}
    request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode(), head)
    with urllib.request.urlopen(request, timeout=_ANSWER_S) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
        return text


def memory_mib(server: OpenLpuServer, field_name: str) -> int:
    """A line of the process's /proc/PID/status."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    found = re.search(rf"{field_name}:\s+(\d+) kB", status)
    return 0 if found is None else int(found[1]) >> 10


def grant_files(count: int) -> None:
    """Let this process open so many. Raises SystemExit if the system does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(count, hard)))
        except ValueError:
            sys.exit(f"{count:,} open files are needed, the system grants {hard:,}; see ulimit -n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--connections", type=int, default=10_000)
    parser.add_argument("--most-connections", type=int, help="of the service, if not its default")
    parser.add_argument("--threads", type=int, default=2)
    words = parser.parse_args()
    grant_files(words.connections + _SPARE_FILES)
    more = (
        [] if words.most_connections is None else [f"--most-connections={words.most_connections}"]
    )
    server = OpenLpuServer(words.model, words.threads, *more)
    try:
        body = {"model": server.model, "prompt": "Once", "max_tokens": 4, "temperature": 0}
        right = ask(server.url, body)
        where, payload = urlsplit(server.url), json.dumps(body).encode()
        assert where.hostname is not None
        assert where.port is not None
        head = (
            f"POST {where.path}/completions HTTP/1.1\r\nhost: {where.netloc}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(payload)}\r\n"
            "connection: close\r\n\r\n"
        )
        before_mib = memory_mib(server, "VmRSS")
        request = head.encode() + payload
        found = asyncio.run(flood(where.hostname, where.port, request, right, words.connections))
        began_s = time.perf_counter()
        same_after = ask(server.url, body) == right
        after_s = time.perf_counter() - began_s
        memory = {"before": before_mib, "most": memory_mib(server, "VmHWM")}
    finally:
        server.close()
    figures = {
        "connections": words.connections,
        "fates": dict(found.fates.most_common()),
        "most_open": found.most_open,
        "opened_s": round(found.opened_s, 2),
        "last_refusal_s": round(found.refused_s, 2),
        "last_answer_s": round(found.answered_s, 2),
        "next_answer_s": round(after_s, 3),
        "same_after": same_after,
        "memory_mib": memory,
        "exit_code": server.process.returncode,
    }
    print(json.dumps(figures, indent=2))
    broken = any(fate.startswith("broken") for fate in found.fates)
    whole = sum(found.fates.values()) == words.connections
    return int(broken or not whole or not same_after or server.process.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
