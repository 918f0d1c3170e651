"""In: a Program, its Chip and parameters. Out: one HTML file that shows it: chip, time, figures.

The file asks for nothing from anywhere, and its policy lets no script run but its own: names in a
Program come from strangers. They travel as JSON, and the scripts in web/ write them as text only.
Issues travel as columns of int32, compressed; web/data.js reads them in the order of `_TABLES`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import zlib
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import Chip
from openlpu.isa import queue_name, units
from openlpu.program import Params, Program, Section
from openlpu.viz.flows import instruction_text
from openlpu.viz.outline import Part, outline
from openlpu.viz.trace import STREAM_GROUP, stream_intervals
from openlpu.viz.utilization import UNITS, Use, Utilization, occupancy, utilization

_SCRIPTS = ("data.js", "floorplan.js", "rows.js", "timeline.js", "tables.js", "main.js")
_TABLES = {
    "bursts": ("queue", "op", "tag", "cycle", "count", "period", "text"),
    "flows": ("group", "tag", "start", "end", "values", "hops"),
    "words": ("slice", "word", "words", "kind"),
}
_LONGEST_TITLE = 200


def page(program: Program, chip: Chip, params: Params) -> str:
    """The page. Raises RequestError for params, ProgramError if the program is malformed."""
    found = utilization(program, chip, params)
    script = "\n".join(_asset(name) for name in _SCRIPTS)
    style = _asset("page.css")
    data, blob = _data(program, chip, params, found)
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        f"script-src {_digest(script)}; style-src {_digest(style)}"
    )
    parts = {
        "policy": policy,
        "title": html.escape(data["title"]),
        "style": style,
        "data": _json_for_html(data),
        "blob": base64.b64encode(blob).decode(),
        "script": script,
    }
    text = _asset("page.html")
    pieces = []
    # Split once and joined once: what is put in is never looked at for further marks.
    for piece in text.split("{{"):
        name, mark, rest = piece.partition("}}")
        pieces.append(parts[name] + rest if mark else piece)
    return "".join(pieces)


def _asset(name: str) -> str:
    return (resources.files("openlpu.viz") / "web" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """A source for the policy: exactly this inline text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json_for_html(data: dict[str, Any]) -> str:
    """JSON that can end no script element and begin no comment in one."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@dataclass(slots=True)
class _Columns:
    """Rows of the tables, and numbers for the names they share."""

    bursts: list[tuple[int, ...]] = field(default_factory=list)
    flows: list[tuple[int, ...]] = field(default_factory=list)
    words: list[tuple[int, ...]] = field(default_factory=list)
    ops: dict[str, int] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)

    def add_section(self, section: Section, chip: Chip) -> None:
        for issue in section.issues:
            op = self.ops.setdefault(issue.op, len(self.ops))
            text = self.texts.setdefault(instruction_text(issue), len(self.texts))
            row = (issue.queue, op, issue.tag, issue.cycle, issue.count, issue.period, text)
            self.bursts.append(row)
        for busy in stream_intervals(section, chip):
            self.flows.append((busy.group, busy.tag, busy.start, busy.end, busy.values, busy.hops))

    def packed(self) -> bytes:
        columns = [
            np.array(getattr(self, name), np.int32).reshape(-1, len(of)).T.astype("<i4").tobytes()
            for name, of in _TABLES.items()
        ]
        return zlib.compress(b"".join(columns) + "\n".join(self.texts).encode(), 9)


def _data(
    program: Program, chip: Chip, params: Params, found: Utilization
) -> tuple[dict[str, Any], bytes]:
    """What the scripts read: names and figures, and the packed tables."""
    columns = _Columns()
    sections = []
    for section, use in zip(program.sections, found.sections, strict=True):
        first, flow_first = len(columns.bursts), len(columns.flows)
        columns.add_section(section, chip)
        numbers = _tag_numbers(section)
        operations = [
            {
                "tag": number,
                "first": operation.first_cycle,
                "last": operation.last_cycle,
                "issues": operation.issues,
                "uses": _uses(operation.uses),
                "binds": operation.binds,
            }
            for number, operation in zip(numbers, use.operations, strict=True)
        ]
        sections.append(
            {
                "name": section.name,
                "cycles": section.cycles,
                "runs": use.runs,
                "issues": use.issues,
                "first": first,
                "bursts": len(columns.bursts) - first,
                "flow_first": flow_first,
                "flows": len(columns.flows) - flow_first,
                "tags": section.tags,
                "uses": _uses(use.uses),
                "binds": use.binds,
                "operations": operations,
            }
        )
    kinds, words = occupancy(program, chip)
    columns.words = _stretches(words)
    data = {
        "title": _title(program),
        "chip": _chip(chip),
        "params": [[name, list(values)] for name, values in sorted(params.items())],
        "units": UNITS,
        "step": {
            "cycles": found.cycles,
            "seconds": found.seconds,
            "issues": found.issues,
            "runs": sum(section.runs for section in found.sections),
            "uses": _uses(found.uses),
            "binds": found.binds,
        },
        "plan": [_part(part) for part in outline(program, params)],
        "sections": sections,
        "memory": {
            "kinds": kinds,
            "used": found.used_bytes,
            "table": [
                {"region": entry.region, "kind": kinds.index(entry.what), "bytes": entry.bytes}
                for entry in found.memory
            ],
        },
        "ops": list(columns.ops),
        "tables": {
            name: {"columns": of, "rows": len(getattr(columns, name))}
            for name, of in _TABLES.items()
        },
    }
    return data, columns.packed()


def _title(program: Program) -> str:
    """What the program's maker calls the model, if it says so in a way that is understood."""
    try:
        meta = json.loads(program.meta)
    except (ValueError, RecursionError):
        meta = None
    known = meta if isinstance(meta, dict) else {}
    for name in (known.get("checkpoint"), known.get("model")):
        if isinstance(name, str) and name.strip():
            return name[:_LONGEST_TITLE]
    return "LPU program"


