"""In: a Program and a Chip. Out: what each step does to the chip's memory, and its counters."""

from openlpu.sim.result import Result
from openlpu.sim.step import Step

__all__ = ["Result", "Step"]
