"""In: a model. Out: the whole service around it, guarded, on a port of its own in a thread."""

from __future__ import annotations

import contextlib
import io
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from tiny_chat import write_tiny_chat

import openlpu
from openlpu import knobs
from openlpu.serve.app import Service, create_app
from openlpu.serve.database import Database
from openlpu.serve.guard import Guard
from openlpu.serve.keys import KeyStore
from openlpu.serve.limits import Limits
from openlpu.serve.logs import Logs
from openlpu.serve.metrics import Metrics
from openlpu.serve.server import Server, listeners
from openlpu.serve.settings import Settings
from openlpu.serve.usage import UsageStore
from openlpu.serve.worker import Worker

ALIAS = "gpt-4o-mini"


@dataclass
class Api:
    """A running service."""

    port: int
    service: Service
    log: io.StringIO
    guard: Guard

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def worker(self) -> Worker:
        return self.service.worker

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, **options)

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return httpx.post(self.url + path, timeout=30, **options)

    def chat(self, text: str = "Hi", **options: Any) -> httpx.Response:
        messages = [{"role": "user", "content": text}]
        body = {"model": ALIAS, "messages": messages, "max_tokens": 8, **options}
        return self.post("/v1/chat/completions", body)


@contextlib.contextmanager
def roomy_model(parent: Path, *, threads: int = 2) -> Iterator[openlpu.Model]:
    """A tiny model with room for tools: each letter is a token."""
    folder = write_tiny_chat(parent / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    with (
        knobs.override(CACHE=str(parent / "cache")),
        openlpu.load(str(folder), threads=threads) as loaded,
    ):
        yield loaded


@contextlib.contextmanager
def serving_api(model: openlpu.Model, data: Path, **changes: Any) -> Iterator[Api]:
    settings = Settings(model="tiny", port=0, data=data, drain_s=5, aliases=(ALIAS,))
    settings = replace(settings, **changes)
    sockets = listeners(settings)
    log = io.StringIO()
    logs = Logs(log)
    database = Database(data)
    keys, usage, limits, metrics = KeyStore(database), UsageStore(database), Limits(), Metrics()
    worker = Worker(model, most_running=settings.most_running, most_waiting=settings.most_waiting)
    metrics.watch(worker, model.engine.pages)
    service = Service(model, worker, settings, metrics, keys, usage, limits)
    guard = Guard(create_app(service), settings, keys, limits, usage, metrics, logs)
    ready = threading.Event()
    server = Server(guard, settings, logs, ready.set)
    thread = threading.Thread(target=server.run, args=(sockets,))
    worker.start()
    thread.start()
    try:
        assert ready.wait(20)
        yield Api(sockets[0].getsockname()[1], service, log, guard)
    finally:
        server.should_exit = guard.draining = True
        thread.join(20)
        worker.close()
        database.close()
        logs.close()
    assert not thread.is_alive()
