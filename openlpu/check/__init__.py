"""In: a Program and a Chip. Out: nothing if the program is legal; else ProgramError, one line.

Legal means: no cycle of any run asks a unit for what it cannot do, for all parameters in range and
whatever memory holds. It is proved without running a value, from chip and isa alone.
"""

from __future__ import annotations

from openlpu.check.fields import demand_fields
from openlpu.check.form import Form, Reached
from openlpu.check.memory import demand_bases, demand_memory
from openlpu.check.streams import demand_flows, find_flows
from openlpu.check.table import tabulate
from openlpu.check.units import demand_units
from openlpu.chip import Chip
from openlpu.program import Program

__all__ = ["check"]


def check(program: Program, chip: Chip) -> None:
    """Raise ProgramError, with the first fault found, unless `program` is legal on `chip`.

    Instructions must be well formed in every section; times, operands and addresses are judged in
    the sections that some run of the plan reaches.
    """
    runs = Form(program, chip).judge()
    tables = [tabulate(program, chip, section) for section in program.sections]
    for table in tables:
        demand_fields(table)
    reached: dict[int, list[Reached]] = {}
    for run in runs:
        reached.setdefault(run.section, []).append(run)
    for index, its_runs in sorted(reached.items()):
        table = tables[index]
        demand_units(table)
        demand_flows(table, find_flows(table))
        needs = demand_memory(table)
        for run in its_runs:
            demand_bases(table, needs, run.bases)
