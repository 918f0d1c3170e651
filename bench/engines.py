"""In: prompts and a number of greedy steps. Out: Timing, by OpenLPU here or a peer over there.

All compute the same: all prompts together up to the argmax of their last logits, then steps of one
token per sequence, argmax included.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from openlpu.graph.step import PAGE, Batch
from openlpu.host import HostModel

I32 = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the prompts and of the steps; tokens [sequences][1 + steps] that were chosen."""

    prefill_s: float
    decode_s: float
    tokens: list[list[int]]


class Side(Protocol):
    """One of the engines, ready to run.

    about: its versions. bytes_per_token: what one token's step reads. pid: its process, which
    several engines may share.
    """

    about: dict[str, Any]
    bytes_per_token: int
    pid: int

    def run(self, prompts: list[list[int]], steps: int) -> Timing:
        """Compute prompts of equal length together, then `steps` tokens of every sequence."""
        ...

    def cpu_s(self) -> float:
        """Processor time of the engine's process so far."""
        ...

    def close(self) -> None:
        """Give its memory back."""
        ...


def packed_bytes_per_token(host: HostModel) -> int:
    """All packed weights but the embedding table, of which a row is read."""
    table = next(op for op in host.graph.ops if op.kind == "embed").params[0]
    rows, width = table.shape
    return host.packed_bytes - rows * (width + 4)  # int8, and a scale for each row


class OpenLpu:
    """The host engine in this process."""

    def __init__(self, host: HostModel, about: dict[str, Any]) -> None:
        self._host, self.about, self.pid = host, about, os.getpid()
        self.bytes_per_token = packed_bytes_per_token(host)  # K/V are small at these lengths

    def run(self, prompts: list[list[int]], steps: int) -> Timing:
        """See Side."""
        sequences, length = len(prompts), len(prompts[0])
        width = -(-(length + steps) // PAGE)
        self._host.grow(sequences * width)
        pages = np.arange(sequences * width, dtype=np.int32).reshape(sequences, width)
        slots = np.arange(sequences, dtype=np.int32)
        tokens = np.array(prompts, np.int32)
        positions = np.tile(np.arange(length, dtype=np.int32), sequences)
        started_s = time.perf_counter()
        last = self._step(tokens.reshape(-1), positions, np.repeat(slots, length), pages, length)
        prefill_s = time.perf_counter() - started_s
        chosen = [last]
        started_s = time.perf_counter()
        for position in range(length, length + steps):
            last = self._step(last, np.full(sequences, position, np.int32), slots, pages, 1)
            chosen.append(last)
        decode_s = time.perf_counter() - started_s
        return Timing(prefill_s, decode_s, np.stack(chosen, axis=1).tolist())

    def _step(self, tokens: I32, positions: I32, slots: I32, pages: I32, length: int) -> I32:
        wanted = np.arange(length - 1, tokens.shape[0], length, dtype=np.int32)
        logits = self._host.step(Batch(tokens, positions, slots, wanted, pages))
        chosen: I32 = logits.argmax(1).astype(np.int32)
        return chosen

    def cpu_s(self) -> float:
        """See Side."""
        return time.process_time()

    def close(self) -> None:
        """See Side."""
        self._host.close()


class Peer:
    """Another engine in a process of its own, which may use another environment."""

    def __init__(self, name: str, command: list[str], bytes_per_token: int | None = None) -> None:
        """command: runs one of the workers; name: the engine, for messages.

        bytes_per_token: None if the worker says it. Raises RuntimeError if the process ends.
        """
        self._name = name
        # A pipe would fill up with the engine's log and block the process.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.pid = self._process.pid
        self.about = self._answer()
        said = self.about.pop("weight_bytes", 0)
        self.bytes_per_token = said if bytes_per_token is None else bytes_per_token

    def run(self, prompts: list[list[int]], steps: int) -> Timing:
        """See Side."""
        answer = self.ask({"prompts": prompts, "steps": steps})
        return Timing(answer["prefill_s"], answer["decode_s"], answer["tokens"])

    def cpu_s(self) -> float:
        """See Side."""
        return float(self.ask({})["cpu_s"])

    def close(self) -> None:
        """See Side."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer to a job."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer will say why
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            last = (self._log.read().strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{self._name}'s process ended: {last}")
        answer: dict[str, Any] = json.loads(line)
        return answer
