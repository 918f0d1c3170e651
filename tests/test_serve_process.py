"""In: `lpu serve`, killed, ended, flooded, without a disk. Out: nothing that was told is lost."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import json
import os
import resource
import select
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from small_service import bearer, until
from test_serve_command import started
from tiny_chat import write_tiny_chat

from openlpu.serve.database import FILE_NAME, Database
from openlpu.serve.keys import KeyStore
from openlpu.serve.usage import Totals, UsageStore

BENCH = Path(__file__).parent.parent / "bench"
BODY = {"model": "tiny", "prompt": "Hi", "temperature": 0, "ignore_eos": True}
COMPLETIONS = "/v1/completions"
LINUX = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux's limits")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_chat(tmp_path_factory.mktemp("models") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = str(tmp_path_factory.mktemp("cache"))
    return {**os.environ, "LPU_CACHE": cache, "LPU_OFFLINE": "1"}


def digests(folder: Path) -> dict[str, str]:
    """What is in the files of a folder."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed or removed meanwhile
            if path.is_file():
                found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def totals(folder: Path, key_id: str) -> Totals:
    database = Database(folder)
    try:
        assert database.read("PRAGMA integrity_check") == [("ok",)]
        return UsageStore(database).totals(key_id)
    finally:
        database.close()


# -- kill -9 ------------------------------------------------------------------------------------


class Customers:
    """Threads that ask until the service is gone, and add up what they were told."""

    def __init__(self, url: str, secret: str, count: int) -> None:
        self.answers = self.prompt_tokens = self.completion_tokens = 0
        self.wrong: list[str] = []
        self.texts: set[str] = set()
        self._url, self._head = url + COMPLETIONS, bearer(secret)
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(i,)) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def _ask(self, index: int) -> None:
        body = {**BODY, "max_tokens": 12}
        if index % 2:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        with httpx.Client(headers=self._head, timeout=20) as client:
            while True:
                try:
                    answer = client.post(self._url, json=body)
                except httpx.TransportError:
                    return
                self._add(answer)

    def _add(self, answer: httpx.Response) -> None:
        text = answer.text
        if answer.headers["content-type"].startswith("text/event-stream"):
            *chunks, done = (line[6:] for line in text.split("\n") if line.startswith("data: "))
            documents = [json.loads(chunk) for chunk in chunks]
            parts = (c["text"] for document in documents for c in document["choices"])
            said, usage, whole = "".join(parts), documents[-1]["usage"], done == "[DONE]"
        else:
            document = answer.json()
            said, usage, whole = document["choices"][0]["text"], document["usage"], True
        with self._lock:
            self.texts.add(said)
            self.answers += 1
            self.prompt_tokens += usage["prompt_tokens"]
            self.completion_tokens += usage["completion_tokens"]
            if answer.status_code != 200 or not whole:
                self.wrong.append(text)

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()


