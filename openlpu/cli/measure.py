"""In: a model. Out: perplexity, bit claims and speed; `lpu eval`, `lpu verify`, `lpu bench`."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openlpu.cli import options
from openlpu.cli.terminal import Progress, table, write, write_json
from openlpu.errors import RequestError

if TYPE_CHECKING:
    from openlpu.engine.compiled import Compiled
    from openlpu.engine.runner import Runner

_ENGINES = ("float", "host", "reference")


def eval_text(
    file: Annotated[Path, typer.Argument(metavar="FILE.txt", help="A text in UTF-8.")],
    model: options.Model = options.DEFAULT_MODEL,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="|".join(_ENGINES),
            help="float: full precision; host: lpu-1; reference: lpu-1 in numpy. May be repeated.",
        ),
    ] = None,
    window: Annotated[int, typer.Option(metavar="N", help="Tokens of context.")] = 1024,
    tokens: Annotated[int, typer.Option(metavar="N", help="Only the first N tokens; 0: all.")] = 0,
    precision: options.Precision = "w8",
    threads: options.Threads = None,
    kernels: options.Kernels = None,
    json: options.Json = False,
) -> None:
    """Print the perplexity of a text: full precision, and lpu-1."""
    from openlpu.engine.evaluate import perplexity
    from openlpu.engine.model import open_model
    from openlpu.engine.verify import engine_for
    from openlpu.load.tokenizer import Tokenizer

    wanted = engine or ["float", "host"]
    for name in wanted:
        if name not in _ENGINES:
            raise RequestError(f"engine is {name!r}; give one of: {', '.join(_ENGINES)}")
    text = _read_text(file)
    found = {}
    with Progress() as progress:
        checkpoint, compiled = open_model(model, precision=precision, progress=progress)
        ids = Tokenizer.from_source(checkpoint.tokenizer).encode_prompt(text, special=False)
        ids = ids[:tokens] if tokens > 0 else ids
        for name in wanted:
            with closing(_runner(name, compiled, threads, kernels, progress)) as runner:
                found[name] = perplexity(
                    engine_for(runner, compiled), ids, window=window, progress=progress
                )
    if json:
        write_json(
            {
                name: {
                    "perplexity": p.value,
                    "mean_loss_nats": p.mean_loss_nats,
                    "scored_tokens": p.scored_tokens,
                    "window_tokens": p.window_tokens,
                    "seconds": p.seconds,
                }
                for name, p in found.items()
            }
        )
        return
    base = found.get("float")
    rows = [
        [
            name,
            f"{p.value:.4f}",
            f"{100 * (p.value / base.value - 1):+.2f} %" if base and p is not base else "",
            f"{p.scored_tokens:,}",
            f"{p.seconds:.1f}",
        ]
        for name, p in found.items()
    ]
    write(table(["engine", "perplexity", "to float", "tokens", "seconds"], rows))


def verify(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name or a path, as for --model of lpu run.")
    ] = options.DEFAULT_MODEL,
    full: Annotated[
        bool, typer.Option("--full", help="Long prompts and every kernel set; takes minutes.")
    ] = False,
    precision: options.Precision = "w8",
    json: options.Json = False,
) -> None:
    """Prove on this machine that the bits are the same; exit code 1 if any differs."""
    from openlpu.engine import verify as claims

    found: list[claims.Claim] = []
    widths = (40, 52, 14, 9)
    with Progress() as progress:
        for claim in claims.verify(model, precision=precision, full=full, progress=progress):
            if not found and not json:
                write(_row(widths, "claim", "cases", "bits differing", "seconds"))
            found.append(claim)
            if not json:
                differing = "-" if claim.differing_bits is None else f"{claim.differing_bits:,}"
                write(_row(widths, claim.claim, claim.cases, differing, f"{claim.seconds:.1f}"))
    differing_bits = sum(claim.differing_bits or 0 for claim in found)
    compared_bits = sum(claim.compared_bits for claim in found)
    if json:
        write_json({"differing_bits": differing_bits, "claims": found})
    else:
        write(f"{compared_bits:,} bits compared, {differing_bits:,} differ\n")
    if differing_bits:
        raise typer.Exit(1)


def bench(
    model: options.Model = options.DEFAULT_MODEL,
    rounds: Annotated[int, typer.Option(min=1, metavar="N", help="Interleaved rounds.")] = 5,
    precision: options.Precision = "w8",
    threads: options.Threads = None,
    kernels: options.Kernels = None,
    json: options.Json = False,
) -> None:
    """Measure speed, start-up and memory on this machine."""
    from openlpu.engine import bench as figures

    with Progress() as progress:
        report = figures.bench(
            model,
            precision=precision,
            threads=threads,
            kernels=kernels,
            rounds=rounds,
            progress=progress,
        )
    if json:
        write_json(report)
        return
    write(
        f"{report.model}, {report.precision}, {report.threads} threads, {report.kernels} kernels, "
        f"{report.packed_bytes / 1e6:.1f} MB packed\n\n"
    )
    rows = [
        [m.name, f"{m.median:,.2f}", m.unit, f"{min(m.rounds):,.2f}", f"{max(m.rounds):,.2f}"]
        for m in report.measures
    ]
    write(table(["", "median", "", "least", "most"], rows))


def _row(widths: tuple[int, ...], *cells: str) -> str:
    left = "  ".join(cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True))
    right = "".join(cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True))
    return f"{left}{right}\n"


def _runner(
    name: str,
    compiled: Compiled,
    threads: int | None,
    kernels: str | None,
    progress: Any,
) -> Runner:
    if name == "host":
        return compiled.host(threads=threads, kernels=kernels, progress=progress)
    return compiled.reference(graph=compiled.float_graph if name == "float" else None)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RequestError(f"{file} is not UTF-8 text") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise RequestError(f"{file}: {reason}; give a text file") from None
