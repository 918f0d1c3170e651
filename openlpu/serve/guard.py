"""In: HTTP requests from anybody. Out: those that may come in, bounded; refusals for the others.

The outermost ASGI layer. Before the application sees a request its caller is known, within limits,
and its body is whole; while it answers, a client that left, a key that was revoked, a time that is
up end it. It also answers /health, /ready and /metrics, so that they work under any load.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from openlpu.errors import StoreError
from openlpu.serve.errors import ApiError, error_body
from openlpu.serve.keys import Key, KeyStore
from openlpu.serve.limits import Limits, RateLimited
from openlpu.serve.logs import Logs
from openlpu.serve.metrics import CONTENT_TYPE, Metrics
from openlpu.serve.settings import Settings
from openlpu.serve.usage import UsageStore

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# What nobody needs a key for: the chat page, which asks its user for one, and the probes.
_OPEN = frozenset({"/", "/health", "/ready", "/favicon.ico", "/docs", "/openapi.json"})
_OPEN_FOLDERS = ("/web/", "/docs/")
_UNTOLD = "/stats"  # the page asks twice a second: only refusals are worth a line in the log
_MOST_BODIES = 64  # of full length, held at once
_WRITE_S = 1.0
_LAST_WORDS_S = 1.0
_LOOK_AGAIN_S = 0.5  # for keys that are revoked
_HOST = re.compile(r"(\[[^][]*\]|[^][:@]*)(?::\d*)?")
_GONE_STATUS = 499  # in the log only: nobody reads the answer


@dataclass(slots=True)
class Caller:
    """Who sent a request. The application finds it as scope["state"]["caller"]."""

    request_id: str
    key: Key | None
    _keys: KeyStore
    _usage: UsageStore
    _limits: Limits
    tokens: dict[str, int] = field(default_factory=dict)
    unwritten: list[Future[None]] = field(default_factory=list)

    @property
    def key_id(self) -> str | None:
        return None if self.key is None else self.key.id

    @property
    def name(self) -> str:
        return "anonymous" if self.key is None else self.key.name

    def revoked(self) -> bool:
        """Whether its key has been revoked meanwhile: it gets nothing more."""
        return self.key is not None and not self._keys.is_good(self.key.id)

    def charge(
        self, model: str, prompt_tokens: int, cached_tokens: int, completion_tokens: int
    ) -> None:
        """Meter what the answer took, once, before its last part is sent: the guard holds back
        what is sent afterwards until the meter is written."""
        used = (prompt_tokens, cached_tokens, completion_tokens)
        self.unwritten.append(self._usage.record(self.key_id, model, *used))
        if self.key is not None:
            self._limits.charge(self.key, prompt_tokens + completion_tokens)
        names = ("prompt_tokens", "cached_tokens", "completion_tokens")
        self.tokens = dict(zip(names, used, strict=True))


class Guard:
    """ASGI middleware."""

    def __init__(
        self,
        app: App,
        settings: Settings,
        keys: KeyStore,
        limits: Limits,
        usage: UsageStore,
        metrics: Metrics,
        logs: Logs,
    ) -> None:
        self.app = app
        self.settings = settings
        self.keys = keys
        self.limits = limits
        self.usage = usage
        self.metrics = metrics
        self.logs = logs
        self.healthy: Callable[[], bool] = lambda: True
        """Whether answers can be made at all."""
        self.draining = False
        """Set when the service ends: nothing new is begun."""
        self.open_requests = 0
        self.held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; what else a server may say (its start and its end) is passed on."""
        if scope["type"] != "http" or "caller" in scope.get("state", {}):
            await self.app(scope, receive, send)
        else:
            await _Exchange(self, scope, receive, send).run()

    @property
    def ready(self) -> bool:
        """Whether a request that comes now is answered."""
        return not self.draining and self.healthy()

    def caller(self, scope: Scope, request_id: str) -> Caller:
        """Who sends a request. Raises ApiError 401."""
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, secret = (sent[0].decode("latin-1") if sent else "").partition(" ")
        key = self.keys.verify(secret.strip()) if scheme.lower() == "bearer" else None
        required = self.settings.require_keys
        if required is None:
            required = self.keys.any
        path = scope["path"]
        if key is None and required and path not in _OPEN and not path.startswith(_OPEN_FOLDERS):
            raise _unauthorized("wrong or revoked" if sent else "missing")
        if not required and not self.settings.any_name:
            self._check_name(scope)
        return Caller(request_id, key, self.keys, self.usage, self.limits)

    def _check_name(self, scope: Scope) -> None:
        """Without keys, only who calls this machine by its own names is served: a page from
        elsewhere, whose name was made to mean this machine, must not be. Raises ApiError 403."""
        sent = [value for name, value in scope["headers"] if name == b"host"]
        host = sent[0].decode("latin-1").lower() if sent else "localhost"
        parts = _HOST.fullmatch(host)
        name = host if parts is None else parts[1].strip("[]")
        if name in {"localhost", self.settings.host.lower()} or name.endswith(".localhost"):
            return
        try:
            ipaddress.ip_address(name)
        except ValueError:
            message = (
                f"without keys this service answers under localhost or an address, not as "
                f"{name[:100]!r}; add a key with `lpu keys add`, or start it with --force"
            )
            raise ApiError(403, message, code="host_not_allowed") from None


