"""In: when a value's products can reach the VXM. Out: when all of its row can, for each layout.

A Value is what the chain knows of a row: the earliest cycle for one element, and what keeps the
last one back. docs/bounds.md, sections 3 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from openlpu.bounds.trips import trips
from openlpu.chip import Chip


@dataclass(frozen=True, slots=True)
class Tail:
    """`outputs` columns of a linear of `inputs`. The first product may reach the VXM at `start`;
    the last one does so `post` cycles before an element that needs it. local: such an element is
    made in the lane of its products. share: outputs that one column of weights serves."""

    linear: str
    outputs: int
    inputs: int
    start: int
    post: int
    local: bool = True
    share: int = 1


@dataclass(frozen=True, slots=True)
class Value:
    """A row of float32. first: the earliest cycle for an element. made: operations that make one
    from its products (or what it began with), in `since` cycles. top: from when the row's largest
    magnitude may be known without a reduction of its own. direct: its magnitudes are those of
    products times factors that many lanes share."""

    first: int
    made: int
    since: int
    tails: tuple[Tail, ...] = ()
    top: int | None = None
    direct: bool = False


def wait(chip: Chip, outputs: int, inputs: int, share: int = 1) -> int:
    """Section 3: cycles from the first `act` that a row allows to the last one it needs."""
    products, tile = outputs * inputs, chip.lanes * chip.lanes
    acts = -(-products // (chip.planes * tile))
    late = max(0, products // share - 2 * chip.planes * tile)
    loads = -(-late // (chip.planes * chip.install_streams * chip.lanes))
    return max(acts - 1, loads - 1, int(inputs > chip.lanes))


def wait_narrow_outputs(chip: Chip, tail: Tail, copies: int) -> int:
    """The same where all outputs come out in the lanes of one superlane, in `copies` of them."""
    products, narrow = tail.outputs * tail.inputs, chip.superlane_lanes * chip.lanes
    acts = -(-products // (chip.planes * narrow))
    late = copies * max(0, products // tail.share - 2 * chip.planes * narrow)
    loads = -(-late // (chip.planes * chip.install_streams * chip.lanes))
    return max(acts - 1, loads - 1, 0)


def wait_narrow_inputs(chip: Chip, outputs: int, inputs: int, copies: int) -> int:
    """The same where the row stands in the lanes of `copies` superlanes."""
    weights, narrow = outputs * inputs, chip.superlane_lanes * copies * chip.lanes
    acts = -(-weights // (chip.planes * narrow))
    late = max(0, weights - 2 * chip.planes * narrow)
    loads = -(-late // (chip.planes * chip.install_streams * chip.lanes))
    return max(acts - 1, loads - 1, 0)


def whole(chip: Chip, value: Value) -> int:
    """The earliest cycle for all elements of a row."""
    ends = [t.start + wait(chip, t.outputs, t.inputs, t.share) + t.post for t in value.tails]
    return max([value.first, *ends])


def _whole_narrow(chip: Chip, value: Value, copies: int) -> int:
    ends = [t.start + wait_narrow_outputs(chip, t, copies) + t.post for t in value.tails if t.local]
    return max([whole(chip, value), *ends])


def later(value: Value, cycles: int, made: int) -> Value:
    """The value after `made` operations more on each element, `cycles` in a row."""
    tails = tuple(replace(t, post=t.post + cycles) for t in value.tails)
    return Value(value.first + cycles, value.made + made, value.since + cycles, tails)


def together(a: Value, b: Value) -> Value:
    """Both, element by element, when the later one is there: of columns of one linear, the last
    product may belong to either."""
    tails = list(a.tails) + list(b.tails)
    for t in a.tails:
        for u in b.tails:
            if t.linear == u.linear:
                outputs, post = t.outputs + u.outputs, min(t.post, u.post)
                tails.append(replace(t, outputs=outputs, post=post, local=t.local and u.local))
    return Value(max(a.first, b.first), a.made + b.made, max(a.since, b.since), tuple(tails))


@dataclass(frozen=True, slots=True)
class Reader:
    """A linear that a row goes to: how many of its outputs all that follows needs, and how many
    cycles the last of these may be late."""

    outputs: int
    slack: int


def row_trips(
    chip: Chip, value: Value, elements: int, readers: tuple[Reader, ...], count: int
) -> int:
    """Section 5: cycles on the way in `count` reductions of a row, one after the other. readers:
    the linears that its int8 form goes to; () where that is not known."""
    ways = trips(chip)
    if chip.superlanes == 1:
        return count * ways.inside
    cross = chip.latency.sxm_across
    base = whole(chip, value)
    found = [count * ways.across]
    for copies in range(1, chip.superlanes + 1):
        before = min(cross, _whole_narrow(chip, value, copies) - base)
        after = [
            wait_narrow_inputs(chip, r.outputs, elements, copies)
            - wait(chip, r.outputs, elements)
            - r.slack
            for r in readers
        ]
        behind = max(0, min([cross, *after])) if after else 0
        found.append(count * ways.inside + before + behind)
        found += [k * ways.inside + (count - k) * ways.across + before for k in range(1, count)]
    return min(found)
