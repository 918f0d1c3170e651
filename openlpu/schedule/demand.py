"""In: a Graph's parts, a Chip and where its table goes. Out: the bytes it asks of each region, or
DoesNotFit.

What can be told without a schedule, before any tensor is read: the weights themselves, without the
lanes that stay empty around them. A program that passes may still fail to be placed.
"""

from __future__ import annotations

from openlpu.chip import Chip, Region
from openlpu.errors import DoesNotFit
from openlpu.graph import Param
from openlpu.graph.ops import BLOCK_FORMATS
from openlpu.numerics import GROUP
from openlpu.schedule.normal import Parts

_OF_LAYERS_IN_W4 = 5 / 8  # of the bytes of w8, at most: q4_1 takes 20 bytes for 32 weights
_GROUP_BYTES = {"q8_0": GROUP + 2, "q4_0": GROUP // 2 + 2, "q4_1": GROUP // 2 + 4}


def param_bytes(param: Param) -> int:
    """Bytes of a param on the chip: integers and their scales."""
    if len(param.shape) == 1:
        return 4 * param.shape[0]
    outputs, inputs = param.shape
    if param.format in BLOCK_FORMATS:
        return outputs * (inputs // GROUP) * _GROUP_BYTES[param.format]
    return outputs * (inputs + 4)


def demands(model: Parts, chip: Chip, table: Region) -> dict[str, dict[str, int]]:
    """Region -> what -> bytes. The table lies there twice when the head is tied to it: by rows for
    the embedding, in tiles for the head's products."""
    weights = chip.region("weights").name
    found: dict[str, dict[str, int]] = {weights: {}, table.name: {}}

    def add(region: str, what: str, size: int) -> None:
        found[region][what] = found[region].get(what, 0) + size

    source = model.embed.params[0].source
    add(table.name, "table", param_bytes(model.embed.params[0]))
    for layer in model.layers:
        for op in (*layer.before, layer.attention, *layer.after):
            for param in op.params:
                add(weights, "layers", param_bytes(param))
    for op in model.head:
        for param in op.params:
            tied = param.source == source
            add(table.name if tied else weights, "head", param_bytes(param))
    return found


def refuse_too_large(model: Parts, chip: Chip, table: Region) -> None:
    """Raises DoesNotFit for the first region that is smaller than its weights."""
    for name, parts in demands(model, chip, table).items():
        region = next(region for region in chip.regions if region.name == name)
        bound = region.words * chip.slices * chip.lanes
        demand = sum(parts.values())
        if demand > bound:
            listed = ", ".join(f"{what} {size:,}" for what, size in parts.items())
            raise DoesNotFit(
                f"weights ({listed}) in region {name} of {chip.name}",
                demand,
                bound,
                "bytes",
                _levers(model, chip, table, name),
            )


def _levers(model: Parts, chip: Chip, table: Region, full: str) -> tuple[str, ...]:
    """Changes that would make it fit, as far as the weights' bytes can tell."""
    found = [
        f"--table-region {region.name}"
        for region in chip.regions
        if region.name != table.name and _fits(model, chip, region, of_layers=1)
    ]
    if model.embed.params[0].format not in BLOCK_FORMATS and not found:
        if _fits(model, chip, table, of_layers=_OF_LAYERS_IN_W4):
            found.append("--precision w4")
        else:
            found += [
                f"--precision w4 --table-region {region.name}"
                for region in chip.regions
                if region.name != table.name
                and _fits(model, chip, region, of_layers=_OF_LAYERS_IN_W4)
            ]
    return (*found, "a larger chip")


def _fits(model: Parts, chip: Chip, table: Region, *, of_layers: float) -> bool:
    """Whether it fits with the table in that region, and the layers at a part of their bytes."""
    for name, parts in demands(model, chip, table).items():
        region = next(region for region in chip.regions if region.name == name)
        demand = sum(size * (of_layers if what == "layers" else 1) for what, size in parts.items())
        if demand > region.words * chip.slices * chip.lanes:
            return False
    return True
