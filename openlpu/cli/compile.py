"""In: a model's name and a chip. Out: the model's program in a file, and its sizes; `lpu compile`.

The program is proved legal before it is written. The figures come from the program itself: it says
how long each step takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openlpu.cli import options
from openlpu.cli.terminal import Progress, table, write, write_json
from openlpu.errors import ProgramError, RequestError

if TYPE_CHECKING:
    from openlpu.chip import Chip
    from openlpu.load.checkpoint import Checkpoint
    from openlpu.program import Params, Program

_USUAL_CONTEXT = 1024


def compile_model(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A name or a path, as for --model of lpu run.")
    ] = options.DEFAULT_MODEL,
    chip: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="The chip: a shipped one, or its file.")
    ] = "tsp_v1",
    rows: Annotated[
        int, typer.Option(metavar="N", help="Rows of a step, equally many of each sequence.")
    ] = 1,
    sequences: Annotated[int, typer.Option(metavar="N", help="Sequences at the same time.")] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Most positions of a sequence; by default 1024, or the model's own if fewer.",
        ),
    ] = None,
    table_region: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Region of the chip for the embedding table; by default that of the weights.",
        ),
    ] = "",
    effort: Annotated[
        int, typer.Option(metavar="N", help="Schedules tried for each section; the shortest is it.")
    ] = 8,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE.lpu", help="Where the program goes; MODEL.lpu here."
        ),
    ] = None,
    precision: options.Precision = "w8",
    json: options.Json = False,
) -> None:
    """Compile a model for a chip: every operation gets its place and its cycle."""
    from openlpu.asm import save
    from openlpu.check import check
    from openlpu.chip import load_chip
    from openlpu.engine.model import open_model

    made_for = load_chip(chip)
    with Progress() as progress:
        checkpoint, compiled = open_model(model, precision=precision, progress=progress)
        path = _path(output, checkpoint)
        positions = min(_USUAL_CONTEXT, compiled.graph.context) if context is None else context
        program = compiled.program(
            made_for,
            rows=rows,
            sequences=sequences,
            context=positions,
            table_region=table_region,
            effort=effort,
            checkpoint=model,
            progress=progress,
        )
        progress("check", 0, 1)
        check(program, made_for)
        progress("check", 1, 1)
        digest = save(program, path)
    report = {"path": str(path), "bytes": path.stat().st_size, "sha256": digest}
    report |= _figures(program, made_for, {p.name: (p.highest,) * p.values for p in program.params})
    if json:
        write_json(report)
    else:
        _print(report)


def _path(output: Path | None, checkpoint: Checkpoint) -> Path:
    """Where the program goes. Refused before minutes of work: a place where it cannot."""
    from openlpu.asm.container import demand_place

    path = output or Path(f"{checkpoint.name.rsplit('/')[-1]}.lpu")
    try:
        demand_place(path)
    except ProgramError as error:
        raise RequestError(f"{error}; give another --output") from None
    return path


def _figures(program: Program, chip: Chip, params: Params) -> dict[str, Any]:
    """Sizes of a program, and the time of a step with these parameters."""
    from openlpu.asm.binary import text_bytes
    from openlpu.engine.onchip import facts
    from openlpu.viz.utilization import utilization

    known, found = facts(program), utilization(program, chip, params)
    texts = [sum(text_bytes(section, chip).values()) for section in program.sections]
    return {
        "model": known.checkpoint,
        "precision": known.precision,
        "identity": known.identity,
        "chip": chip.name,
        "clock_hz": chip.clock_hz,
        "rows": known.rows,
        "sequences": known.sequences,
        "context": known.context,
        "cycles": found.cycles,
        "seconds": found.seconds,
        "tokens_per_s": known.sequences / found.seconds,  # decoding: one of each sequence a step
        "prompt_rows_per_s": known.rows / found.seconds,
        "sections": [
            {
                "name": section.name,
                "cycles": use.cycles,
                "runs": use.runs,
                "instructions": len(section.issues),
                "text_bytes": text,
            }
            for section, use, text in zip(program.sections, found.sections, texts, strict=True)
        ],
        "text_bytes": sum(texts),
        "memory": [
            {"region": use.region, "what": use.what, "bytes": use.bytes} for use in found.memory
        ],
        "used_bytes": found.used_bytes,
        "memory_bytes": found.memory_bytes,
    }


def _print(report: dict[str, Any]) -> None:
    sizes = f"{report['rows']} row{'s' * (report['rows'] > 1)}"
    if report["sequences"] > 1:
        sizes += f" of {report['sequences']} sequences"
    write(
        f"{report['path']}: {report['model']}, {report['precision']}, on {report['chip']}; "
        f"{sizes}, context {report['context']:,}\n"
        f"legal; {report['bytes']:,} bytes, sha256 {report['sha256']}\n\n"
    )
    rows = [
        [s["name"], *(f"{s[key]:,}" for key in ("cycles", "runs", "instructions", "text_bytes"))]
        for s in report["sections"]
    ]
    columns = ["section", "cycles", "runs a step", "instructions", "text bytes"]
    write(table(columns, rows) + "\n" + memory_table(report))
    write(
        f"\n{report['cycles']:,} cycles a step at full context: {report['seconds'] * 1e6:,.1f} us "
        f"at {report['clock_hz'] / 1e6:,.0f} MHz\n"
        + speed(report["rows"], report["sequences"], report["seconds"])
        + "\n"
    )


def speed(rows: int, sequences: int, seconds: float) -> str:
    """What steps of so many rows make of their time: decoding has one token of each sequence to
    compute, a prompt fills all rows."""
    each = f", {sequences} a step" if sequences > 1 else ""
    text = f"decoding {sequences / seconds:,.0f} tokens/s{each}"
    if rows > sequences:
        text += f"; reading prompts {rows / seconds:,.0f} rows/s, {rows} a step"
    return text


def memory_table(report: dict[str, Any]) -> str:
    """What lies in which region of a chip's memory."""
    whole = report["memory_bytes"]
    rows = [
        [use["what"], use["region"], f"{use['bytes'] / 1e6:,.2f}", f"{use['bytes'] / whole:.1%}"]
        for use in report["memory"]
    ]
    used = report["used_bytes"]
    rows.append(["in all", "", f"{used / 1e6:,.2f}", f"{used / whole:.1%}"])
    return table(["memory", "region", "MB", "of the chip"], rows)
