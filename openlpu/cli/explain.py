"""In: a program's file. Out: where its cycles, joules and bytes go, and what binds; `lpu explain`.

Nothing runs: cycles, events and places are in the program. The critical path of a section is told
by the ends of its operations: an operation adds the cycles by which it ends after all those that
end before it, and what they add makes up the section. Beside it stands what it adds at least, in
any schedule: bounds are along the longest chain of the second layer, which has one before it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openlpu.cli import options, see
from openlpu.cli.compile import memory_table, speed
from openlpu.cli.terminal import table, write, write_json
from openlpu.errors import GraphError, ProgramError, UnsupportedModel

if TYPE_CHECKING:
    from openlpu.chip import Chip
    from openlpu.engine.onchip import Facts
    from openlpu.graph import Graph
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
    from openlpu.cost import count, energy_pj, fetched_bytes
    from openlpu.viz.utilization import utilization

    found = utilization(program, chip, params)
    texts = [sum(text_bytes(section, chip).values()) for section in program.sections]
    fetched = fetched_bytes(program, chip, params)
    energy = energy_pj(count(program, chip, params), fetched, chip)
    step_j = sum(energy.values()) / 1e12
    known = _model(program)
    sections = [_section(use, text) for use, text in zip(found.sections, texts, strict=True)]
    return {
        "model": None if known is None else dataclasses.asdict(known),
        "cycles": found.cycles,
        "seconds": found.seconds,
        "joules": step_j,
        "watts": step_j / found.seconds if found.seconds else 0.0,
        "energy_pj": energy,
        "binds": found.binds,
        "sections": sections,
        "least": None if known is None else _least(program, chip, params, known, sections),
        "uses": [_use(use) for use in found.uses],
        "memory": [
            {"region": use.region, "what": use.what, "bytes": use.bytes} for use in found.memory
        ],
        "used_bytes": found.used_bytes,
        "memory_bytes": found.memory_bytes,
        "text_bytes": sum(texts),
        "fetched_bytes": fetched,
    }


def _model(program: Program) -> Facts | None:
    """What a compiled program says about its model; None for any other program."""
    from openlpu.engine.onchip import facts

    try:
        return facts(program)
    except ProgramError:
        return None


def _least(
    program: Program, chip: Chip, params: Params, known: Facts, sections: list[dict[str, Any]]
) -> dict[str, Any]:
    """Lower bounds of the step and of its operations; or why there are none."""
    from openlpu.bounds import Shape, step_bound
    from openlpu.engine.onchip import graph_of
    from openlpu.schedule.normal import plain

    positions = min(params.get("groups", ()), default=0) * known.group_positions
    if positions < 1:
        return {"unknown": "the parameters do not say how many groups each sequence attends to"}
    shape = Shape(known.rows, known.sequences, min(known.context, positions))
    try:
        graph = plain(graph_of(program))
        bound = step_bound(graph, chip, shape)
    except (GraphError, ProgramError, UnsupportedModel) as error:
        return {"unknown": str(error)}
    ends = {one.op: one.end_cycle for one in bound.chain.bounds}
    named = {_op_of(operation) for section in sections for operation in section["operations"]}
    least = _along(graph, bound.chain.path, ends, named)
    return {
        "context": shape.context,
        "cycles": bound.cycles,
        "by": {
            "longest chain": bound.chain.cycles,
            "streams": bound.stream_cycles,
            "weights into planes": bound.install.byte_cycles,
            "memory ports": bound.port_cycles,
            "work": bound.work_cycles,
        },
        "operations": _beside(sections, least),
    }


@dataclass(frozen=True, slots=True)
class _Least:
    """The least cycles that an operation adds, and how often it happens in a step."""

    cycles: int
    times: int


def _along(
    graph: Graph, path: tuple[str, ...], ends: dict[str, int], named: set[str]
) -> dict[str, _Least]:
    """Of each of the `named` operations, told by their names in the first layer: by how many cycles
    it ends after the named one before it on the path, in the second layer. An operation that no
    section names belongs to the one before it."""
    from openlpu.schedule.normal import parts

    bodies = [(*x.before, x.attention, *x.after) for x in parts(graph).layers]
    first = {
        op.out: model.out for body in bodies for op, model in zip(body, bodies[0], strict=True)
    }
    least: dict[str, dict[str, int]] = {}  # name -> its twin in each layer -> cycles
    name = twin = ""
    begin = end = 0
    for value in path:
        if first.get(value, value) in named:
            name, twin, begin = first.get(value, value), value, end
        end = max(end, ends[value])
        if name:
            least.setdefault(name, {})[twin] = end - begin
    return {
        name: _Least(list(each.values())[min(1, len(each) - 1)], len(each))
        for name, each in least.items()
    }


def _beside(sections: list[dict[str, Any]], least: dict[str, _Least]) -> dict[str, Any]:
    """Operation -> what its parts add, all of them once, and the least."""
    added: dict[str, list[int]] = {}
    for section in sections:
        for operation in section["operations"]:
            cycles = operation["added_cycles"] * section["runs"]
            added.setdefault(_op_of(operation), []).append(cycles)
    return {
        name: {
            "parts": len(added[name]),
            "added_cycles": sum(added[name]) // one.times,
            "least_cycles": one.cycles,
        }
        for name, one in least.items()
    }


def _op_of(operation: dict[str, Any]) -> str:
    """The graph's name of an operation: tags are that and a kind, or a part."""
    name, _, _ = operation["operation"].partition(" ")
    return str(name)


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
        each, tokens = "a token decoded", model["sequences"]
        line += f": {speed(model['rows'], tokens, seconds)}"
    line += f"; {report['joules'] / tokens * 1e3:,.3f} mJ {each}, {report['watts']:,.1f} W"
    total = sum(report["energy_pj"].values())
    largest = sorted(report["energy_pj"].items(), key=lambda e: -e[1])[:5]
    shares = ", ".join(f"{name} {pj / total:.0%}" for name, pj in largest if total)
    return f"{line}\n{_least_text(report)}energy: {shares}\nwhat binds: {report['binds']}\n"


