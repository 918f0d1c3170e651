"""In: the guarded application and bound sockets. Out: uvicorn serving it, with a gentle end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import math
import os
import resource
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from openlpu.errors import RequestError
from openlpu.serve.connection import Connection
from openlpu.serve.guard import Guard
from openlpu.serve.logs import Logs, ServerLog
from openlpu.serve.settings import Settings, addresses

_BACKLOG = 2048
_SPARE_FILES = 256  # beside those of connections
_LAST_S = 2.0  # for answers that were cut to say so


class Server(uvicorn.Server):
    """uvicorn's server with a gentle end: the first signal lets answers end, a second does not."""

    def __init__(
        self, guard: Guard, settings: Settings, logs: Logs, on_ready: Callable[[], None]
    ) -> None:
        self._guard = guard
        self._on_ready = on_ready
        settings = dataclasses.replace(settings, most_connections=_most_connections(settings))
        super().__init__(
            uvicorn.Config(
                app=guard,
                http=type("ServedConnection", (Connection,), {"settings": settings}),
                ws="none",
                lifespan="auto",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=max(1, round(settings.keepalive_timeout_s)),
                timeout_graceful_shutdown=math.ceil(settings.drain_s),
            )
        )
        log = logging.getLogger("uvicorn.error")
        log.handlers = [ServerLog(logs)]
        log.propagate = False
        log.setLevel(logging.WARNING)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, let answers end, then cut those that did not."""
        await super().shutdown(sockets)
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_LAST_S)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. It is not raised again afterwards: the exit code of a gentle end is 0."""
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            os.kill(os.getpid(), sig)  # what the database holds is safe at any moment
        self.should_exit = self._guard.draining = True


def listeners(settings: Settings) -> list[socket.socket]:
    """Bound sockets, one for each address of the host. Raises RequestError."""
    found: list[socket.socket] = []
    port = settings.port
    try:
        for family, where in addresses(settings.host, port):
            listener = socket.socket(family, socket.SOCK_STREAM)
            found.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((where, port))
            port = listener.getsockname()[1]
    except OSError as error:
        close_all(found)
        if error.errno == errno.EADDRINUSE:
            way_out = "is taken; give another --port, or 0 for any free one"
        elif error.errno == errno.EACCES:
            way_out = "needs privileges; give a --port from 1024 on"
        else:
            way_out = f"cannot be used: {(error.strerror or str(error)).lower()}"
        raise RequestError(f"port {port} of {settings.host} {way_out}") from None
    return found


def _most_connections(settings: Settings) -> int:
    """As set, or fewer if the system grants fewer open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * settings.most_connections + _SPARE_FILES  # refused ones linger for a moment
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return max(1, min(settings.most_connections, (soft - _SPARE_FILES) // 2))
    return settings.most_connections


def close_all(sockets: list[socket.socket]) -> None:
    for one in sockets:
        one.close()
