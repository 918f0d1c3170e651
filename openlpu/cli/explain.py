"""In: a program's file. Out: where its cycles, joules and bytes go, and what binds; `lpu explain`.

Nothing runs: cycles, events and places are in the program. The critical path of a section is told
by the ends of its operations: an operation adds the cycles by which it ends after all those that
end before it, and what they add makes up the section.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from openlpu.cli import options, see
from openlpu.cli.compile import memory_table
from openlpu.cli.terminal import table, write, write_json
from openlpu.errors import ProgramError

if TYPE_CHECKING:
    from openlpu.chip import Chip
    from openlpu.program import Params, Program
    from openlpu.viz.utilization import SectionUse, Use

_USUAL_ROWS = 38
_LONGEST_NAME = 40


def explain(
    file: options.ProgramFile,
    params: options.Params = None,
    every: Annotated[bool, typer.Option("--all", help="Every operation, short ones too.")] = False,
    chip: options.Chip = "",
    json: options.Json = False,
) -> None:
    """Say where a step's cycles, energy and memory go, and what binds."""
    program, on, values = see.opened(file, chip, params)
    report = {"path": str(file), "chip": on.name, "clock_hz": on.clock_hz, "params": values}
    report |= _figures(program, on, values)
    if json:
        write_json(report)
    else:
        write(_text(report, None if every else _USUAL_ROWS))


def _figures(program: Program, chip: Chip, params: Params) -> dict[str, Any]:
    """Everything there is to tell."""
    from openlpu.asm.binary import text_bytes
    from openlpu.cost import count
    from openlpu.viz.utilization import utilization

    found = utilization(program, chip, params)
    texts = [sum(text_bytes(section, chip).values()) for section in program.sections]
    fetched_bytes = sum(
        text * section.runs for text, section in zip(texts, found.sections, strict=True)
    )
    energy = _energy(count(program, chip, params), fetched_bytes, chip)
    step_j = sum(energy.values()) / 1e12
    return {
        "model": _model(program),
        "cycles": found.cycles,
        "seconds": found.seconds,
        "joules": step_j,
        "watts": step_j / found.seconds if found.seconds else 0.0,
        "energy_pj": energy,
        "binds": found.binds,
        "sections": [_section(use, text) for use, text in zip(found.sections, texts, strict=True)],
        "uses": [_use(use) for use in found.uses],
        "memory": [
            {"region": use.region, "what": use.what, "bytes": use.bytes} for use in found.memory
        ],
        "used_bytes": found.used_bytes,
        "memory_bytes": found.memory_bytes,
        "text_bytes": sum(texts),
        "fetched_bytes": fetched_bytes,
    }


def _model(program: Program) -> dict[str, Any] | None:
    """What a compiled program says about its model; None for any other program."""
    import dataclasses

    from openlpu.engine.onchip import facts

    try:
        return dataclasses.asdict(facts(program))
    except ProgramError:
        return None


def _energy(counters: dict[str, int], fetched_bytes: int, chip: Chip) -> dict[str, float]:
    """Picojoules of a step by class. No instruction fetches texts, so these are charged here."""
    from openlpu.cost import energy_pj

    found = energy_pj(counters, chip)
    found["fetch_byte"] += fetched_bytes * chip.energy_pj.fetch_byte
    return found


def _use(use: Use) -> dict[str, Any]:
    return {"unit": use.unit, "busy": use.share, "tightest": use.tightest}


def _section(use: SectionUse, text_bytes: int) -> dict[str, Any]:
    """A section, its operations in the order of their ends."""
    operations, end = [], 0
    for operation in sorted(use.operations, key=lambda o: (o.last_cycle, o.first_cycle, o.tag)):
        operations.append(
            {
                "operation": operation.tag,
                "first_cycle": operation.first_cycle,
                "last_cycle": operation.last_cycle,
                "added_cycles": operation.last_cycle + 1 - end,
                "issues": operation.issues,
                "binds": operation.binds,
                "uses": [_use(part) for part in operation.uses],
            }
        )
        end = operation.last_cycle + 1
    return {
        "name": use.name,
        "cycles": use.cycles,
        "runs": use.runs,
        "issues": use.issues,
        "text_bytes": text_bytes,
        "binds": use.binds,
        "operations": operations,
    }