def _chip(chip: Chip) -> dict[str, Any]:
    names = (
        "name clock_hz lanes superlanes superlane_lanes slices words banks planes accumulators "
        "alus sxm_queues streams positions memory_bytes"
    )
    return {
        **{name: getattr(chip, name) for name in names.split()},
        "stream_group": STREAM_GROUP,
        "queues": [queue_name(chip, queue) for queue in range(units(chip).count)],
        "regions": [
            {"name": region.name, "first_word": region.first_word, "words": region.words}
            for region in chip.regions
        ],
    }


def _uses(uses: tuple[Use, ...]) -> list[list[float]]:
    """(share, share of the fullest pool) of each unit."""
    return [[round(use.share, 6), round(use.tightest, 6)] for use in uses]


def _tag_numbers(section: Section) -> list[int]:
    """Tags in the order of SectionUse.operations: by first and last cycle."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for issue in section.issues:
        first[issue.tag] = min(first.get(issue.tag, issue.cycle), issue.cycle)
        last[issue.tag] = max(last.get(issue.tag, 0), issue.last_cycle)
    return sorted(first, key=lambda tag: (first[tag], last[tag], tag))


def _part(part: Part) -> dict[str, Any]:
    return {
        "section": part.section,
        "var": part.var,
        "times": part.times,
        "iterations": part.iterations,
        "cycles": part.cycles,
        "body": [_part(inner) for inner in part.body],
    }


def _stretches(words: NDArray[np.uint16]) -> list[tuple[int, ...]]:
    """(slice, word, words, kind) of each stretch of words with one kind of contents."""
    found: list[tuple[int, ...]] = []
    for slice_index, line in enumerate(words.tolist()):
        marks = np.flatnonzero(np.diff(words[slice_index].astype(np.int32), prepend=-1))
        ends = [*marks[1:].tolist(), len(line)]
        for word, end in zip(marks.tolist(), ends, strict=True):
            if line[word]:
                found.append((slice_index, word, end - word, line[word] - 1))
    return found
