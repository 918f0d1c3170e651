"""In: a program's file. Out: a page or a trace that shows it; `lpu view`, `lpu trace`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from openlpu.cli import options
from openlpu.cli.terminal import write, write_json
from openlpu.errors import ProgramError, RequestError

if TYPE_CHECKING:
    from openlpu.chip import Chip
    from openlpu.program import Params, Program

_MOST_VALUES = 1 << 20


def view(
    file: options.ProgramFile,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="PAGE.html", help="Where the page goes; beside the program."
        ),
    ] = None,
    params: options.Params = None,
    chip: options.Chip = "",
    json: options.Json = False,
) -> None:
    """Make a page that shows a program: chip, memory, timeline, utilization."""
    from openlpu.viz.page import page

    program, on, values = opened(file, chip, params)
    data = page(program, on, values).encode()
    _save(output or file.with_suffix(".html"), file, data, json=json)


def trace(
    file: options.ProgramFile,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="TRACE.json[.gz]",
            help="Where the trace goes; compressed if the name ends in .gz.",
        ),
    ],
    params: options.Params = None,
    chip: options.Chip = "",
    json: options.Json = False,
) -> None:
    """Write a trace of a step for ui.perfetto.dev."""
    from openlpu.viz.trace import trace_bytes

    program, on, values = opened(file, chip, params)
    data = trace_bytes(program, on, values, packed=output.suffix == ".gz")
    _save(output, file, data, json=json)


def params_of(program: Program, words: list[str]) -> Params:
    """Parameters of a step from words like `chunks=1,1,4`. Raises RequestError."""
    from openlpu.program import check_params

    sizes = {param.name: param.values for param in program.params}
    if sum(sizes.values()) > _MOST_VALUES:
        raise ProgramError(f"the program has parameters of more than {_MOST_VALUES:,} values")
    found = {
        param.name: (min(max(param.lowest, 1), param.highest),) * param.values
        for param in program.params
    }
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise RequestError(f"--params {word}: give NAME=N or NAME=N,N,...")
        if name not in sizes:
            known = ", ".join(sizes) or "none"
            raise RequestError(f"--params {word}: the program's parameters are: {known}")
        try:
            values = tuple(int(part) for part in text.split(","))
        except ValueError:
            raise RequestError(f"--params {word}: {text!r} is no list of whole numbers") from None
        found[name] = values * sizes[name] if len(values) == 1 else values
    check_params(program, found)
    return found


def opened(file: Path, chip: str, words: list[str] | None) -> tuple[Program, Chip, Params]:
    """The program of a file, its chip, and the parameters of a step. Raises LpuError."""
    from openlpu.asm import load

    program = load(file)
    return program, options.chip_of(program.chip, chip), params_of(program, words or [])


def _save(output: Path, program: Path, data: bytes, *, json: bool) -> None:
    """Write the file and tell where it is."""
    if output.exists() and output.samefile(program):
        raise RequestError(f"{output} is the program itself; give another --output")
    try:
        output.write_bytes(data)
    except OSError as error:
        raise RequestError(f"{output}: {(error.strerror or str(error)).lower()}") from None
    if json:
        write_json({"path": str(output), "bytes": len(data)})
    else:
        write(f"{output}\n")