# -- for people -------------------------------------------------------------------------------


def _text(report: dict[str, Any], most_rows: int | None) -> str:
    model = report["model"]
    head = shown(report["path"])
    if model is not None:
        rows = f"{model['rows']} row{'s' * (model['rows'] > 1)}"
        sequences = f" of {model['sequences']} sequences" if model["sequences"] > 1 else ""
        name = shown(model["checkpoint"] or model["model"])
        head += f": {name}, {shown(model['precision'])}, {rows}{sequences}"
        head += f", context {model['context']:,}"
    steps = "".join(f"; {shown(k)}={_values(v)}" for k, v in report["params"].items())
    parts = [
        f"{head}; on {report['chip']} at {report['clock_hz'] / 1e6:,.0f} MHz{steps}\n",
        _speed(report) + "\n",
        _operations(report, most_rows) + "\n",
        table(
            ["unit", "busy", "fullest"],
            [[u["unit"], f"{u['busy']:.1%}", f"{u['tightest']:.1%}"] for u in report["uses"]],
        )
        + "\n",
        memory_table(report),
        f"instructions: {report['text_bytes']:,} bytes, "
        f"{report['fetched_bytes']:,} fetched in a step\n",
    ]
    return "".join(parts)


def _values(values: tuple[int, ...]) -> str:
    same = len(set(values)) == 1
    return str(values[0]) if same else ",".join(map(str, values))


def _speed(report: dict[str, Any]) -> str:
    model, seconds = report["model"], report["seconds"]
    line = f"{report['cycles']:,} cycles a step, {seconds * 1e6:,.1f} us"
    each, tokens = "a step", 1
    if model is not None and seconds:
        each, tokens = "a token", model["sequences"]
        line += f": {tokens / seconds:,.0f} tokens/s"
        if model["rows"] > tokens:
            line += f" ({model['rows'] / seconds:,.0f} of a prompt)"
    line += f"; {report['joules'] / tokens * 1e3:,.3f} mJ {each}, {report['watts']:,.1f} W"
    total = sum(report["energy_pj"].values())
    largest = sorted(report["energy_pj"].items(), key=lambda e: -e[1])[:5]
    shares = ", ".join(f"{name} {pj / total:.0%}" for name, pj in largest if total)
    return f"{line}\nenergy: {shares}\nwhat binds: {report['binds']}\n"


def _operations(report: dict[str, Any], most_rows: int | None) -> str:
    """Sections in their order, and in each the operations in the order of their ends."""
    rows: list[tuple[int, list[str]]] = []  # (how much it matters, cells)
    total = max(report["cycles"], 1)
    for section in report["sections"]:
        cycles = section["cycles"] * section["runs"]
        name = f"{shown(section['name'])}: {section['runs']} x {section['cycles']:,} cycles"
        cells = [name, "", "", f"{cycles / total:.1%}", f"{section['issues']:,}", section["binds"]]
        rows.append((total + cycles, cells))
        for operation in section["operations"]:
            added = operation["added_cycles"]
            cells = [
                f"  {shown(operation['operation']) or 'untagged'}",
                f"{operation['first_cycle']:,}",
                f"{operation['last_cycle']:,}",
                f"{added:,}",
                f"{operation['issues']:,}",
                operation["binds"],
            ]
            rows.append((added * section["runs"], cells))
    kept = rows
    if most_rows is not None and len(rows) > most_rows:
        least = sorted((weight for weight, _ in rows), reverse=True)[most_rows - 1]
        kept = [row for row in rows if row[0] >= least][:most_rows]
    text = table(["section", "from", "to", "adds", "issues", "binds"], [row for _, row in kept])
    left = len(rows) - len(kept)
    return text + (f"and {left:,} that add less; --all shows them\n" if left else "")


def shown(text: str) -> str:
    """A name out of a file, short, without letters that steer a terminal."""
    safe = "".join(c if c.isprintable() else "\ufffd" for c in text[: _LONGEST_NAME + 1])
    return safe if len(safe) <= _LONGEST_NAME else safe[: _LONGEST_NAME - 3] + "..."
