"""In: a Graph in plain ops and a Chip. Out: cycles that no schedule of a step can fall below.

docs/bounds.md has the arguments, and says of which schedules they speak.
"""

from openlpu.bounds.chain import Bound, ChainBound, chain_bound
from openlpu.bounds.totals import (
    InstallBound,
    StepBound,
    install_bound,
    port_bound,
    step_bound,
    stream_bound,
    work_bound,
)
from openlpu.bounds.work import Shape

__all__ = [
    "Bound",
    "ChainBound",
    "InstallBound",
    "Shape",
    "StepBound",
    "chain_bound",
    "install_bound",
    "port_bound",
    "step_bound",
    "stream_bound",
    "work_bound",
]
