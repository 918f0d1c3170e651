"""In: a model. Out: what long contexts cost: prompts of 512 and 8,192 tokens, and single steps that
read up to 131,072 positions.

    python bench/context.py --model tinyllama-1.1b --json bench/results/NAME.json

K/V of the first 8,192 positions are computed; the pages after them are copies, each in memory of
its own, because speed does not depend on what they hold.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from bandwidth import MemoryRead
from engines import packed_bytes_per_token
from machine import SETTLE_S, busy_cores, cpu_model, system_name
from peak import IntegerPeak
from peers import layer_products
from random_models import SHAPES, random_file
from rich.console import Console
from rich.table import Table

from openlpu import __version__
from openlpu.engine.model import open_model
from openlpu.graph.step import PAGE, Batch
from openlpu.host import HostModel
from openlpu.load.checkpoint import open_checkpoint

PROMPTS = (512, 8192)
CONTEXTS = (512, 8192, 32_768, 131_072)
STEPS = 16  # single steps that are timed together


class Runner:
    """One sequence whose K/V fill the whole pool."""

    def __init__(self, host: HostModel) -> None:
        """Compute the longest prompt, and fill the rest of the pool with copies of its pages."""
        self._host = host
        pages = max(CONTEXTS) // PAGE
        host.grow(pages)
        self._table = np.arange(pages, dtype=np.int32)[None]
        self._tokens = np.random.default_rng(0).integers(3, 32_000, max(CONTEXTS), dtype=np.int32)
        self.prompt_s(max(PROMPTS))
        known = max(PROMPTS) // PAGE
        for start in range(known, pages, known):
            host.kv[start : start + known] = host.kv[:known]

    def prompt_s(self, length: int) -> float:
        """Seconds of a whole prompt, in steps as long as the host takes them."""
        started_s = time.perf_counter()
        for start in range(0, length, self._host.max_rows):
            stop = min(start + self._host.max_rows, length)
            self._step(start, stop)
        return time.perf_counter() - started_s

    def steps_s(self, context: int) -> float:
        """Seconds of STEPS single steps, the last of which reads `context` positions."""
        started_s = time.perf_counter()
        for position in range(context - STEPS, context):
            self._step(position, position + 1)
        return time.perf_counter() - started_s

    def bytes_per_step(self, context: int) -> int:
        """Weights once, and the K/V of every position (of every page, that is)."""
        return packed_bytes_per_token(self._host) + -(-context // PAGE) * self._host.page_bytes

    def _step(self, start: int, stop: int) -> None:
        rows = stop - start
        positions = np.arange(start, stop, dtype=np.int32)
        slots, wanted = np.zeros(rows, np.int32), np.array([rows - 1], np.int32)
        self._host.step(Batch(self._tokens[start:stop], positions, slots, wanted, self._table))


def measure(
    runner: Runner, memory: MemoryRead, peak: IntegerPeak, rounds: int, console: Console
) -> dict[str, Any]:
    """Every value of every round; limits are read before and after each, and the larger counts."""
    prompts: dict[int, Any] = {n: {"seconds": [], "products_per_s": []} for n in PROMPTS}
    decode: dict[int, Any] = {n: {"seconds": [], "bytes_per_s": []} for n in CONTEXTS}
    strangers = []
    for index in range(rounds):
        console.print(f"round {index + 1} of {rounds}")
        for n, values in prompts.items():
            strangers.append(busy_cores(SETTLE_S))
            before = peak.products_per_s()
            values["seconds"].append(runner.prompt_s(n))
            values["products_per_s"].append(max(before, peak.products_per_s()))
        for n, values in decode.items():
            strangers.append(busy_cores(SETTLE_S))
            before = memory.bytes_per_s()
            values["seconds"].append(runner.steps_s(n) / STEPS)
            values["bytes_per_s"].append(max(before, memory.bytes_per_s()))
    return {"prompts": prompts, "decode": decode, "busy_cores": statistics.mean(strangers)}


def with_medians(found: dict[str, Any], runner: Runner, products: int) -> dict[str, Any]:
    """Medians over the rounds: tokens per second, and shares of what limits them."""
    for n, values in found["prompts"].items():
        pairs = list(zip(values["seconds"], values["products_per_s"], strict=True))
        values["tokens_per_s"] = statistics.median(n / s for s, _ in pairs)
        shares = [n * products / s / limit for s, limit in pairs if limit]
        values["share_of_peak"] = statistics.median(shares) if shares else None
    shortest = found["prompts"][min(PROMPTS)]["seconds"]
    for n, values in found["prompts"].items():
        ratios = zip(values["seconds"], shortest, strict=True)
        values["to_shortest"] = statistics.median(n / s / (min(PROMPTS) / t) for s, t in ratios)
    for n, values in found["decode"].items():
        pairs = list(zip(values["seconds"], values["bytes_per_s"], strict=True))
        values["bytes"] = runner.bytes_per_step(n)
        values["tokens_per_s"] = statistics.median(1 / s for s, _ in pairs)
        values["share_of_bandwidth"] = statistics.median(
            values["bytes"] / s / limit for s, limit in pairs
        )
    return found


def show(report: dict[str, Any], console: Console) -> None:
    """Print both tables."""
    title = f"{report['model']} {report['precision']}, {report['threads']} threads, {report['cpu']}"
    prompts = Table("prompt", "tokens/s", "to the shortest", "share of peak", title=title)
    for n, values in report["prompts"].items():
        share = values["share_of_peak"]
        prompts.add_row(
            f"{n:,}",
            f"{values['tokens_per_s']:,.1f}",
            f"{values['to_shortest']:.2f}",
            f"{share:.2f}" if share else "",
        )
    console.print(prompts)
    decode = Table("context", "tokens/s", "read by a step", "share of bandwidth")
    for n, values in report["decode"].items():
        size, share = f"{values['bytes'] / 1e6:,.0f} MB", f"{values['share_of_bandwidth']:.2f}"
        decode.add_row(f"{n:,}", f"{values['tokens_per_s']:,.1f}", size, share)
    console.print(decode)
    console.print(f"cores in use by others: {report['busy_cores']:.2f}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="What long contexts cost.")
    parser.add_argument("--model", default="tinyllama-1.1b")
    parser.add_argument("--precision", default="w8")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")
    options = parser.parse_args()
    path = str(random_file(options.model)) if options.model in SHAPES else options.model
    console = Console(stderr=True, highlight=False)
    _, compiled = open_model(path, precision=options.precision)
    with (
        closing(compiled.host(threads=options.threads)) as host,
        closing(MemoryRead(options.threads)) as memory,
        closing(IntegerPeak(options.threads)) as peak,
    ):
        runner = Runner(host)
        found = measure(runner, memory, peak, options.rounds, console)
        report = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": f"bench/context.py --model {options.model} --precision {options.precision} "
            f"--rounds {options.rounds} --threads {options.threads}",
            "model": options.model,
            "precision": options.precision,
            "threads": options.threads,
            "rounds": options.rounds,
            "version": __version__,
            "kernels": host.kernels,
            "cpu": cpu_model(),
            "system": system_name(),
            **with_medians(found, runner, layer_products(open_checkpoint(path).config)),
        }
    show(report, Console())
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
