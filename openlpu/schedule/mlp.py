"""In: the weights of one MLP and a Chip. Out: a Program of it alone: x in, down(swiglu(gate, up))
out.

What a layer's second half is made of, without the layer: to measure how near a product that is
bound by weight install comes to its bound.
"""

from __future__ import annotations

import json

import numpy as np
from numpy.typing import NDArray

from openlpu.chip import Chip
from openlpu.graph import Op, Param, attrs
from openlpu.numerics import SUPERLANE
from openlpu.program import Program, Run
from openlpu.schedule import layout as layouts
from openlpu.schedule.constants import Constants
from openlpu.schedule.layout import Maps
from openlpu.schedule.lower import Lowering
from openlpu.schedule.memory import Memory
from openlpu.schedule.ports import Ports
from openlpu.schedule.section import SectionBuilder
from openlpu.schedule.weights import WeightStore

_SCRATCH_WORDS = 128


def mlp_ops(dim: int, ffn_dim: int) -> tuple[Op, ...]:
    """The plain ops of an MLP on the value "x"."""
    both = Param("gate_up", (2 * ffn_dim, dim), "w8", "gate_up")
    down = Param("down", (dim, ffn_dim), "w8", "down")
    return (
        Op("quant", "x.q8", ("x",), (), attrs(group=0, hadamard=0)),
        Op("linear", "both", ("x.q8",), (both,)),
        Op("slice", "gate", ("both",), (), attrs(start=0, width=ffn_dim)),
        Op("slice", "up", ("both",), (), attrs(start=ffn_dim, width=ffn_dim)),
        Op("swiglu", "hidden", ("gate", "up")),
        Op("quant", "hidden.q8", ("hidden",), (), attrs(group=0, hadamard=SUPERLANE)),
        Op("linear", "y", ("hidden.q8",), (down,)),
    )


def build_mlp(
    tensors: dict[str, tuple[NDArray[np.int8], NDArray[np.float32]]], chip: Chip, *, rows: int = 1
) -> Program:
    """tensors: gate_up int8 [2 F, D] and down int8 [D, F], each with a float32 scale per output.

    Ports: x and y, float32. Raises DoesNotFit."""
    dim, ffn_dim = tensors["down"][0].shape
    memory = Memory(chip, layers=1, scratch_words=_SCRATCH_WORDS)
    maps, store = Maps(chip), WeightStore(memory)
    constants = Constants(memory, store)
    ports = Ports(memory, rows, 1, windows=False)
    ops = mlp_ops(dim, ffn_dim)
    builder = SectionBuilder(chip, memory, maps, "mlp")
    named = {op.out: (-1 - i, op) for i, op in enumerate(ops)}
    low = Lowering(builder, constants, store, named, rows, layered=False)
    layout = layouts.dense(dim, chip)
    low.know("x", layout, ports.row("x", layout, "in"))
    low.outside["x"] = (dim, layout)
    low.words("y", layout, ports.row("y", layout, "out"))
    section = builder.finish()
    for i, op in enumerate(ops):
        for fill in store.fills:
            if fill.place == -1 - i:
                weight, scale = tensors[op.params[0].name]
                data = fill.build(
                    weight if fill.what == "weights" else {"weight": weight, "scale": scale}
                )
                for k, (s, word) in enumerate(zip(fill.slices, fill.words, strict=True)):
                    memory.put(s, word, data[k], fill.what)
    return Program(
        chip=chip.name,
        sections=(section,),
        plan=(Run(0),),
        params=(),
        maps=maps.table(),
        image=memory.image(),
        ports=ports.described(),
        used=tuple(memory.used),
        meta=json.dumps({"model": f"mlp {dim} x {ffn_dim}", "rows": rows}),
    )
