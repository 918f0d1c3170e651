"""In: clients good and bad, floods, signals. Out: who comes in, who is refused, a gentle end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from small_service import Served, bearer, child, received, serving, until

from openlpu.errors import RequestError
from openlpu.serve.connection import Connection
from openlpu.serve.database import Database
from openlpu.serve.logs import Logs
from openlpu.serve.server import listeners
from openlpu.serve.settings import Settings, is_public
from openlpu.serve.usage import Totals, UsageStore


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def served(database: Database) -> Iterator[Served]:
    with serving(database) as running:
        yield running


# -- who may come in --------------------------------------------------------------------------


def test_without_keys_anybody_on_this_machine_may_ask(served: Served) -> None:
    for headers in ({}, bearer("anything")):
        answer = served.post("/v1/echo", content=b"12345", headers=headers)
        assert answer.json() == {"length": 5, "caller": "anonymous"}
        assert answer.headers["x-request-id"].startswith("req_")


def test_once_there_is_a_key_it_is_needed(served: Served) -> None:
    _, secret = served.guard.keys.add("Ada")
    for headers in ({}, bearer("lpu-wrong"), {"authorization": secret}, bearer("\xff")):
        encoded = {name: value.encode("latin-1") for name, value in headers.items()}
        answer = served.post("/v1/echo", headers=encoded)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
    assert served.post("/v1/echo", headers=bearer(secret)).json()["caller"] == "Ada"
    assert httpx.get(served.url + "/health").status_code == 200
    assert httpx.get(served.url + "/metrics").status_code == 401
    assert httpx.get(served.url + "/metrics", headers=bearer(secret)).status_code == 200


def test_a_key_that_asks_too_often_is_told_when_to_come_back(served: Served) -> None:
    _, secret = served.guard.keys.add("Ada", requests_per_minute=2, tokens_per_minute=1000)
    answers = [served.post("/v1/metered", headers=bearer(secret)) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[1].headers["x-ratelimit-remaining-requests"] == "0"
    assert answers[1].headers["x-ratelimit-remaining-tokens"] in {"900", "901"}
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert answers[2].json()["error"]["type"] == "requests"


def test_usage_is_written_before_the_answer_is_whole(served: Served, database: Database) -> None:
    key, secret = served.guard.keys.add("Ada")
    for count in range(1, 4):
        served.post("/v1/metered", headers=bearer(secret))
        other = Database(database.path.parent)  # as another process sees it
        assert UsageStore(other).totals(key.id) == Totals(count, 30 * count, 10 * count, 20 * count)
        other.close()
    line = served.lines()[-1]
    assert (line["key"], line["completion_tokens"], line["endpoint"]) == (
        key.id,
        20,
        "/v1/metered",
    )


def test_a_key_revoked_in_the_middle_ends_the_stream(served: Served) -> None:
    key, secret = served.guard.keys.add("Ada")
    url = served.url + "/v1/stream?count=1000&pause_s=0.02"
    with httpx.stream("POST", url, headers=bearer(secret), timeout=10) as answer:
        lines = answer.iter_lines()
        next(lines)
        served.guard.keys.revoke(key.id)
        began_s = time.monotonic()
        rest = [line for line in lines if line]
    assert time.monotonic() - began_s < 1.0
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "invalid_api_key"
    until(lambda: served.app.state.ended == ["stream"])


# -- what may come in -------------------------------------------------------------------------


def test_a_body_that_is_too_long_is_refused_however_it_comes(database: Database) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b"x" * 1000

    with serving(database, body_bytes=10_000) as served:
        assert served.post("/v1/echo", content=b"x" * 10_000).json()["length"] == 10_000
        for content in (b"x" * 10_001, b"x" * 150_000, chunks()):
            answer = served.post("/v1/echo", content=content)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"
        assert served.guard.held_bytes == served.guard.open_requests == 0
        # Who never stops sending is cut.
        with served.connect() as client, pytest.raises(OSError):
            client.sendall(
                b"POST /v1/echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n\r\n"
            )
            for _ in range(200):
                client.sendall(b"x" * 10_000)
                time.sleep(0.001)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nhost x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/echo HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_gets_one_answer(served: Served, garbage: bytes) -> None:
    with served.connect() as client:
        client.sendall(garbage)
        head, _, body = received(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ") or not head
    if head:
        assert b"x-request-id: req_" in head
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert served.post("/v1/echo").status_code == 200


def test_a_compressed_body_is_refused(served: Served) -> None:
    answer = served.post("/v1/echo", content=b"x", headers={"content-encoding": "gzip"})
    assert answer.status_code == 415
    assert served.post("/v1/echo", headers={"content-encoding": "identity"}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.com", "[::1].evil.com", "localhost:80@evil", "localhost.evil.com", "[::1", ""]
)
def test_strange_names_are_refused(served: Served, host: str) -> None:
    assert served.post("/v1/echo", headers={"host": host}).status_code == 403
    for name in ("localhost:80", "127.0.0.1", "[::1]:8000", "a.localhost"):
        assert served.post("/v1/echo", headers={"host": name}).status_code == 200


def test_a_header_without_end_is_refused(served: Served) -> None:
    with served.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(OSError):
            for i in range(100):
                client.sendall(b"x-%d: %s\r\n" % (i, b"y" * 1000))
        assert received(client).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "lines", [b"x: " + b"y" * 70_000 + b"\r\n", b"a: b\r\n" * 17_000], ids=["one", "many"]
)
def test_a_header_that_comes_at_once_has_the_same_bound(served: Served, lines: bytes) -> None:
    with served.connect() as client:
        with contextlib.suppress(OSError):
            client.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + lines + b"\r\n")
        assert received(client).startswith(b"HTTP/1.1 431 ")
    with served.connect() as client:
        with contextlib.suppress(OSError):
            client.sendall(b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert received(client).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    "endless",
    [b"a: b\r\n" * 1000, b"y" * 8000],
    ids=["lines", "a value"],
)
@pytest.mark.parametrize("before", [b"0\r\n", b"0\r\nx: ", b"1;"], ids=["end", "line", "chunk"])
def test_trailers_and_chunks_have_a_bound(served: Served, before: bytes, endless: bytes) -> None:
    head = b"POST /v1/echo HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    with served.connect() as client, pytest.raises(OSError):
        client.sendall(head + b"2\r\n{}\r\n" + before)
        for _ in range(2000):
            client.sendall(endless)
            time.sleep(0.001)
    until(lambda: served.guard.open_requests == 0)


def test_many_headers_on_one_connection_are_no_long_header(served: Served) -> None:
    one = b"POST /v1/echo HTTP/1.1\r\nhost: localhost\r\nx: %s\r\n" % (b"y" * 30_000)
    with served.connect() as client:
        for _ in range(5):
            client.sendall(one + b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nz: z\r\n\r\n")
            answer = b""
            while b'"caller"' not in answer:
                answer += client.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200 ")


def test_a_stream_of_requests_without_reading_is_cut(served: Served) -> None:
    one = b"POST /v1/wait HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n"
    with served.connect() as client:
        client.sendall(one * 50)
        assert received(client) == b""
    until(lambda: served.guard.open_requests == 0)


# -- slow clients -----------------------------------------------------------------------------


def test_who_sends_its_header_slowly_is_not_waited_for(database: Database) -> None:
    with serving(database, head_timeout_s=0.4) as served:
        with served.connect() as silent, served.connect() as slow:
            began_s = time.monotonic()
            slow.sendall(b"POST /v1/echo HTTP/1.1\r\nhost: localhost\r\n")
            answer = received(slow)
            assert received(silent) == b""
            assert time.monotonic() - began_s < 2
        assert answer.startswith(b"HTTP/1.1 408 ")
        with served.connect() as dripping:
            dripping.sendall(b"POST /v1/echo HTTP/1.1\r\n")
            with contextlib.suppress(OSError):
                for _ in range(10):
                    dripping.sendall(b"x")
                    time.sleep(0.1)
            assert received(dripping).startswith(b"HTTP/1.1 408 ")


def test_who_sends_its_body_slowly_is_not_waited_for(database: Database) -> None:
    with serving(database, body_timeout_s=0.4) as served, served.connect() as slow:
        slow.sendall(b"POST /v1/echo HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\nabc")
        answer = received(slow)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'"request_timeout"' in answer
        assert served.guard.open_requests == 0


def test_a_long_answer_does_not_trip_the_limits_of_the_header(database: Database) -> None:
    with serving(database, head_timeout_s=0.2, body_timeout_s=0.2) as served:
        answer = served.post("/v1/stream?count=10&pause_s=0.1")
        assert answer.text.endswith("[DONE]\n\n")


def test_who_does_not_read_its_stream_is_cut_in_time(database: Database) -> None:
    with serving(database, request_timeout_s=1.0) as served, served.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = b"POST /v1/stream?count=100000&size=10000 HTTP/1.1\r\nhost: localhost\r\n"
        client.sendall(head + b"content-length: 0\r\n\r\n")
        until(lambda: served.app.state.ended == ["stream"])
        until(lambda: served.guard.open_requests == 0)
        until(lambda: not served.server.server_state.connections)
        began_s = time.monotonic()
        assert not received(client).endswith(b"0\r\n\r\n")
        assert time.monotonic() - began_s < 5, "the system still had all that was not read"


def test_an_answer_that_takes_too_long_is_refused(database: Database) -> None:
    with serving(database, request_timeout_s=0.3) as served:
        answer = served.post("/v1/wait")
        assert answer.status_code == 503
        assert "longer than 0.3 s" in answer.json()["error"]["message"]
        assert served.app.state.ended == ["wait"]


@pytest.mark.parametrize("path", ["/v1/wait", "/v1/stream?count=1000&pause_s=0.02"])
def test_when_the_client_leaves_its_answer_ends(served: Served, path: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        if "wait" in path:
            httpx.post(served.url + path, timeout=0.3)
        else:
            with httpx.stream("POST", served.url + path, timeout=0.3) as answer:
                next(answer.iter_bytes())
                raise httpx.ReadTimeout("enough")
    until(lambda: len(served.app.state.ended) == 1, 1.0)
    until(lambda: served.guard.open_requests == 0)
    assert served.lines()[-1]["status"] == 499


# -- many clients -----------------------------------------------------------------------------


def test_more_requests_than_fit_are_refused(database: Database) -> None:
    with serving(database, most_running=1, most_waiting=1) as served:
        body = b"POST /v1/wait HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n"
        with served.connect() as one, served.connect() as two:
            one.sendall(body)
            two.sendall(body)
            until(lambda: served.guard.open_requests == 2)
            answer = served.post("/v1/echo")
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
            assert httpx.get(served.url + "/health").status_code == 200
        until(lambda: served.guard.open_requests == 0)
        assert served.post("/v1/echo").status_code == 200


def test_a_flood_of_connections_is_refused_politely(database: Database) -> None:
    with (
        serving(database, most_connections=20) as served,
        contextlib.ExitStack() as stack,
    ):
        first = [stack.enter_context(served.connect()) for _ in range(20)]
        until(lambda: len(served.server.server_state.connections) == 20)
        for _ in range(200):
            with served.connect() as refused:
                refused.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
                answer = received(refused)
                assert answer.startswith(b"HTTP/1.1 503 ")
                assert b"retry-after: 1" in answer
        first[0].sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert first[0].recv(1000).startswith(b"HTTP/1.1 200 ")
        first[1].close()
        until(lambda: len(served.server.server_state.connections) == 19)
        assert httpx.get(served.url + "/health").status_code == 200


# -- what is told -----------------------------------------------------------------------------


def test_metrics_count_what_happened(served: Served) -> None:
    served.post("/v1/echo")
    served.post("/none/of/ours")
    page = httpx.get(served.url + "/metrics").text
    assert 'lpu_requests_total{endpoint="/v1/echo",status="200"} 1.0' in page
    assert 'lpu_requests_total{endpoint="none",status="404"} 1.0' in page
    assert 'lpu_request_seconds_count{endpoint="/v1/echo"} 1.0' in page


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_holds_prompts_only_if_asked(database: Database, log_prompts: bool) -> None:
    with serving(database, log_prompts=log_prompts) as served:
        served.post("/v1/echo", content=b"a secret prompt")
        failed = served.post("/v1/fail", content=b"a secret prompt")
        assert failed.status_code == 500
        lines = served.lines()
    assert "secret" not in failed.text
    assert ("secret" in served.log.getvalue()) == log_prompts
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["status"] for line in requests] == [200, 500]
    failure = next(line for line in lines if line["event"] == "failure")
    assert failure["error"] == "ValueError"
    assert failure["id"] == requests[1]["id"]


class _Stalled(io.StringIO):
    def __init__(self) -> None:
        super().__init__()
        self.goes_on = threading.Event()

    def write(self, text: str) -> int:
        self.goes_on.wait(20)
        return super().write(text)


def test_a_stalled_log_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openlpu.serve.logs._MOST_WAITING", 10)
    stream = _Stalled()
    logs = Logs(stream)
    began_s = time.monotonic()
    for i in range(100):
        logs.write("request", number=i)
    assert time.monotonic() - began_s < 1
    stream.goes_on.set()
    until(lambda: logs._lines.empty())
    logs.write("last")
    logs.close()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines[-1]["event"] == "last"
    assert len(lines) - 1 + lines[-1]["dropped_lines"] == 100


# -- the end ----------------------------------------------------------------------------------


async def streams(url: str, count: int, process: subprocess.Popen[str]) -> list[str]:
    """The whole texts of streams during which a SIGTERM comes."""
    begun = asyncio.Semaphore(0)

    async def one(client: httpx.AsyncClient) -> str:
        text = ""
        async with client.stream("POST", url) as answer:
            async for piece in answer.aiter_text():
                if not text:
                    begun.release()
                text += piece
        return text

    async with httpx.AsyncClient(timeout=20, limits=httpx.Limits(max_connections=None)) as client:
        tasks = [asyncio.create_task(one(client)) for _ in range(count)]
        for _ in range(count):
            await begun.acquire()
        process.send_signal(signal.SIGTERM)
        return await asyncio.gather(*tasks)


def test_sigterm_lets_fifty_streams_end(tmp_path: Path) -> None:
    with child(tmp_path, drain_s=20) as (process, url):
        texts = asyncio.run(streams(f"{url}/v1/stream?count=40&pause_s=0.03", 50, process))
        assert all(text.endswith("data: [DONE]\n\n") for text in texts)
        assert len(set(texts)) == 1
        assert process.wait(10) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_streams_that_do_not_end_in_time_are_told(tmp_path: Path) -> None:
    with child(tmp_path, drain_s=1) as (process, url):
        began_s = time.monotonic()
        texts = asyncio.run(streams(f"{url}/v1/stream?count=4000&pause_s=0.03", 50, process))
        assert time.monotonic() - began_s < 6
        for text in texts:
            last = text.rstrip().rpartition("\n")[2].removeprefix("data: ")
            assert "shutting down" in json.loads(last)["error"]["message"]
        assert process.wait(10) == 0
        assert process.stderr is not None
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
        assert [line["event"] for line in lines if line["event"] != "request"] in ([], ["server"])


def test_while_draining_nothing_is_begun_and_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with (
        child(tmp_path, drain_s=30) as (process, url),
        httpx.stream("POST", f"{url}/v1/stream?count=4000&pause_s=0.03", timeout=10) as answer,
    ):
        pieces = answer.iter_bytes()
        next(pieces)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(2) == -signal.SIGTERM


def test_ready_tells_of_the_drain(served: Served) -> None:
    assert httpx.get(served.url + "/ready").status_code == 200
    served.guard.draining = True
    assert httpx.get(served.url + "/ready").status_code == 503
    assert served.post("/v1/echo").status_code == 503
    served.guard.draining = False
    served.guard.healthy = lambda: False
    assert httpx.get(served.url + "/ready").status_code == 503
    assert httpx.head(served.url + "/health").status_code == 200


# -- where it listens -------------------------------------------------------------------------


def test_which_addresses_are_public() -> None:
    assert not is_public("127.0.0.1")
    assert not is_public("localhost")
    assert is_public("0.0.0.0")
    with pytest.raises(RequestError, match="no address"):
        is_public("no.such.host.invalid")


def test_a_taken_port_is_told(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(RequestError, match=f"port {port} of 127.0.0.1 is taken"):
            listeners(Settings(model="tiny", port=port, data=tmp_path))


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    def once() -> None:
        database = Database(tmp_path)
        with serving(database) as served, served.connect() as client:
            client.sendall(b"GET / HTTP/1.1\r\n")
            served.post("/v1/echo")
        database.close()

    if not Path("/proc/self/fd").exists():
        pytest.skip("no /proc here")
    once()
    before = open_files()
    once()
    assert open_files() <= before


def test_a_connection_that_has_ended_is_forgotten(served: Served) -> None:
    """With all that its request held, which is much under load."""
    for _ in range(5):
        served.post("/v1/echo", content=b"1", headers={"connection": "close"})

    def are_gone() -> bool:
        gc.collect()
        return not any(issubclass(type(one), Connection) for one in gc.get_objects())

    until(are_gone)
