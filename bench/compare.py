"""In: a checkpoint, and an interpreter with llama-cpp-python. Out: both engines' speed, compared.

    python bench/compare.py --llama-python PYTHON

All figures come from one run: rounds in which the engines take turns, with the memory's bandwidth
read beside decode, because it moves. bench/README.md says what is measured and why.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bandwidth import MemoryRead
from engines import LlamaCpp, OpenLpu, Side, Timing
from q8_file import q8_0_file, tensor_bytes
from rich.console import Console
from rich.table import Table

from openlpu import __version__
from openlpu.engine.model import open_model
from openlpu.errors import LpuError
from openlpu.host import HostModel
from openlpu.jit import llvm_version
from openlpu.load.tokenizer import Tokenizer

TEXT = Path(__file__).with_name("text") / "essays.txt"
SETTLE_S = 0.25  # threads that spin after their work have gone to sleep by then
BUSY_CORES = 0.05  # more than this in use, by an idle engine or by strangers, spoils the figures
ENGINES = ("openlpu", "llama.cpp")


@dataclass(frozen=True, slots=True)
class Case:
    """Work that is timed: the prompts when there are no steps, else the steps."""

    name: str
    sequences: int
    prompt_tokens: int
    steps: int
    goal: float | None = None
    """At least so many times llama.cpp's tokens per second."""

    def tokens_per_s(self, timing: Timing) -> float:
        """Of all sequences together."""
        if self.steps:
            return self.sequences * self.steps / timing.decode_s
        return self.sequences * self.prompt_tokens / timing.prefill_s


DECODE = Case("decode", 1, 16, 64, goal=1.8)
CASES = (
    DECODE,
    Case("prefill 512", 1, 512, 0, goal=2.5),
    Case("decode 8 sequences", 8, 16, 32),
    Case("decode 32 sequences", 32, 16, 32, goal=2.5),
)


class Rounds:
    """Every figure by its name, one value a round."""

    def __init__(self, sides: dict[str, Side], memory: MemoryRead, text: list[int]) -> None:
        """text: token ids from which the prompts are cut."""
        self.sides, self.values = sides, dict[str, list[float]]()
        self.other_engine_cores: list[float] = []  # in use by the engine that should be idle
        self.strangers_cores: list[float] = []  # in use just before, while both engines sleep
        self.same_tokens: list[bool] = []  # whether the engines agree on a prompt's first token
        self._memory, self._text = memory, text

    def warm_up(self) -> None:
        """Run every case once; nothing is kept."""
        for case in CASES:
            for side in self.sides.values():
                side.run(self._prompts(case), case.steps)

    def run(self, index: int) -> None:
        """One round: each case on each engine; who begins changes from round to round."""
        names = ENGINES[:: 1 if index % 2 == 0 else -1]
        for case in CASES:
            first = {}
            for name in names:
                timing = self._timed(case, name)
                self._add(f"{case.name}, {name}", case.tokens_per_s(timing))
                first[name] = [tokens[0] for tokens in timing.tokens]
            pairs = zip(*first.values(), strict=True)
            self.same_tokens += [a == b for a, b in pairs]

    def _timed(self, case: Case, name: str) -> Timing:
        other = self.sides[next(n for n in ENGINES if n != name)]
        self.strangers_cores.append(busy_cores(SETTLE_S))
        before = self._memory.bytes_per_s() if case is DECODE else 0.0
        cpu_s, started_s = other.cpu_s(), time.perf_counter()
        timing = self.sides[name].run(self._prompts(case), case.steps)
        cores = (other.cpu_s() - cpu_s) / (time.perf_counter() - started_s)
        self.other_engine_cores.append(cores)
        if case is DECODE:
            # Read on both sides of the work; the faster one, so that the share errs downwards.
            self._add(f"memory, {name}", max(before, self._memory.bytes_per_s()))
        return timing

    def _prompts(self, case: Case) -> list[list[int]]:
        n = case.prompt_tokens
        return [self._text[i * n : (i + 1) * n] for i in range(case.sequences)]

    def _add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)


def compare(
    model: str, *, llama_python: str, rounds: int, threads: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """Measure a GGUF model; returns the report that --json writes."""
    note("compiling, and converting to Q8_0")
    checkpoint, compiled = open_model(model)
    if not checkpoint.source.is_file():
        raise SystemExit(f"{model}: not a GGUF file; llama.cpp needs one")
    file = q8_0_file(checkpoint.source, compiled.weights.fingerprint())
    ids = Tokenizer.from_source(checkpoint.tokenizer).encode(TEXT.read_text(encoding="utf-8"))
    with (
        closing(compiled.host(threads=threads)) as host,
        closing(LlamaCpp(llama_python, file, threads)) as llama,
        closing(MemoryRead(threads)) as memory,
    ):
        taken = Rounds({"openlpu": OpenLpu(host), "llama.cpp": llama}, memory, ids)
        note("warming up")
        taken.warm_up()
        for index in range(rounds):
            note(f"round {index + 1} of {rounds}")
            taken.run(index)
        read = {"openlpu": decode_bytes(host), "llama.cpp": tensor_bytes(file)}
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "model": checkpoint.name,
            "threads": threads,
            "rounds": rounds,
            "cpu": cpu_model(),
            "system": f"{system_name()}, Python {sys.version.split()[0]}",
            "versions": {
                "openlpu": __version__,
                "llvm": llvm_version(),
                "numpy": importlib.metadata.version("numpy"),
                "llama.cpp": llama.about,
            },
            "kernels": host.kernels,
            "identity": host.identity,
            "bytes_per_token": read,
            "busy_cores": {
                "idle engine": max(taken.other_engine_cores),
                "others": statistics.mean(taken.strangers_cores),
            },
            "first_tokens": {"same": sum(taken.same_tokens), "all": len(taken.same_tokens)},
            "cases": [
                {
                    **asdict(case),
                    "tokens_per_s": {n: taken.values[f"{case.name}, {n}"] for n in ENGINES},
                }
                for case in CASES
            ],
            "memory_bytes_per_s": {n: taken.values[f"memory, {n}"] for n in ENGINES},
        }


