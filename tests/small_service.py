"""In: a database and settings. Out: a guarded small service, in a thread or in its own process."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from openlpu.serve.database import Database
from openlpu.serve.guard import Guard
from openlpu.serve.keys import KeyStore
from openlpu.serve.limits import Limits
from openlpu.serve.logs import Logs
from openlpu.serve.metrics import Metrics
from openlpu.serve.server import Server, listeners
from openlpu.serve.settings import Settings
from openlpu.serve.usage import UsageStore


def small_app() -> FastAPI:
    """What the guard protects: an echo, a failure, a meter, and streams of all lengths."""
    app = FastAPI()
    app.state.ended = []

    @app.post("/v1/echo")
    async def echo(request: Request) -> dict[str, Any]:
        body = await request.body()
        return {"length": len(body), "caller": request.state.caller.name}

    @app.post("/v1/fail")
    async def fail() -> None:
        raise ValueError("a secret prompt")

    @app.post("/v1/metered")
    async def metered(request: Request) -> dict[str, int]:
        request.state.caller.charge("m", 30, 10, 20)
        return {"done": 1}

    @app.post("/v1/wait")
    async def wait(request: Request) -> dict[str, int]:
        try:
            await asyncio.sleep(60)
        finally:
            app.state.ended.append("wait")
        return {}

    @app.post("/v1/stream")
    async def stream(request: Request, count: int, pause_s: float = 0.0, size: int = 1) -> Any:
        async def events() -> AsyncIterator[str]:
            try:
                for i in range(count):
                    yield f"data: {i} {'x' * size}\n\n"
                    await asyncio.sleep(pause_s)
                yield "data: [DONE]\n\n"
            finally:
                app.state.ended.append("stream")

        return StreamingResponse(events(), media_type="text/event-stream")

    return app


@dataclass
class Served:
    """A server that runs in a thread of this process."""

    port: int
    app: FastAPI
    guard: Guard
    log: io.StringIO
    server: Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=20, **options)

    def lines(self) -> list[dict[str, Any]]:
        time.sleep(0.1)
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


@contextlib.contextmanager
def serving(database: Database, **changes: Any) -> Iterator[Served]:
    settings = replace(
        Settings(model="tiny", port=0, data=database.path.parent, drain_s=5), **changes
    )
    sockets = listeners(settings)
    log = io.StringIO()
    logs = Logs(log, prompts=settings.log_prompts)
    keys, usage = KeyStore(database), UsageStore(database)
    app = small_app()
    guard = Guard(app, settings, keys, Limits(), usage, Metrics(), logs)
    ready = threading.Event()
    server = Server(guard, settings, logs, ready.set)
    thread = threading.Thread(target=server.run, args=(sockets,))
    thread.start()
    try:
        assert ready.wait(10)
        yield Served(sockets[0].getsockname()[1], app, guard, log, server)
    finally:
        server.should_exit = True
        thread.join(15)
        logs.close()
    assert not thread.is_alive()


_CODE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from small_service import *
database = Database(Path({data!r}))
settings = Settings(model="tiny", port=0, data=Path({data!r}), drain_s={drain_s})
sockets = listeners(settings)
logs = Logs()
keys, usage = KeyStore(database), UsageStore(database)
guard = Guard(small_app(), settings, keys, Limits(), usage, Metrics(), logs)
def ready():
    sys.stdout.write(str(sockets[0].getsockname()[1]) + "\\n")
    sys.stdout.flush()
Server(guard, settings, logs, ready).run(sockets)
database.close()
logs.close()
"""


@contextlib.contextmanager
def child(data: Path, *, drain_s: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    code = _CODE.format(tests=str(Path(__file__).parent), data=str(data), drain_s=drain_s)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process, f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.communicate()


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def until(true: Any, patience_s: float = 5.0) -> None:
    ends_s = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < ends_s, "it never became true"
        time.sleep(0.02)


def received(client: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(1 << 16):
            found += piece
    return found
