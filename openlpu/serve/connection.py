"""In: bytes of one client. Out: whole request heads for the guard; an end for who sends none.

uvicorn's HTTP protocol limits the time of idle connections only, and no head's length. Here every
connection has a deadline from its first moment, and each answer below HTTP's own level is polite:
one error body, a closed sending side, and a moment to read it before the end.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import socket
import struct
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from openlpu.serve.errors import ApiError, error_body
from openlpu.serve.settings import Settings

_HEAD_BYTES = 64 << 10
_MOST_PIPELINED = 16
_LINGER_S = 2.0
_NO_LINGER = struct.pack("ii", 1, 0)
_BODY_GRACE_S = 5.0  # after the guard's own limit, for a body that is only thrown away
_THROWN_AWAY = 16  # bodies' length that a refused client may still send


class Connection(HttpToolsProtocol):
    """One connection of one client."""

    settings: ClassVar[Settings]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._deadline: asyncio.TimerHandle | None = None
        self._end: asyncio.TimerHandle | None = None
        self._in_head = True
        self._told = 0  # what the parser has made of the bytes so far
        self._silent_bytes = 0  # since it last told anything
        self._header_bytes = 0  # of a request's address, header and trailers
        self._thrown_bytes = 0
        self._refused = False
        self._lost = False
        self._answering: RequestResponseCycle | None = None

    # -- the transport's calls ------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.settings.most_connections:
            self._refuse(503, "too many connections are open; try again", retry=True)
        else:
            self._wait(self.settings.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._stop_waiting()
        if self._end is not None:
            self._end.cancel()  # it would keep all that the connection knows in memory
        super().connection_lost(exc)
        # uvicorn tells the newest of several requests only.
        answering = self._answering
        if answering is not None and not answering.response_complete:
            answering.disconnected = True
            answering.message_event.set()
        # Each knows the connection: such a ring would keep a body until the collector comes.
        self.scope = self.cycle = self._answering = None  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        told = self._told
        super().data_received(data)
        self._silent_bytes = self._silent_bytes + len(data) if told == self._told else 0
        self._check_length()
        if len(self.pipeline) > _MOST_PIPELINED:
            self.abort()

    def _check_length(self) -> None:
        if max(self._silent_bytes, self._header_bytes) > _HEAD_BYTES and not self._refused:
            self._refuse(431, f"the header is longer than {_HEAD_BYTES:,} bytes")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    # -- the parser's calls ---------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._header_bytes = 0
        super().on_message_begin()
        self.scope["state"]["abort"] = self.abort
        if self._deadline is None:
            self._wait(self.settings.head_timeout_s)

    def on_url(self, url: bytes) -> None:
        self._header_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A line of the header, or of the trailers, for which there is no other bound."""
        self._told += 1
        self._header_bytes += len(name) + len(value) + 4  # ": " and the line end
        self._check_length()
        if not self._refused:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._told += 1
        if self._refused:
            return
        self._in_head = False
        self._thrown_bytes = 0
        self._wait(self.settings.body_timeout_s + _BODY_GRACE_S)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._told += 1
        if self._refused:
            return
        if self.cycle.response_complete:
            self._thrown_bytes += len(body)
            if self._thrown_bytes > _THROWN_AWAY * self.settings.body_bytes:
                self.abort()
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._told += 1
        if self._refused:
            return
        self._in_head = True
        self._header_bytes = 0
        self._stop_waiting()
        super().on_message_complete()

    # -- ends -----------------------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        if not self._refused:
            self._refuse(400, msg)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_later()

    def abort(self) -> None:
        """End the connection, and drop what the client has not read, the system's part included."""
        if not self._lost:  # else its descriptor may be another's by now
            end = self.transport.get_extra_info("socket")
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            self.transport.abort()

    def _end_in(self, patience_s: float) -> None:
        if self._end is not None:
            self._end.cancel()
        if not self._lost:
            self._end = self.loop.call_later(patience_s, self.abort)

    def _abort_later(self) -> None:
        """A client that reads nothing must not keep what it does not read."""
        self._end_in(self.settings.body_timeout_s)

    def _wait(self, patience_s: float) -> None:
        self._stop_waiting()
        self._deadline = self.loop.call_later(patience_s, self._too_slow)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self.pipeline or (self._in_head and self._is_answering()):
            self._wait(self.settings.head_timeout_s)  # it is our answer that takes its time
        elif not self._in_head:
            self.abort()
        elif self._silent_bytes or self._header_bytes:
            patience_s = self.settings.head_timeout_s
            self._refuse(408, f"the header did not arrive within {patience_s:g} s")
        else:
            self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, message: str, *, retry: bool = False) -> None:
        self._refused = True
        if self._is_answering():
            self.abort()  # a second answer must not get into the first
            return
        self._stop_waiting()
        self._unset_keepalive_if_required()
        self.connections.discard(self)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = json.dumps(error_body(ApiError(status, message, type=kind))).encode()
        head = [
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"x-request-id: req_" + secrets.token_hex(12).encode(),
            b"connection: close",
            *([b"retry-after: 1"] if retry else []),
        ]
        self.transport.write(STATUS_LINE[status] + b"\r\n".join(head) + b"\r\n\r\n" + body)
        # Closing now, with unread bytes of the client, would reset the connection and take the
        # answer away from it.
        self.transport.write_eof()
        self._end_in(_LINGER_S)