def decode_bytes(host: HostModel) -> int:
    """Bytes that one token's step reads: all packed weights but the embedding table (of int8, and
    a scale for each row), from which it takes one row. K/V is left out; here it is small."""
    table = next(op for op in host.graph.ops if op.kind == "embed").params[0]
    rows, width = table.shape
    return host.packed_bytes - rows * (width + 4)


def busy_cores(seconds: float) -> float:
    """Sleep; how many of the machine's cores were in use meanwhile (0 where Linux is not)."""
    before = _not_idle_s()
    time.sleep(seconds)
    return max(0.0, (_not_idle_s() - before) / seconds)


def _not_idle_s() -> float:
    """Seconds of all cores since the start of the machine, but those idle or waiting for a disk;
    what a hypervisor took away counts as used."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system, _, _, *rest = (int(t) for t in stat.read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def system_name() -> str:
    """The operating system and its version, without the builder's own suffix."""
    return f"{platform.system()} {platform.release().split('-')[0]}"


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def with_medians(report: dict[str, Any]) -> dict[str, Any]:
    """The report with medians, ratios, and shares of bandwidth (per round, then their median)."""
    cases = []
    for case in report["cases"]:
        medians = {n: statistics.median(case["tokens_per_s"][n]) for n in ENGINES}
        ratio = medians["openlpu"] / medians["llama.cpp"]
        cases.append({**case, "median_tokens_per_s": medians, "ratio": ratio})
    memory, shares = report["memory_bytes_per_s"], {}
    for name in ENGINES:
        rates = cases[CASES.index(DECODE)]["tokens_per_s"][name]
        pairs = zip(rates, memory[name], strict=True)
        shares[name] = statistics.median(
            rate * report["bytes_per_token"][name] / speed for rate, speed in pairs
        )
    medians = {name: statistics.median(memory[name]) for name in ENGINES}
    return {
        **report,
        "cases": cases,
        "median_memory_bytes_per_s": medians,
        "decode_share_of_memory_read": shares,
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(
        title=f"{report['model']}, {report['threads']} threads, "
        f"medians of {report['rounds']} rounds, {report['cpu']}"
    )
    table.add_column("")
    for column in ("OpenLPU w8", "llama.cpp Q8_0", "", "ratio", "goal"):
        table.add_column(column, justify="left" if not column else "right")
    for case in report["cases"]:
        ours, theirs = (f"{case['median_tokens_per_s'][n]:,.1f}" for n in ENGINES)
        goal = f"{case['goal']:.1f}" if case["goal"] else ""
        table.add_row(case["name"], ours, theirs, "tokens/s", f"{case['ratio']:.2f}", goal)
    for name, unit, key, factor in (
        ("bytes per token", "MB", "bytes_per_token", 1e-6),
        ("memory read", "GB/s", "median_memory_bytes_per_s", 1e-9),
        ("decode / memory read", "", "decode_share_of_memory_read", 1.0),
    ):
        ours, theirs = (f"{report[key][n] * factor:,.2f}" for n in ENGINES)
        table.add_row(name, ours, theirs, unit, "", "")
    console.print(table)
    same = report["first_tokens"]
    console.print(f"{same['same']:,} of {same['all']:,} first tokens are the same.")
    for who, cores in report["busy_cores"].items():
        if cores > BUSY_CORES:
            console.print(f"Not a quiet machine: {cores:.2f} cores in use ({who}); do not cite.")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="OpenLPU and llama.cpp, side by side.")
    parser.add_argument(
        "--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python"
    )
    parser.add_argument("--model", default="smollm2", help="an alias, or a GGUF file")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    progress = Console(stderr=True)
    try:
        report = compare(
            options.model,
            llama_python=options.llama_python,
            rounds=options.rounds,
            threads=options.threads,
            note=progress.print,
        )
    except (LpuError, RuntimeError, OSError) as error:
        raise SystemExit(str(error)) from None
    report = with_medians(report)
    # Paths belong to one machine; what they name is in the report.
    model = Path(options.model).name
    report["command"] = (
        f"bench/compare.py --model {model} --rounds {options.rounds} --threads {options.threads}"
    )
    show(report, Console())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
