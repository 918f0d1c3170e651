"""In: a model, and llama.cpp's server. Out: both servers' speed under the same load, compared.

    python bench/serve.py --llama-server PATH

All figures come from one run: rounds in which the servers take turns under each load, and the
engine without a server takes a turn, too. bench/README.md says what is measured and why.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import importlib.metadata
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gguf_files import converted
from machine import SETTLE_S, busy_cores, cpu_model, system_name
from rich.console import Console
from rich.table import Table
from rounds import TEXT
from servers import LlamaServer, OpenLpuServer, Server, loop_cpu_s
from traffic import Load, Traffic, WrongAnswer, send

from openlpu import __version__
from openlpu.engine.model import Model, load
from openlpu.engine.sampling import Sampling
from openlpu.engine.sequence import Request
from openlpu.errors import LpuError

LOADS = (
    Load("short, 1 client", (16, 16), 8, 1, 12),
    Load("short, 8 clients", (16, 16), 8, 8, 64),
    Load("short, 32 clients", (16, 16), 8, 32, 160),
    Load("mixed, 8 clients", (128, 512), 64, 8, 24),
)
GOALS = dict(zip((one.name for one in LOADS), (1.0, 2.0, 2.0, 2.0), strict=True))
STEADY = (
    Load("steady, 1 client", (16, 16), 128, 1, 1),
    Load("steady, 8 clients", (16, 16), 64, 8, 8),
)
_SLOTS = 32
_SLOT_TOKENS = 1024


class Prompts:
    """Cuts of a text, none of which begins like another: no prefix cache helps."""

    def __init__(self, text: list[int], vocab_size: int) -> None:
        self._text, self._vocab_size = text, vocab_size
        self._random = random.Random(0)

    def of(self, load: Load) -> list[list[int]]:
        """One for each request."""
        found = []
        for _ in range(load.requests):
            length = self._random.randint(*load.prompt_tokens)
            start = self._random.randrange(len(self._text) - length)
            first = self._random.randrange(1000, self._vocab_size)
            found.append([first, *self._text[start + 1 : start + length]])
        return found


def alone(model: Model, load: Load, prompts: list[list[int]], end: int) -> tuple[float, float]:
    """Seconds from a token to the next one, and of a step (which may give more than one token of
    an answer, if drafted), when the engine works for nobody but this loop."""
    sampling = Sampling(max_tokens=load.answer_tokens, logit_bias=((end, -100.0),))
    answers = [
        model.engine.submit(prompt, sampling, Request(end_ids=frozenset({end})))
        for prompt in prompts
    ]
    steps_s = []
    while model.engine.busy:
        started_s = time.perf_counter()
        sampled = model.engine.step()
        if len(sampled) >= load.clients:  # not the prompts' steps
            steps_s.append(time.perf_counter() - started_s)
    spans = [
        (a.last_token_s - a.first_token_s) / (load.answer_tokens - 1)
        for a in answers
        if a.last_token_s is not None and a.first_token_s is not None
    ]
    return statistics.median(spans), statistics.median(steps_s)


def compare(
    name: str, *, llama_server: str | None, rounds: int, threads: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """Measure a GGUF model; returns the report that --json writes."""
    note("compiling, and converting to Q8_0")
    with load(name, threads=threads) as model:
        source = model.checkpoint.source
        if llama_server and not source.is_file():
            raise SystemExit(f"{name}: not a GGUF file; llama.cpp needs one")
        text = model.tokenizer.encode(TEXT.read_text(encoding="utf-8"))
        end = model.tokenizer.eos_ids[0]
        prompts = Prompts(text, model.compiled.config.vocab_size)
        servers: list[Server] = []
        try:
            ours = OpenLpuServer(name, threads)
            servers.append(ours)
            if llama_server:
                file = converted(source, model.compiled.weights.fingerprint(), "Q8_0")
                servers.append(
                    LlamaServer(llama_server, file, threads, slots=_SLOTS, slot_tokens=_SLOT_TOKENS)
                )
            values: dict[str, list[float]] = {}
            strangers: list[float] = []

            def add(key: str, value: float) -> None:
                values.setdefault(key, []).append(value)

            def put(one: Load, server: Server, work: list[list[int]]) -> Traffic:
                strangers.append(busy_cores(SETTLE_S))
                return asyncio.run(send(one, server.url, server.model, work, end))

            note("warming up")
            for one in (*LOADS, *STEADY):
                for server in servers:
                    put(one, server, prompts.of(one))
            for index in range(rounds):
                note(f"round {index + 1} of {rounds}")
                turns = servers[:: 1 if index % 2 == 0 else -1]
                for one in LOADS:
                    work = prompts.of(one)
                    for server in turns:
                        traffic = put(one, server, work)
                        key = f"{one.name}, {server.name}"
                        add(f"{key}, requests/s", traffic.requests_per_s)
                        add(f"{key}, first p50 s", traffic.first_s(0.5))
                        add(f"{key}, first p99 s", traffic.first_s(0.99))
                        add(f"{key}, between s", traffic.between_s)
                for one in STEADY:
                    work = prompts.of(one)
                    between_s, step_s = alone(model, one, work, end)
                    add(f"{one.name}, engine, between s", between_s)
                    add(f"{one.name}, engine, step s", step_s)
                    before = loop_cpu_s(ours)
                    traffic = put(one, ours, work)
                    spent = loop_cpu_s(ours) - before
                    add(f"{one.name}, openlpu, between s", traffic.between_s)
                    add(f"{one.name}, loop s a token", spent / one.answer_tokens / one.requests)
            return {
                "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "model": model.name,
                "threads": threads,
                "rounds": rounds,
                "cpu": cpu_model(),
                "system": f"{system_name()}, Python {sys.version.split()[0]}",
                "versions": {
                    "openlpu": __version__,
                    "numpy": importlib.metadata.version("numpy"),
                    **{s.name: s.about for s in servers[1:]},
                },
                "identity": model.identity,
                "ready_s": ours.ready_s,
                "others_cores": statistics.mean(strangers),
                "loads": [{**asdict(one), "goal": GOALS[one.name]} for one in LOADS],
                "values": values,
                "medians": {key: statistics.median(found) for key, found in values.items()},
            }
        finally:
            for server in servers:
                server.close()


def show(report: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    medians = report["medians"]
    table = Table(
        title=f"{report['model']}, {report['threads']} threads, "
        f"medians of {report['rounds']} rounds, {report['cpu']}"
    )
    columns = ("", "OpenLPU", "llama.cpp", "", "ratio", "goal")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for one in report["loads"]:
        for what, unit, scale in (
            ("requests/s", "requests/s", 1.0),
            ("first p50 s", "ms to the first token, p50", 1e3),
            ("first p99 s", "ms to the first token, p99", 1e3),
            ("between s", "ms between tokens", 1e3),
        ):
            pair = [medians.get(f"{one['name']}, {n}, {what}") for n in ("openlpu", "llama.cpp")]
            told = ["" if value is None else f"{value * scale:,.1f}" for value in pair]
            is_rate = what == "requests/s"
            ratio = "" if pair[1] is None else f"{pair[0] / pair[1]:.2f}"
            goal = f"{one['goal']:.1f}" if is_rate else ""
            table.add_row(one["name"] if is_rate else "", *told, unit, ratio, goal)
    console.print(table)
    for one in STEADY:
        engine = medians[f"{one.name}, engine, between s"]
        served = medians[f"{one.name}, openlpu, between s"]
        loop, step = (medians[f"{one.name}, {k}"] for k in ("loop s a token", "engine, step s"))
        console.print(
            f"{one.name}: {loop * 1e3:.3f} ms of the event loop a token, {loop / step:.1%} of a "
            f"step of {step * 1e3:.2f} ms; {served * 1e3:.2f} ms from token to token, "
            f"{engine * 1e3:.2f} ms in the engine alone ({served / engine - 1:+.1%}, the client's "
            "own work on the same cores included)"
        )
    console.print(f"ready {report['ready_s']:.2f} s after the start")
    if report["others_cores"] > 0.05:
        console.print(
            f"Not a quiet machine: {report['others_cores']:.2f} cores in use; do not cite."
        )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="OpenLPU's and llama.cpp's servers, side by side.")
    parser.add_argument("--llama-server", help="path of llama.cpp's server; without it, ours alone")
    parser.add_argument("--model", default="smollm2", help="an alias, or a GGUF file")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    progress = Console(stderr=True)
    try:
        report = compare(
            options.model,
            llama_server=options.llama_server,
            rounds=options.rounds,
            threads=options.threads,
            note=progress.print,
        )
    except (LpuError, RuntimeError, OSError, WrongAnswer) as error:
        raise SystemExit(str(error)) from None
    model = Path(options.model).name
    report["command"] = (
        f"bench/serve.py --model {model} --rounds {options.rounds} --threads {options.threads}"
    )
    show(report, Console())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
