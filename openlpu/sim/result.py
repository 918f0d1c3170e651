"""In: what a simulated step met. Out: Result, its cycles and counters; or MachineError, one line.

Counters of a step, the same in every simulator and in cost.count:

    cycles        of all its sections
    hops          moves of one stream's value from a register to the next
    issue.<op>    instructions issued, each repetition counted; absent if there were none
"""

from __future__ import annotations

from dataclasses import dataclass

from openlpu import isa
from openlpu.chip import Chip
from openlpu.errors import MachineError
from openlpu.program import Issue


@dataclass(frozen=True, slots=True)
class Result:
    """One step: how many cycles it took, and how often each event happened."""

    cycles: int
    counters: dict[str, int]


@dataclass(frozen=True, slots=True)
class Where:
    """A place in a program that an error names: one issue, or all of a section, or neither."""

    section: str = ""
    cycle: int = -1
    issue: Issue | None = None

    def fault(self, chip: Chip, what: str) -> MachineError:
        """The error that `what` is wrong here."""
        parts = [f"section {self.section!r}"] if self.section else []
        if self.cycle >= 0:
            parts.append(f"cycle {self.cycle}")
        if self.issue is not None:
            parts += [queue_text(chip, self.issue.queue), issue_text(self.issue)]
        place = ", ".join(parts)
        return MachineError(f"{place}: {what}" if place else what)


def queue_text(chip: Chip, queue: int) -> str:
    """A queue's name, or its number where the chip has no such queue."""
    known = 0 <= queue < isa.units(chip).count
    return isa.queue_name(chip, queue) if known else f"queue {queue}"


def issue_text(issue: Issue) -> str:
    """An instruction with its fields by name, as an error prints it."""
    kind = isa.KINDS.get(issue.op)
    if kind is None or len(kind.fields) != len(issue.args):
        return f"{issue.op}{issue.args}"
    named = zip(kind.fields, issue.args, strict=True)
    return f"{issue.op}({', '.join(f'{field.name}={value}' for field, value in named)})"