def _least_text(report: dict[str, Any]) -> str:
    least = report["least"]
    if least is None:
        return ""
    if "unknown" in least:
        return f"no lower bound: {shown(least['unknown'], 100)}\n"
    by = ", ".join(f"{name} {cycles:,}" for name, cycles in least["by"].items())
    return (
        f"at least {least['cycles']:,} cycles ({_gap(report['cycles'], least['cycles'])}) with "
        f"{least['context']:,} positions: {by}\n"
    )


def _gap(cycles: int, least: int) -> str:
    return f"{cycles / least - 1:+.0%}" if least else ""


def _operations(report: dict[str, Any], most_rows: int | None) -> str:
    """Sections in their order, and in each the operations in the order of their ends."""
    rows: list[tuple[int, list[str]]] = []  # (how much it matters, cells)
    total = max(report["cycles"], 1)
    bounds = (report["least"] or {}).get("operations", {})
    for section in report["sections"]:
        cycles = section["cycles"] * section["runs"]
        name = f"{shown(section['name'])}: {section['runs']} x {section['cycles']:,} cycles"
        cells = [name, "", "", f"{cycles / total:.1%}", "", "", f"{section['issues']:,}"]
        rows.append((total + cycles, [*cells, section["binds"]]))
        for operation in section["operations"]:
            added, bound = operation["added_cycles"], bounds.get(_op_of(operation))
            cells = [
                f"  {shown(operation['operation']) or 'untagged'}",
                f"{operation['first_cycle']:,}",
                f"{operation['last_cycle']:,}",
                f"{added:,}",
                *(_beside_text(bound) if bound and bound["parts"] == 1 else ("", "")),
                f"{operation['issues']:,}",
                operation["binds"],
            ]
            rows.append((added * section["runs"], cells))
    for name, bound in bounds.items():
        if bound["parts"] > 1:
            cells = [f"{shown(name)}: its {bound['parts']} parts together", "", ""]
            cells += [f"{bound['added_cycles']:,}", *_beside_text(bound), "", ""]
            rows.append((total, cells))
    kept = rows
    if most_rows is not None and len(rows) > most_rows:
        least = sorted((weight for weight, _ in rows), reverse=True)[most_rows - 1]
        kept = [row for row in rows if row[0] >= least][:most_rows]
    columns = ["section", "from", "to", "adds", "at least", "gap", "issues", "binds"]
    text = table(columns, [row for _, row in kept])
    left = len(rows) - len(kept)
    return text + (f"and {left:,} that add less; --all shows them\n" if left else "")


def _beside_text(bound: dict[str, Any]) -> tuple[str, str]:
    least = bound["least_cycles"]
    return f"{least:,}", _gap(bound["added_cycles"], least)


def shown(text: str, longest: int = _LONGEST_NAME) -> str:
    """A name out of a file, short, without letters that steer a terminal."""
    safe = "".join(c if c.isprintable() else "\ufffd" for c in text[: longest + 1])
    return safe if len(safe) <= longest else safe[: longest - 3] + "..."
