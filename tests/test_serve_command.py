"""In: `lpu serve` as a user starts it. Out: a line when it is ready, or one that says why not."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from small_service import bearer
from tiny_chat import write_tiny_chat

Started = tuple[subprocess.Popen[str], dict[str, object]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = str(tmp_path_factory.mktemp("cache"))
    return {**os.environ, "LPU_CACHE": cache, "LPU_OFFLINE": "1"}


@contextlib.contextmanager
def started(environment: dict[str, str], *words: str) -> Iterator[Started]:
    command = [sys.executable, "-m", "openlpu", "serve", *words, "--port", "0", "--json"]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, process.communicate()
        yield process, json.loads(line)
    finally:
        process.kill()
        process.communicate()


def refused(environment: dict[str, str], *words: str) -> str:
    """The one line on standard error of a start that fails with exit code 2."""
    done = subprocess.run(
        [sys.executable, "-m", "openlpu", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("lpu: ")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_it_says_when_it_is_ready_and_ends_gently(tiny: Path, environment: dict[str, str]) -> None:
    with started(environment, str(tiny), "--alias", "gpt-4") as (process, ready):
        assert ready["aliases"] == ["gpt-4"]
        assert len(str(ready["identity"])) == 64
        assert httpx.get(f"{ready['url']}/ready").status_code == 200
        page = httpx.get(f"{ready['url']}/metrics").text
        assert "lpu_kv_pages_limit" in page
        assert "lpu_kv_pages_limit 0.0" not in page
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert process.stderr is not None
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert [line["event"] for line in lines if line["event"] not in ("load", "request")] == [
        "start",
        "end",
    ]


def test_keys_and_limits_survive_a_kill(tiny: Path, environment: dict[str, str]) -> None:
    def add(*words: str) -> dict[str, str]:
        command = [sys.executable, "-m", "openlpu", "keys", "add", *words, "--json"]
        found: dict[str, str] = json.loads(subprocess.check_output(command, env=environment))
        return found

    data = ("--data", str(tiny.parent / "kept"))
    with started(environment, str(tiny), *data) as (process, ready):
        assert httpx.get(f"{ready['url']}/v1/models").status_code == 200
        key = add("Ada", *data)
        answer = httpx.get(f"{ready['url']}/v1/models", headers=bearer(key["secret"]))
        assert answer.status_code == 200
        assert httpx.get(f"{ready['url']}/v1/models").status_code == 401
        process.kill()
        process.wait()
    with started(environment, str(tiny), *data, "--host", "0.0.0.0") as (process, ready):
        url = f"http://127.0.0.1:{str(ready['url']).rpartition(':')[2]}"
        assert httpx.get(f"{url}/v1/models").status_code == 401
        answer = httpx.get(f"{url}/v1/models", headers=bearer(key["secret"]))
        assert answer.status_code == 200


def test_a_public_address_needs_keys(tiny: Path, environment: dict[str, str]) -> None:
    data = ("--data", str(tiny.parent / "public"))
    line = refused(environment, "serve", str(tiny), "--host", "0.0.0.0", *data)
    assert "lpu keys add NAME" in line
    with started(environment, str(tiny), "--host", "0.0.0.0", "--force", *data) as (_, ready):
        assert str(ready["url"]).startswith("http://0.0.0.0:")


def test_what_hinders_a_start_is_told_in_a_line(tiny: Path, environment: dict[str, str]) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        line = refused(environment, "serve", str(tiny), "--port", port)
        assert f"port {port} of 127.0.0.1 is taken" in line
    assert "no such file or folder" in refused(environment, "serve", "/no/model", "--port", "0")
    assert "no address" in refused(environment, "serve", str(tiny), "--host", "no.such.invalid")
    for words in (["--port", "70000"], ["--kv-gib", "0"], ["--body-mib", "nan"]):
        refused(environment, "serve", str(tiny), *words)
    for words in (["--most-running", "0"], ["--timeout", "0"], ["--context", "1"]):
        refused(environment, "serve", str(tiny), "--port", "0", *words)
    refused(environment, "serve", str(tiny), "--data", str(tiny / "config.json"))
