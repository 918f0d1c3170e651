"""In: a model, and interpreters that have other engines. Out: the engines' speed, compared.

    python bench/compare.py --llama-python P --openvino-python P --ctranslate2-python P

All figures come from one run: rounds in which the engines take turns. bench/README.md says what is
measured and why.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from bandwidth import MemoryRead
from engines import Side
from machine import cpu_model, system_name
from peak import IntegerPeak
from peers import NOT_THERE, PEERS, PRECISIONS, Engine, Setup, layer_products
from random_models import SHAPES, random_file
from rich.console import Console
from rich.table import Table
from rounds import CASES, MEMORY, PEAK, TEXT, Case, Rounds

from openlpu.errors import LpuError
from openlpu.load.checkpoint import Checkpoint, open_checkpoint
from openlpu.load.tokenizer import Tokenizer

BUSY_CORES = 0.05  # more than this in use, by idle engines or by strangers, spoils the figures
UNITS = {MEMORY: "GB/s", PEAK: "G products/s"}


def compare(
    model: str,
    *,
    cases: Sequence[Case],
    precisions: Sequence[str],
    peers: Sequence[str],
    pythons: dict[str, str],
    rounds: int,
    threads: int,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Measure a GGUF model, or a random one; returns the report that --json writes."""
    path = str(random_file(model)) if model in SHAPES else model
    checkpoint = open_checkpoint(path)
    if not checkpoint.source.is_file():
        raise SystemExit(f"{model}: not a GGUF file; the peers need one")
    setup = Setup(path, checkpoint, threads, pythons)
    engines = [
        engine
        for precision in precisions
        for engine in setup.engines(precision)
        if not engine.peer or engine.peer in peers
    ]
    with ExitStack() as stack:
        sides, absent = _started(engines, stack, note)
        if "w4" in precisions:
            absent |= {f"{peer} w4": why for peer, why in NOT_THERE.items() if peer in peers}
        memory = stack.enter_context(closing(MemoryRead(threads)))
        peak = stack.enter_context(closing(IntegerPeak(threads)))
        taken = Rounds(sides, cases, _text(model, checkpoint), memory, peak)
        note("warming up")
        taken.warm_up()
        for index in range(rounds):
            note(f"round {index + 1} of {rounds}")
            taken.run(index)
        return {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "model": model if model in SHAPES else checkpoint.name,
            "random_weights": model in SHAPES,
            "threads": threads,
            "rounds": rounds,
            "cpu": cpu_model(),
            "system": f"{system_name()}, Python {sys.version.split()[0]}",
            "numpy": importlib.metadata.version("numpy"),
            "products_per_token": layer_products(checkpoint.config),
            "engines": {
                engine.name: {
                    "peer": engine.peer,
                    "precision": engine.precision,
                    "bytes_per_token": sides[engine.name].bytes_per_token,
                    **sides[engine.name].about,
                }
                for engine in engines
                if engine.name in sides
            },
            "absent": absent,
            "cases": [asdict(case) for case in cases],
            **taken.record(),
        }


def _started(
    engines: Sequence[Engine], stack: ExitStack, note: Callable[[str], None]
) -> tuple[dict[str, Side], dict[str, str]]:
    """The engines that run, and why the others do not."""
    sides, absent = dict[str, Side](), dict[str, str]()
    for engine in engines:
        note(f"starting {engine.name}")
        try:
            sides[engine.name] = stack.enter_context(closing(engine.start()))
        except (LpuError, RuntimeError, OSError) as error:
            absent[engine.name] = str(error)
            note(f"{engine.name} is not compared: {error}")
    if not sides:
        raise SystemExit("no engine runs")
    return sides, absent


def _text(model: str, checkpoint: Checkpoint) -> list[int]:
    """Token ids from which prompts are cut."""
    if model in SHAPES:
        ids: list[int] = np.random.default_rng(0).integers(3, 32_000, 4096).tolist()
        return ids
    tokenizer = Tokenizer.from_source(checkpoint.tokenizer)
    return tokenizer.encode(TEXT.read_text(encoding="utf-8"))


def with_medians(report: dict[str, Any]) -> dict[str, Any]:
    """The report with, for each case and engine, the median, its ratio to the best peer's of the
    same precision, and the share of what limits it (per round, then their median)."""
    cases = []
    for case in report["cases"]:
        rates = report["tokens_per_s"][case["name"]]
        medians = {name: statistics.median(values) for name, values in rates.items()}
        limits = report["limits_per_s"].get(case["name"], {})
        shares = {}
        for name, found in limits.items():
            engine = report["engines"][name]
            work = engine["bytes_per_token"] if case["limit"] == MEMORY else None
            work = report["products_per_token"] if work is None else work
            if all(found):
                pairs = zip(rates[name], found, strict=True)
                shares[name] = statistics.median(rate * work / limit for rate, limit in pairs)
        cases.append(
            {
                **case,
                "median_tokens_per_s": medians,
                "ratio_to_best_peer": _ratios(report["engines"], medians),
                "median_limit_per_s": {n: statistics.median(v) for n, v in limits.items()},
                "share_of_limit": shares,
            }
        )
    return {**report, "cases": cases}


