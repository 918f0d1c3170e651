"""In: Settings. Out: a model that is served until a signal comes; exit code 0.

The order of a start: the rules that may refuse it, the port, the model, the service. So what is
wrong is told before the work, and nothing is answered before the model can.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from openlpu.engine.batcher import Engine
from openlpu.engine.compiled import Progress
from openlpu.engine.model import Model, load
from openlpu.errors import RequestError
from openlpu.host import HostModel
from openlpu.serve.app import Service, create_app
from openlpu.serve.database import Database
from openlpu.serve.guard import Guard
from openlpu.serve.keys import KeyStore
from openlpu.serve.limits import Limits
from openlpu.serve.logs import Logs
from openlpu.serve.metrics import Metrics
from openlpu.serve.server import Server, close_all, listeners
from openlpu.serve.settings import Settings, is_public
from openlpu.serve.usage import UsageStore
from openlpu.serve.worker import Worker

_GARBAGE = (2_000, 10, 10)  # objects before a round; the command line has set far more
_KV_SHARE = 4  # of the machine's memory


@dataclass(frozen=True, slots=True)
class Ready:
    """What a service says when it can answer."""

    url: str
    model: str
    aliases: tuple[str, ...]
    identity: str
    ready_s: float
    """Since `run` was called."""


def run(
    settings: Settings,
    *,
    forced: bool = False,
    progress: Progress | None = None,
    on_ready: Callable[[Ready], None],
) -> None:
    """Serve a model until SIGTERM or SIGINT. forced: a public address may do without keys.
    progress: of loading; without it the stages go to the log.

    Raises LpuError for whatever hinders the start.
    """
    began_s = time.perf_counter()
    with contextlib.ExitStack() as stack:
        database = Database(settings.data)
        stack.callback(database.close)
        keys = KeyStore(database)
        settings = _secured(settings, keys, forced=forced)
        sockets = listeners(settings)
        stack.callback(close_all, sockets)
        logs = Logs(prompts=settings.log_prompts)
        stack.callback(logs.close)
        model = stack.enter_context(opened(settings, progress or _logged(logs)))
        url = _url(settings.host, sockets[0].getsockname()[1])

        def tell() -> None:
            ready_s = time.perf_counter() - began_s
            on_ready(Ready(url, model.name, settings.aliases, model.identity, ready_s))

        serve(settings, model, database, keys, logs, sockets, on_ready=tell)


def serve(
    settings: Settings,
    model: Model,
    database: Database,
    keys: KeyStore,
    logs: Logs,
    sockets: list[socket.socket],
    *,
    on_ready: Callable[[], None],
) -> None:
    """Serve an open model on bound sockets."""
    metrics = Metrics()
    limits = Limits()
    usage = UsageStore(database)
    worker = Worker(model, most_running=settings.most_running, most_waiting=settings.most_waiting)
    metrics.watch(worker, model.engine.pages)
    service = Service(
        model=model,
        worker=worker,
        settings=settings,
        metrics=metrics,
        keys=keys,
        usage=usage,
        limits=limits,
    )
    guard = Guard(create_app(service), settings, keys, limits, usage, metrics, logs)
    guard.healthy = lambda: worker.healthy
    worker.start()
    # What exists by now stays. Leaving it out makes the collector's full rounds short, and they may
    # be frequent enough that what requests leave in rings of references does not pile up.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GARBAGE)
    try:
        logs.write("start", model=model.name, identity=model.identity)
        Server(guard, settings, logs, on_ready).run(sockets)
        logs.write("end")
    finally:
        worker.close()


@contextlib.contextmanager
def opened(settings: Settings, progress: Progress | None = None) -> Iterator[Model]:
    """The model, loaded as the settings say."""
    with load(
        settings.model,
        precision=settings.precision,
        threads=settings.threads,
        kernels=settings.kernels,
        context=settings.context,
        progress=progress,
    ) as model:
        assert isinstance(model.runner, HostModel), "load makes one"
        kv_bytes = settings.kv_bytes
        if kv_bytes is None:
            kv_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _KV_SHARE
        model.engine = Engine(
            model.runner,
            context=model.context,
            vocab_size=model.compiled.config.vocab_size,
            most_pages=max(1, kv_bytes // model.runner.page_bytes),
            share_prefixes=settings.share_prefixes,
        )
        yield model


def _logged(logs: Logs) -> Progress:
    """A line for each stage of loading, when it begins."""
    begun: set[str] = set()

    def progress(stage: str, done: int, total: int) -> None:
        if stage not in begun:
            begun.add(stage)
            logs.write("load", stage=stage)

    return progress


def _secured(settings: Settings, keys: KeyStore, *, forced: bool) -> Settings:
    """The settings with the rule for public addresses. Raises RequestError."""
    settings = dataclasses.replace(settings, any_name=settings.any_name or forced)
    if settings.require_keys is not None or not is_public(settings.host):
        return settings
    if keys.any:
        return dataclasses.replace(settings, require_keys=True)
    if not forced:
        raise RequestError(
            f"{settings.host} can be reached by other machines, and there are no keys; add one "
            "with `lpu keys add NAME`, or let anybody in with --force"
        )
    return settings


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
