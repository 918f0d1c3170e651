"""In: a program's file or text. Out: the other of the two, or what was proved about it.

`lpu asm`, `lpu dis`, `lpu check`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openlpu.cli import options
from openlpu.cli.terminal import write, write_json

if TYPE_CHECKING:
    from openlpu.asm.operands import Names
    from openlpu.program import Program, Section


def asm(
    source: Annotated[Path, typer.Argument(metavar="FILE.txt", help="Assembly text.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE.lpu", help="Where the program goes.")
    ],
    contents: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.lpu",
            help="A program with the memory contents that the text names by their sha256.",
        ),
    ] = None,
    chip: options.Chip = "",
    json: options.Json = False,
) -> None:
    """Make a program of its assembly text."""
    from openlpu import asm as assembler
    from openlpu.asm.parse import chip_name
    from openlpu.asm.text import LONGEST_TEXT
    from openlpu.errors import ProgramError

    text = _read(source, 4 * LONGEST_TEXT)
    at_hand = assembler.contents(assembler.load(contents)) if contents else {}
    try:
        program = assembler.loads(text, options.chip_of(chip_name(text), chip), at_hand)
    except ProgramError as error:
        raise ProgramError(f"{source}: {error}") from None
    digest = assembler.save(program, output)
    if json:
        size = output.stat().st_size
        write_json({"path": str(output), "bytes": size, "sha256": digest})
    else:
        write(f"{output}\n")


def dis(
    file: options.ProgramFile,
    section: Annotated[
        str, typer.Option(metavar="NAME", help="Only the sections of this name.")
    ] = "",
    queue: Annotated[
        str, typer.Option(metavar="NAME", help="Only the issues of this queue: mem.e3, alu0.")
    ] = "",
    chip: options.Chip = "",
    json: options.Json = False,
) -> None:
    """Print a program as assembly text."""
    from openlpu.asm import dumps, load
    from openlpu.asm.operands import Names
    from openlpu.asm.text import section_lines
    from openlpu.errors import RequestError

    program = load(file)
    names = Names(options.chip_of(program.chip, chip))
    chosen = [s for s in program.sections if section in ("", s.name)]
    if section and not chosen:
        known = ", ".join(s.name for s in program.sections)
        raise RequestError(f"{file} has no section {section!r}; it has: {known}")
    if json:
        write_json(_document(program, chosen, names, queue))
    elif section or queue:
        write("".join(f"{line}\n" for s in chosen for line in section_lines(s, names, queue)))
    else:
        write(dumps(program, names.chip))


def check(file: options.ProgramFile, chip: options.Chip = "", json: options.Json = False) -> None:
    """Prove that a program is legal on its chip: nothing collides, is missed or goes astray."""
    from openlpu.asm import load, program_sha256
    from openlpu.check import check as prove
    from openlpu.errors import ProgramError

    program = load(file)
    made_for = options.chip_of(program.chip, chip)
    try:
        prove(program, made_for)
    except ProgramError as error:
        raise ProgramError(f"{file}: {error}") from None
    issues = [issue for section in program.sections for issue in section.issues]
    found = {
        "chip": made_for.name,
        "sections": len(program.sections),
        "section_cycles": sum(section.cycles for section in program.sections),
        "issues": len(issues),
        "events": sum(issue.count for issue in issues),
        "sha256": program_sha256(program),
    }
    if json:
        write_json({"path": str(file), "legal": True, **found})
        return
    write(f"{file}: legal on {found.pop('chip')}\n")
    for name, value in found.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        write(f"{name.replace('_', ' '):16}{shown}\n")


def _read(path: Path, longest_bytes: int) -> str:
    """A text file; a ProgramError if it is too long or no text."""
    from openlpu.errors import ProgramError

    try:
        if not path.is_file():
            raise ProgramError(
                f"{path}: {'is no file' if path.exists() else 'there is no such file'}"
            )
        if path.stat().st_size > longest_bytes:
            raise ProgramError(f"{path}: a program's text has at most {longest_bytes:,} bytes")
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        raise ProgramError(f"{path}: is not UTF-8 text") from None


def _document(
    program: Program, sections: list[Section], names: Names, queue: str
) -> dict[str, Any]:
    """A program as plain data, memory contents by their sha256."""
    import hashlib

    return {
        "chip": program.chip,
        "meta": program.meta,
        "params": program.params,
        "plan": program.plan,
        "sections": [_section(section, names, queue) for section in sections],
        "maps": program.maps.tolist(),
        "image": [
            {
                "slice": names.slice(segment.slice),
                "word": segment.word,
                "words": len(segment.data),
                "what": segment.what,
                "sha256": hashlib.sha256(segment.data.data).hexdigest(),
            }
            for segment in program.image
        ],
        "used": [
            {"what": what, "slice": names.slice(part), "word": word, "words": words}
            for what, part, word, words in program.used
        ],
        "ports": [
            {
                "name": port.name,
                "direction": port.direction,
                "rows": port.rows,
                "vectors": port.vectors,
                "features": port.features.tolist(),
            }
            for port in program.ports
        ],
        "tables": {
            name: {"type": array.dtype.name, "shape": array.shape}
            for name, array in sorted(program.tables.items())
        },
    }


def _section(section: Section, names: Names, queue: str) -> dict[str, Any]:
    from openlpu.asm.binary import text_bytes
    from openlpu.isa import KINDS

    wanted = names.queue_number(queue) if queue else None
    return {
        "name": section.name,
        "cycles": section.cycles,
        "text_bytes": {
            names.queue(number): size
            for number, size in text_bytes(section, names.chip).items()
            if wanted in (None, number)
        },
        "issues": [
            {
                "queue": names.queue(issue.queue),
                "cycle": issue.cycle,
                "count": issue.count,
                "period": issue.period,
                "op": issue.op,
                "fields": dict(
                    zip((f.name for f in KINDS[issue.op].fields), issue.args, strict=True)
                ),
                "tag": section.tags[issue.tag],
            }
            for issue in section.issues
            if wanted in (None, issue.queue)
        ],
    }