def _ratios(engines: dict[str, Any], medians: dict[str, float]) -> dict[str, float]:
    best: dict[str, float] = {}
    for name, engine in engines.items():
        if engine["peer"]:
            precision = engine["precision"]
            best[precision] = max(best.get(precision, 0.0), medians[name])
    return {
        name: medians[name] / best[engine["precision"]]
        for name, engine in engines.items()
        if engine["precision"] in best
    }


def show(report: dict[str, Any], console: Console) -> None:
    """Print the table, and what stands in the way of trusting it."""
    table = Table(
        title=f"{report['model']}, {report['threads']} threads, "
        f"medians of {report['rounds']} rounds, {report['cpu']}, {report['date'][:10]}"
    )
    table.add_column("case")
    table.add_column("engine")
    for column in ("tokens/s", "to best peer", "share", "of"):
        table.add_column(column, justify="left" if column == "of" else "right")
    for case in report["cases"]:
        title, precision = case["name"], None
        for name, rate in case["median_tokens_per_s"].items():
            if precision not in (None, report["engines"][name]["precision"]):
                table.add_section()
            precision = report["engines"][name]["precision"]
            ratio, share = case["ratio_to_best_peer"].get(name), case["share_of_limit"].get(name)
            limit = case["median_limit_per_s"].get(name, 0.0) * 1e-9
            table.add_row(
                title,
                name,
                f"{rate:,.1f}",
                f"{ratio:.2f}" if ratio else "",
                f"{share:.2f}" if share else "",
                f"{limit:,.1f} {UNITS[case['limit']]}" if share else "",
            )
            title = ""
        table.add_section()
    console.print(table)
    same = (f"{name} {share:.2f}" for name, share in report["same_first_tokens"].items())
    console.print(f"First tokens like the first engine's: {', '.join(same)}")
    for name, why in report["absent"].items():
        console.print(f"Not compared: {name}: {why}")
    for who, cores in report["busy_cores"].items():
        if cores > BUSY_CORES:
            console.print(f"Not a quiet machine: {cores:.2f} cores in use ({who}); do not cite.")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="OpenLPU and its peers, side by side.")
    for peer, package in zip(
        PEERS, ("llama-cpp-python", "openvino-genai", "ctranslate2"), strict=True
    ):
        parser.add_argument(
            f"--{peer.removesuffix('.cpp')}-python",
            default=sys.executable,
            metavar="PYTHON",
            help=f"interpreter that has {package}",
        )
    parser.add_argument(
        "--model", default="smollm2", help=f"an alias, a GGUF file, or {' or '.join(SHAPES)}"
    )
    _several(parser, "--cases", tuple(CASES))
    _several(parser, "--precisions", PRECISIONS)
    _several(parser, "--peers", PEERS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round's figures")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        report = compare(
            options.model,
            cases=[CASES[name] for name in options.cases],
            precisions=options.precisions,
            peers=options.peers,
            pythons={peer: vars(options)[f"{peer.removesuffix('.cpp')}_python"] for peer in PEERS},
            rounds=options.rounds,
            threads=options.threads,
            note=Console(stderr=True, highlight=False).print,
        )
    except (LpuError, RuntimeError, OSError) as error:
        raise SystemExit(str(error)) from None
    report = with_medians(report)
    report["command"] = _command(options)
    show(report, Console())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _several(parser: argparse.ArgumentParser, option: str, known: tuple[str, ...]) -> None:
    """An option that names some of `known`, separated by commas; all of them by default."""

    def names(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in found if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return found

    parser.add_argument(
        option, type=names, default=list(known), metavar="NAME,...", help=f"of {', '.join(known)}"
    )


def _command(options: argparse.Namespace) -> str:
    """The command without the paths of this machine; what they name is in the report."""
    words = ["bench/compare.py", "--model", Path(options.model).name]
    for name in ("cases", "precisions", "peers"):
        words += [f"--{name}", ",".join(vars(options)[name])]
    words += ["--rounds", str(options.rounds), "--threads", str(options.threads)]
    return shlex.join(words)


if __name__ == "__main__":
    main()
