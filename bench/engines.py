"""In: prompts and a number of greedy steps. Out: Timing, by OpenLPU here or llama.cpp over there.

Both compute the same: all prompts in one step up to the argmax of their last logits, then steps of
one token per sequence, argmax included, below each engine's own sampling code.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
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
    """One of the two engines."""

    def run(self, prompts: list[list[int]], steps: int) -> Timing:
        """Compute prompts of equal length together, then `steps` tokens of every sequence."""
        ...

    def cpu_s(self) -> float:
        """Processor time of the engine's process so far."""
        ...


class OpenLpu:
    """The host engine in this process."""

    def __init__(self, host: HostModel) -> None:
        self._host = host

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


class LlamaCpp:
    """llama.cpp in a process of its own, which may use another environment."""

    def __init__(self, python: str, model: Path, threads: int) -> None:
        """python: an interpreter that can import llama_cpp. Raises RuntimeError if it fails."""
        # A pipe would fill up with llama.cpp's log and block the process.
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        worker = Path(__file__).with_name("llama_worker.py")
        self._process = subprocess.Popen(
            [python, str(worker), str(model), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.about = self._answer()

    def run(self, prompts: list[list[int]], steps: int) -> Timing:
        """See Side."""
        answer = self._ask({"prompts": prompts, "steps": steps})
        return Timing(answer["prefill_s"], answer["decode_s"], answer["tokens"])

    def cpu_s(self) -> float:
        """See Side."""
        return float(self._ask({})["cpu_s"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
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
            raise RuntimeError(f"llama.cpp's process ended: {last}")
        answer: dict[str, Any] = json.loads(line)
        return answer