def test_a_kill_during_load_loses_nothing_that_was_told(
    tiny: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    database = Database(tmp_path)
    key, secret = KeyStore(database).add("Ada")
    database.close()
    count, told, texts = 6, Totals(), set[str]()
    for kill in range(2):
        with started(environment, str(tiny), "--data", str(tmp_path)) as (process, ready):
            if not kill:
                packed = digests(Path(environment["LPU_CACHE"]))
            customers = Customers(str(ready["url"]), secret, count)
            until(lambda c=customers: c.answers > 40, 20)
            process.kill()
            customers.join()
        assert customers.wrong == []
        texts |= customers.texts
        told = Totals(
            told.requests + customers.answers,
            told.prompt_tokens + customers.prompt_tokens,
            0,
            told.completion_tokens + customers.completion_tokens,
        )
        kept = totals(tmp_path, key.id)
        assert told.requests <= kept.requests <= told.requests + count * (kill + 1)
        assert told.prompt_tokens <= kept.prompt_tokens
        assert told.completion_tokens <= kept.completion_tokens
    assert len(texts) == 1
    assert digests(Path(environment["LPU_CACHE"])) == packed
    with started(environment, str(tiny), "--data", str(tmp_path)) as (_, ready):
        url = str(ready["url"]) + COMPLETIONS
        body = {**BODY, "max_tokens": 12}
        assert httpx.post(url, json=body).status_code == 401
        answer = httpx.post(url, json=body, headers=bearer(secret), timeout=20)
        assert answer.json()["choices"][0]["text"] in texts


def test_a_kill_during_the_first_start_leaves_a_sound_cache(
    tiny: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Whatever was half written, the next start is as if it had never been."""
    fresh = {**environment, "LPU_CACHE": str(tmp_path / "cache")}
    cache = tmp_path / "cache"
    fresh = {**environment, "LPU_CACHE": str(cache)}
    with started(environment, str(tiny)) as (_, ready):
        identity, right = ready["identity"], answer_of(ready)
    command = [sys.executable, "-m", "openlpu", "serve", str(tiny), "--port", "0", "--json"]
    for patience_s in (0.0, 0.05, 0.2):
        before = digests(cache)
        with subprocess.Popen(
            command, env=fresh, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            until(
                lambda seen=before, ready=process.stdout: (
                    digests(cache) != seen or is_readable(ready)
                ),
                20,
            )
            time.sleep(patience_s)
            process.kill()
    with started(fresh, str(tiny)) as (_, ready):
        assert (ready["identity"], answer_of(ready)) == (identity, right)


def is_readable(stream: Any) -> bool:
    return bool(select.select([stream], [], [], 0)[0])


def answer_of(ready: dict[str, object]) -> str:
    answer = httpx.post(f"{ready['url']}{COMPLETIONS}", json=BODY | {"max_tokens": 20}, timeout=20)
    text: str = answer.json()["choices"][0]["text"]
    return text


# -- SIGTERM ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "drain_s"), [(150, 30), (1900, 1)])
def test_sigterm_with_fifty_streams_open(
    tiny: Path, environment: dict[str, str], tmp_path: Path, tokens: int, drain_s: int
) -> None:
    """All end whole if there is time; else each is told why it ends."""
    words = (str(tiny), "--data", str(tmp_path), "--drain", str(drain_s))
    with started(environment, *words) as (process, ready):
        body = {**BODY, "stream": True, "max_tokens": tokens}
        texts = asyncio.run(streams(str(ready["url"]), body, 50, process))
        assert process.wait(20) == 0
    ends = [text.rstrip().rpartition("\n")[2].removeprefix("data: ") for text in texts]
    if drain_s > 1:
        assert set(ends) == {"[DONE]"}
        assert len({"".join(spoken(text)) for text in texts}) == 1
    else:
        cut = [json.loads(end)["error"]["message"] for end in ends if end != "[DONE]"]
        assert cut
        assert all("shutting down" in message for message in cut)
    kept = totals(tmp_path, "")
    assert kept.requests == 50
    assert kept.completion_tokens >= sum(len(list(spoken(text))) for text in texts)


def spoken(events: str) -> Iterator[str]:
    """The texts of a stream's chunks, one a token at most."""
    for line in events.split("\n"):
        if line.startswith("data: {"):
            choices = json.loads(line[6:]).get("choices", [])
            yield from (c["text"] for c in choices if c["text"])


async def streams(
    url: str, body: dict[str, Any], count: int, process: subprocess.Popen[str]
) -> list[str]:
    """So many streams; SIGTERM once all have begun."""
    begun = asyncio.Semaphore(0)

    async def one(client: httpx.AsyncClient) -> str:
        text = ""
        async with client.stream("POST", url + COMPLETIONS, json=body) as answer:
            async for piece in answer.aiter_text():
                if not text:
                    begun.release()
                text += piece
        return text

    async with httpx.AsyncClient(timeout=40, limits=httpx.Limits(max_connections=None)) as client:
        tasks = [asyncio.create_task(one(client)) for _ in range(count)]
        for _ in range(count):
            await begun.acquire()
        process.send_signal(signal.SIGTERM)
        return await asyncio.gather(*tasks)


# -- disks --------------------------------------------------------------------------------------


@LINUX
def test_a_full_disk_holds_no_answer_back(
    tiny: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    """Rows wait in memory, and are written once there is room."""
    with started(environment, str(tiny), "--data", str(tmp_path)) as (process, ready):
        url, body = f"{ready['url']}{COMPLETIONS}", {**BODY, "max_tokens": 5}
        texts = {httpx.post(url, json=body).json()["choices"][0]["text"]}
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, hard))
        for _ in range(3):
            began_s = time.monotonic()
            answer = httpx.post(url, json=body, timeout=20)
            assert answer.status_code == 200
            assert time.monotonic() - began_s < 5
            texts.add(answer.json()["choices"][0]["text"])
        assert totals(tmp_path, "").requests == 1
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        until(lambda: totals(tmp_path, "").requests == 4)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None
        events = [json.loads(line)["event"] for line in process.stderr.read().splitlines()]
    assert events.count("usage_delayed") == 3
    assert len(texts) == 1


def read_only(folder: Path) -> None:
    """In the child: even root must keep to what the folder's mode says."""
    ctypes.CDLL(None).prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
    folder.chmod(0o555)


def full(folder: Path) -> None:
    """In the child: no file may grow."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))


@LINUX
@pytest.mark.parametrize("hinder", [read_only, full])
def test_a_start_without_a_disk_is_refused_in_a_line(
    tiny: Path, environment: dict[str, str], tmp_path: Path, hinder: Any
) -> None:
    words = ["serve", str(tiny), "--port", "0", "--data", str(tmp_path / "data")]
    (tmp_path / "data").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "openlpu", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: hinder(tmp_path / "data"),
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lpu: ")
    assert done.stderr.count("\n") == 1
    assert "is the folder writable, the disk full?" in done.stderr


def test_a_damaged_file_is_told_and_left_alone(
    tiny: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("CREATE TABLE keys (id)")
    connection.close()
    damaged = (tmp_path / FILE_NAME).read_bytes()[:1000] + b"\xff" * 5000
    (tmp_path / FILE_NAME).write_bytes(damaged)
    done = subprocess.run(
        [sys.executable, "-m", "openlpu", "serve", str(tiny), "--data", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert (tmp_path / FILE_NAME).read_bytes() == damaged


# -- connections --------------------------------------------------------------------------------


def test_a_flood_of_connections_is_answered_or_refused(
    tiny: Path, environment: dict[str, str]
) -> None:
    """The script by which 10,000 are measured."""
    words = [str(tiny), "--connections", "400", "--most-connections", "150"]
    path = {"PYTHONPATH": str(BENCH.parent)}
    done = subprocess.run(
        [sys.executable, str(BENCH / "connections.py"), *words],
        env=environment | path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done
    # How many are refused depends on how soon the service accepts them.
    fates = json.loads(done.stdout)["fates"]
    assert set(fates) <= {"200", "503 too many connections are open; try again"}
    assert fates["200"] >= 150
    assert sum(fates.values()) == 400