class _Exchange:
    """One request and its answer."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        self._guard = guard
        self._scope = scope
        self._outer_receive = receive
        self._outer_send = send
        self._began_s = time.perf_counter()
        self._id = f"req_{secrets.token_hex(12)}"
        self._caller: Caller | None = None
        self._body = bytearray()
        self._body_given = False
        self._gone = asyncio.Event()
        self._limit: asyncio.Timeout = asyncio.timeout(None)
        self._is_sending = False
        self._cut: ApiError | None = None
        self._endpoint = "none"
        self._status = 0
        self._is_stream = False
        self._complete = False
        self._first_byte_s: float | None = None

    async def run(self) -> None:
        """Answer it, whatever happens, and write it down."""
        if await self._probed():
            return
        guard = self._guard
        counted = False
        try:
            try:
                caller = self._caller = guard.caller(self._scope, self._id)
                self._scope.setdefault("state", {}).update(caller=caller, request_id=self._id)
                self._admit(caller)
                guard.open_requests += 1
                counted = True
                await self._read()
                if self._scope["path"] == "/metrics":
                    self._endpoint = "/metrics"
                    await self._answer(200, guard.metrics.render(), CONTENT_TYPE)
                else:
                    await self._run_app()
            except ApiError as error:
                self._cut = error.with_traceback(None)  # its frames know us, and our body
            except StoreError as error:  # who cannot be known does not come in
                guard.logs.write("store", id=self._id, reason=str(error))
                self._cut = _overloaded("the keys cannot be read")
            except asyncio.CancelledError:
                if not guard.draining:
                    raise
                self._cut = _overloaded("the service is shutting down")
            if self._cut is not None and not self._complete and not self._gone.is_set():
                await self._end(self._cut)
        finally:
            guard.held_bytes -= len(self._body)
            guard.open_requests -= counted
            self._note()

    # -- before ---------------------------------------------------------------------------------

    async def _probed(self) -> bool:
        if self._scope["path"] == "/health":
            await self._answer(200, b'{"status":"ok"}')
        elif self._scope["path"] == "/ready":
            ready = self._guard.ready
            body = b'{"status":"ready"}' if ready else b'{"status":"not ready"}'
            await self._answer(200 if ready else 503, body)
        else:
            return False
        return True

    def _admit(self, caller: Caller) -> None:
        """Raises ApiError 413, 429 or 503 for what must not even be read."""
        guard, settings = self._guard, self._guard.settings
        if guard.draining:
            raise _overloaded("the service is shutting down")
        if guard.open_requests >= settings.most_running + settings.most_waiting:
            raise _overloaded("too many requests are open")
        for name, value in self._scope["headers"]:
            if name == b"content-length" and int(value) > settings.body_bytes:
                raise self._too_large()
            if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                message = "content-encoding: bodies are read as they are, not compressed"
                raise ApiError(415, message, code="unsupported_encoding")
        if caller.key is not None and self._scope["method"] == "POST":
            try:
                guard.limits.check(caller.key)
            except RateLimited as limited:
                raise ApiError(
                    429,
                    str(limited),
                    type=limited.what,
                    code="rate_limit_exceeded",
                    headers={"retry-after": str(math.ceil(limited.retry_after_s))},
                ) from None

    def _too_large(self) -> ApiError:
        most = self._guard.settings.body_bytes
        message = f"the body is longer than {most:,} bytes"
        return ApiError(413, message, code="request_too_large")

    async def _read(self) -> None:
        """Read the body whole. Raises ApiError 408, 413 or 503."""
        guard, settings = self._guard, self._guard.settings
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                more = True
                while more:
                    message = await self._outer_receive()
                    if message["type"] == "http.disconnect":
                        self._gone.set()
                        raise ApiError(408, "the client left before its request was whole")
                    part = message.get("body", b"")
                    if len(self._body) + len(part) > settings.body_bytes:
                        raise self._too_large()
                    self._body += part
                    guard.held_bytes += len(part)
                    if guard.held_bytes > _MOST_BODIES * settings.body_bytes:
                        raise _overloaded("too many long requests are open")
                    more = message.get("more_body", False)
        except TimeoutError:
            patience_s = settings.body_timeout_s
            raise ApiError(
                408,
                f"the body did not arrive within {patience_s:g} s",
                code="request_timeout",
                headers={"connection": "close"},
            ) from None

    # -- while ----------------------------------------------------------------------------------

    async def _run_app(self) -> None:
        guard = self._guard
        watches = [asyncio.create_task(self._watch()), asyncio.create_task(self._watch_key())]
        loop = asyncio.get_running_loop()
        timer = loop.call_later(guard.settings.request_timeout_s, self._time_is_up)
        try:
            async with asyncio.timeout(None) as self._limit:
                await guard.app(self._scope, self._receive, self._send)
        except Exception as error:
            if not self._limit.expired():
                guard.logs.failure("failure", error, id=self._id)
                message = f"the service failed; its log says more about {self._id}"
                self._cut = ApiError(500, message, type="server_error")
        finally:
            for watch in watches:
                watch.cancel()
            timer.cancel()

    async def _watch(self) -> None:
        """Stop the application when the client goes away."""
        while (await self._outer_receive())["type"] != "http.disconnect":
            pass
        self._gone.set()
        if not self._complete:
            self._stop_app()

    async def _watch_key(self) -> None:
        """Stop the application when its key is revoked before it has anything to send."""
        caller = self._caller
        assert caller is not None
        while caller.key is not None:
            await asyncio.sleep(_LOOK_AGAIN_S)
            if caller.revoked() and self._cut is None:
                self._cut = _unauthorized("revoked")
                if not self._is_sending:
                    self._stop_app()
                return

    def _time_is_up(self) -> None:
        most_s = self._guard.settings.request_timeout_s
        self._cut = _overloaded(f"the answer took longer than {most_s:g} s")
        if self._is_sending:  # to a client that does not read
            self._abort()
        else:
            self._stop_app()

    def _stop_app(self) -> None:
        """Cancel the application, but not inside a call of `send`: a generator that makes an answer
        is then in the middle of its own work, and cleans up at once, not whenever its memory is
        collected."""
        if not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time())

    def _abort(self) -> None:
        self._scope.get("state", {}).get("abort", lambda: None)()

    async def _receive(self) -> Message:
        """What the application reads: the body at once, then nothing until the client leaves."""
        if not self._body_given:
            self._body_given = True
            return {"type": "http.request", "body": bytes(self._body), "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        """What the application says, unless it must not go on."""
        caller = self._caller
        assert caller is not None
        if self._cut is not None:
            await asyncio.sleep(0)
            return
        if caller.revoked():
            self._cut = _unauthorized("revoked")
            self._stop_app()
            return
        if caller.unwritten:
            await self._written(caller)
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *self._headers()]}
            self._status = message["status"]
            self._is_stream = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
        else:
            if self._first_byte_s is None:
                self._first_byte_s = time.perf_counter() - self._began_s
            self._complete = not message.get("more_body", False)
        self._is_sending = True
        await self._outer_send(message)
        self._is_sending = False

    async def _written(self, caller: Caller) -> None:
        """Wait for the meter. A disk that refuses it must not hold the answer back for ever: the
        row is tried again, and the log says so."""
        waiting = [asyncio.wrap_future(future) for future in caller.unwritten]
        caller.unwritten = []
        try:
            async with asyncio.timeout(_WRITE_S):
                await asyncio.gather(*waiting)
        except TimeoutError:
            self._guard.logs.write("usage_delayed", id=self._id)
        except StoreError as error:
            self._guard.logs.write("usage_lost", id=self._id, reason=str(error), **caller.tokens)

    # -- after ----------------------------------------------------------------------------------

    async def _end(self, error: ApiError) -> None:
        """Tell the client why it gets no answer, or no more of it."""
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                body = json.dumps(error_body(error)).encode()
                if not self._status:
                    await self._answer(error.status, body, headers=error.headers)
                elif self._is_stream:
                    event = b"data: " + body + b"\n\n"
                    await self._outer_send({"type": "http.response.body", "body": event})
                    self._complete = True
        except TimeoutError:
            pass
        if not self._complete:  # an answer that is cut must not look whole
            self._abort()
            await asyncio.sleep(0)

    async def _answer(
        self,
        status: int,
        body: bytes,
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        self._status = status
        fields = {
            "content-type": content_type,
            "content-length": str(len(body)),
            **(headers or {}),
        }
        encoded = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
        start = {"type": "http.response.start", "status": status}
        await self._outer_send({**start, "headers": encoded + self._headers()})
        shown = b"" if self._scope["method"] == "HEAD" else body
        self._complete = True
        await self._outer_send({"type": "http.response.body", "body": shown})

    def _headers(self) -> list[tuple[bytes, bytes]]:
        """Those of every answer."""
        found = [("x-request-id", self._id)]
        if self._caller is not None and self._caller.key is not None:
            found += self._guard.limits.headers(self._caller.key)
        return [(name.encode(), value.encode()) for name, value in found]

    def _note(self) -> None:
        """Count the exchange and write its line."""
        guard = self._guard
        seconds = time.perf_counter() - self._began_s
        status = self._status if self._complete or not self._gone.is_set() else _GONE_STATUS
        endpoint = getattr(self._scope.get("route"), "path", None) or self._endpoint
        guard.metrics.observe_request(endpoint, status, seconds)
        if endpoint == _UNTOLD and status == 200:
            return
        caller = self._caller
        guard.logs.write(
            "request",
            id=self._id,
            key=None if caller is None else caller.key_id,
            method=self._scope["method"],
            path=self._scope["path"][:200],
            endpoint=endpoint,
            status=status,
            seconds=round(seconds, 6),
            first_byte_s=self._first_byte_s and round(self._first_byte_s, 6),
            cut=None if self._cut is None else str(self._cut),
            body=self._body.decode("utf-8", "replace") if guard.logs.prompts else None,
            **({} if caller is None else caller.tokens),
        )


def _unauthorized(what: str) -> ApiError:
    return ApiError(
        401,
        f"the key is {what}; send `Authorization: Bearer` and a key of this service",
        code="invalid_api_key",
        headers={"www-authenticate": "Bearer"},
    )


def _overloaded(why: str) -> ApiError:
    return ApiError(
        503,
        f"{why}; try again",
        type="server_error",
        code="unavailable",
        headers={"retry-after": "1"},
    )
