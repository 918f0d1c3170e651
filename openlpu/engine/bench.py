"""In: a model. Out: speed, start-up and memory on this machine, as medians of interleaved rounds.

Memory bandwidth is read in the same rounds, because it moves: decode reads every weight once per
step, so its share of that bandwidth says how far from the limit it runs.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openlpu.engine.batcher import Engine
from openlpu.engine.compiled import Compiled
from openlpu.engine.model import load, open_model
from openlpu.engine.profile import bytes_per_step
from openlpu.engine.sampling import Sampling
from openlpu.engine.verify import engine_for, random_tokens
from openlpu.host import HostModel

PROMPT_TOKENS = 30
PREFILL_TOKENS = 512
DECODE_STEPS = 32
BATCHES = (8, 32)
_READ_BYTES = 256 << 20  # beyond any cache of the machines this runs on


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure: the median, and every round's value."""

    name: str
    unit: str
    median: float
    rounds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What `lpu bench` prints."""

    model: str
    precision: str
    threads: int
    kernels: str
    packed_bytes: int
    measures: tuple[Measure, ...]


def bench(
    name_or_path: str,
    *,
    precision: str = "w8",
    threads: int | None = None,
    kernels: str | None = None,
    rounds: int = 5,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Measure a model. The first load (compile and pack) is not part of any figure."""
    checkpoint, compiled = open_model(name_or_path, precision=precision, progress=progress)
    found: dict[tuple[str, str], list[float]] = {}
    with closing(compiled.host(threads=threads, kernels=kernels, progress=progress)) as host:
        memory = np.ones(_READ_BYTES // 8, np.uint64)
        for done in range(rounds):
            for name, unit, value in _round(host, compiled, memory):
                found.setdefault((name, unit), []).append(value)
            if progress:
                progress("measure", done + 1, rounds)
        del memory
        step_bytes = bytes_per_step(compiled.graph)
        read = [
            rate * step_bytes / 1e9 / bandwidth
            for rate, bandwidth in zip(
                found["decode", "tokens/s"], found["memory read", "GB/s"], strict=True
            )
        ]
        found["decode, share of memory read", ""] = read
        report = (host.threads, host.kernels, host.packed_bytes)
    for _ in range(min(rounds, 3)):
        start = _fresh_start(name_or_path, precision, threads, kernels)
        found.setdefault(("start to first token", "s"), []).append(start["first_token_s"])
        found.setdefault(("peak memory", "MB"), []).append(start["peak_bytes"] / 1e6)
    measures = tuple(
        Measure(name, unit, statistics.median(values), tuple(values))
        for (name, unit), values in found.items()
    )
    return Report(checkpoint.name, precision, *report, measures)


def _round(
    host: HostModel, compiled: Compiled, memory: NDArray[np.uint64]
) -> list[tuple[str, str, float]]:
    engine = engine_for(host, compiled)
    first_s, decode = _decode(engine, compiled, sequences=1)
    results = [
        ("memory read", "GB/s", read_bandwidth(memory, threads=host.threads) / 1e9),
        ("decode", "tokens/s", decode),
        ("first token after 30", "ms", first_s * 1e3),
        ("prefill 512", "tokens/s", _prefill(engine, compiled)),
    ]
    rates = ((size, _decode(engine, compiled, sequences=size)[1]) for size in BATCHES)
    return results + [(f"decode {size} sequences", "tokens/s", rate) for size, rate in rates]


def _prefill(engine: Engine, compiled: Compiled) -> float:
    """Tokens per second of a prompt of 512, up to its last logits."""
    count = min(PREFILL_TOKENS, engine.context)
    tokens = random_tokens(count, compiled.config.vocab_size)
    sequence = engine.open()
    try:
        started_s = time.perf_counter()
        engine.last_logits(sequence, tokens)
        return count / (time.perf_counter() - started_s)
    finally:
        engine.close(sequence)


def _decode(engine: Engine, compiled: Compiled, *, sequences: int) -> tuple[float, float]:
    """Seconds to the first token of all sequences, then tokens per second of all together."""
    sampling = Sampling(max_tokens=DECODE_STEPS + 1, ignore_eos=True)
    opened = [engine.open() for _ in range(sequences)]
    try:
        started_s = time.perf_counter()
        for index, sequence in enumerate(opened):
            tokens = random_tokens(PROMPT_TOKENS, compiled.config.vocab_size, seed=index)
            engine.ask(sequence, tokens, sampling)
        while any(s.answer and not s.answer.generated for s in opened):
            engine.step()
        first_s = time.perf_counter() - started_s
        before = sum(len(s.answer.generated) for s in opened if s.answer)
        started_s = time.perf_counter()
        while engine.busy:
            engine.step()
        seconds = time.perf_counter() - started_s
        after = sum(len(s.answer.generated) for s in opened if s.answer)
        return first_s, (after - before) / seconds
    finally:
        for sequence in opened:
            engine.close(sequence)


def read_bandwidth(memory: NDArray[np.uint64], *, threads: int) -> float:
    """Bytes per second that this many threads read from memory together: the best of three."""
    parts = np.array_split(memory, threads)
    best_s = float("inf")
    for _ in range(3):
        # numpy lets go of the interpreter while it reduces, so the threads do run together.
        workers = [threading.Thread(target=np.bitwise_or.reduce, args=(part,)) for part in parts]
        started_s = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best_s = min(best_s, time.perf_counter() - started_s)
    return memory.nbytes / best_s


def _fresh_start(
    name_or_path: str, precision: str, threads: int | None, kernels: str | None
) -> dict[str, float]:
    """Start a process that answers with one token; seconds from its start, and its peak memory."""
    code = "import sys; from openlpu.engine.bench import first_token; first_token(*sys.argv[1:])"
    arguments = [name_or_path, precision, str(threads or 0), kernels or ""]
    started_s = time.time()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, check=True, text=True
    )
    values: dict[str, float] = json.loads(done.stdout)
    values["first_token_s"] = values.pop("first_token_at_s") - started_s
    return values


def first_token(name_or_path: str, precision: str, threads: str, kernels: str) -> None:
    """What the fresh process does: write when its first token came, and its peak memory."""
    with load(
        name_or_path, precision=precision, threads=int(threads) or None, kernels=kernels or None
    ) as model:
        model.generate("Why is the sky blue?", max_tokens=1)
        report = {"first_token_at_s": time.time(), "peak_bytes": peak_memory_bytes()}
    json.dump(report, sys.stdout)


def peak_memory_bytes() -> int:
    """Most memory this process ever had resident."""
    try:
        # ru_maxrss of a child begins at its parent's size, because it counts from before exec.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass  # not Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
