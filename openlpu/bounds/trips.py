"""In: a Chip. Out: least cycles until what one lane knows has reached others, and come back.

A trip begins when a value stands at the VXM and ends when another lane's ALU can read it there.
Section numbers are those of docs/bounds.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from openlpu.chip import WEST, Chip

_WORD = 4
_MOST_TRIPS = 5  # more of them cost more than they save, on any chip of up to 2^16 lanes


@dataclass(frozen=True, slots=True)
class Trips:
    """Cycles of each way from the VXM to the VXM.

    inside: to another lane of the superlane. across: to another superlane. product: through an MXM
    plane as a row. as_weights: the same as its weights. matrix: from the VXM to a plane."""

    inside: int
    across: int
    product: int
    as_weights: int
    matrix: int


def trips(chip: Chip) -> Trips:
    """Section 2: the SXM and the MXM are the only units that a value leaves in another lane."""
    lat = chip.latency
    sxm = 2 * abs(chip.vxm_position - chip.sxm_position(WEST))
    matrix = abs(chip.vxm_position - chip.mxm_position(0))
    product = 2 * matrix + lat.mxm_dot + lat.mxm_out
    across = min(sxm + lat.sxm_across, product)
    inside = min(sxm + min(lat.sxm_superlane, lat.sxm_transpose), across)
    as_weights = product + lat.mxm_load + lat.mxm_install
    return Trips(inside, across, product, as_weights, matrix)


def reach(chip: Chip, elements: int, ops: int, since: int) -> int:
    """Section 4: from `elements` values of any layout to their maximum (or sum) in every lane that
    needs it. Each value is made by `ops - 1` operations, `since` cycles in a row, and joined by
    one. Either a lane makes all of them itself, or one comes from another lane."""
    if elements <= 1:
        return 0
    moved = trips(chip).inside + chip.latency.alu_int
    return min(alone(chip, elements, ops, since), moved)


def alone(chip: Chip, elements: int, ops: int, since: int) -> int:
    """The first of the two: all operations take their time, of which `since` is counted already."""
    join = chip.latency.alu_int
    return max(join, -(-elements * ops // chip.alus) - 1 + join - since)


def spread(chip: Chip, lanes: int, groups: int, width: int = _WORD, *, direct: bool = False) -> int:
    """Section 7, of dense rows: the same for `groups` values a lane in `lanes` lanes each, computed
    once. width: bytes that tell a lane's share. direct: the products themselves can go on the first
    trip, on their way from the MXM."""
    if lanes <= 1:
        return 0
    lat, ways = chip.latency, trips(chip)
    apart = lanes > chip.superlane_lanes
    far, near = (ways.across if apart else ways.inside), ways.inside
    saved = 0
    if direct:
        saved = near - min(lat.sxm_superlane, lat.sxm_across)
    bytes_a_cycle = 2 * chip.streams
    found = []
    for count in range(1, _MOST_TRIPS + 1):
        if count == 1:
            arrivals = -(-groups * (lanes - 1) * width // bytes_a_cycle)
            first = far
        else:
            # Of all ways to reach so many lanes in so many trips, equal fans need least copies.
            arrivals = int(groups * count * (lanes ** (1 / count) - 1) / bytes_a_cycle)
            first = near
        latency = far + (count - 1) * near + count * lat.alu_int
        busy = first + max(0, arrivals - 1) + lat.alu_int
        found.append(max(latency, busy) - saved)
    return max(lat.alu_int, min(found))
