"""In: a model file. Out: OpenLPU's server and llama.cpp's, each a process, with one face."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Protocol

_START_S = 120.0


class Server(Protocol):
    """A process that answers OpenAI's requests."""

    name: str
    model: str
    url: str
    """Ends in /v1."""
    about: str
    process: subprocess.Popen[bytes]

    def close(self) -> None:
        """End the process."""
        ...


class OpenLpuServer:
    """`lpu serve`, as it is after installation."""

    name = "openlpu"

    def __init__(self, model: str, threads: int, *more: str) -> None:
        """more: options of `lpu serve`. Raises RuntimeError if it does not start."""
        self._folder = tempfile.TemporaryDirectory()
        command = [sys.executable, "-m", "openlpu", "serve", model, "--port", "0", "--json"]
        command += ["--threads", str(threads), "--data", self._folder.name, *more]
        started_s = time.perf_counter()
        with Path(self._folder.name, "log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.ready_s = time.perf_counter() - started_s
        if not line:
            raise RuntimeError(f"lpu serve: {Path(self._folder.name, 'log').read_text()[:500]}")
        ready = json.loads(line)
        self.url, self.model, self.about = f"{ready['url']}/v1", ready["model"], ready["identity"]

    def close(self) -> None:
        """End the process."""
        _end(self.process)
        self._folder.cleanup()


class LlamaServer:
    """llama.cpp's server with its defaults, but for the threads and a slot for each client."""

    name = "llama.cpp"
    model = "llama"

    def __init__(
        self, binary: str, file: Path, threads: int, *, slots: int, slot_tokens: int
    ) -> None:
        """Raises RuntimeError if it does not start."""
        port = _free_port()
        context = slots * slot_tokens
        command = [binary, "-m", str(file), "--host", "127.0.0.1", "--port", str(port)]
        command += ["-t", str(threads), "-np", str(slots), "-c", str(context), "-a", self.model]
        self.about = _version(binary)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self.process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
        self.url = f"http://127.0.0.1:{port}/v1"
        deadline_s = time.perf_counter() + _START_S
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if self.process.poll() is not None or time.perf_counter() > deadline_s:
                _end(self.process)
                self._log.seek(0)
                raise RuntimeError(f"{binary}: {self._log.read()[-500:].decode(errors='replace')}")
            time.sleep(0.1)

    def close(self) -> None:
        """End the process."""
        _end(self.process)
        self._log.close()


def loop_cpu_s(server: OpenLpuServer) -> float:
    """Processor time so far of the first thread of `lpu serve`, where its event loop runs (0 where
    Linux is not)."""
    pid = server.process.pid
    spent = Path(f"/proc/{pid}/task/{pid}/schedstat")
    return int(spent.read_text().split()[0]) * 1e-9 if spent.exists() else 0.0


def _version(binary: str) -> str:
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    lines = (done.stdout + done.stderr).splitlines()
    return " ".join(line for line in lines if line.startswith(("version", "built")))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
        return
    process.kill()
    process.wait()
