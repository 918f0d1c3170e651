"""In: a Kit whose target has tiles. Out: the matrix microkernel on tile registers (AMX).

A tile is 16 rows of 64 bytes. One of packed weights is 16 lines of 64 bytes as they lie in memory,
one of activations 64 values of k of 16 rows, so both load as they are; a product adds 16 x 16 sums
of 64 products (signed by unsigned: the same bytes + 128 that dot4 takes). 2 x 2 tiles of sums share
two of each. The eight registers and their instructions are in Intel's Architecture Instruction Set
Extensions Programming Reference, chapter 3.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from openlpu.host.emit import I8, LANES, Kit, Value
from openlpu.host.kernels import Linear

TILE_ROWS = 16
TILE_BYTES = 64  # of a row: values of k, or int32 sums
STEP = TILE_ROWS * TILE_BYTES  # bytes of one tile of weights: 64 values of k of a block
ROWS = 2 * TILE_ROWS  # of one call
BLOCKS = 2


def fits(op: Linear) -> bool:
    """Whether k is a whole number of tiles."""
    return op.k % TILE_BYTES == 0


def _tile(number: int) -> Value:
    return ir.Constant(I8, number)


def _call(kit: Kit, name: str, args: list[Value]) -> None:
    kit.b.call(kit.external(f"llvm.x86.{name}", ir.VoidType(), [a.type for a in args]), args)


def configure(kit: Kit, depth: int = TILE_BYTES) -> None:
    """Give this thread's eight tiles their size; `release` when done. Tiles 4 and 5 are for
    activations, `depth` values of k, 6 and 7 for as many lines of weights, the others for sums."""
    kind, name = ir.ArrayType(I8, 64), f"tile_shapes_{depth}"
    shape = kit.defined(name)
    if shape is None:
        shape = ir.GlobalVariable(kit.module, kind, name)
        shape.linkage, shape.global_constant, shape.align = "internal", True, 64
        widths = [TILE_BYTES] * 4 + [depth] * 2 + [TILE_BYTES] * 2
        heights = [TILE_ROWS] * 6 + [depth // 4] * 2
        pairs = [byte for width in widths for byte in (width, 0)]
        sizes = [1, *[0] * 15, *pairs, *[0] * 16, *heights, *[0] * 8]
        shape.initializer = ir.Constant(kind, bytearray(sizes))
    _call(kit, "ldtilecfg", [kit.b.gep(shape, [kit.i64(0)], source_etype=I8)])


def release(kit: Kit) -> None:
    """Tiles in use cost at every switch of threads."""
    _call(kit, "tilerelease", [])


def multiply(
    kit: Kit,
    rows: int,
    x: Value,
    ldx: Value,
    w: Value,
    steps: int,
    between: Callable[[Value], None],
) -> None:
    """sums[2m + n] = tile m of x . block n: 16 or 32 rows, `ldx` bytes apart, of two neighbouring
    blocks, over `steps` tiles of k. between(step): what to do on vectors meanwhile."""
    b = kit.b
    line = kit.i64(TILE_BYTES)
    tops = [kit.at(x, b.mul(ldx, kit.i64(m * TILE_ROWS))) for m in range(rows // TILE_ROWS)]
    for number in range(BLOCKS * len(tops)):
        _call(kit, "tilezero", [_tile(number)])

    def body(s: Value) -> None:
        for n in range(BLOCKS):
            at = b.add(b.mul(s, kit.i64(STEP)), kit.i64(n * steps * STEP))
            _call(kit, "tileloadd64", [_tile(6 + n), kit.at(w, at), line])
        for m, top in enumerate(tops):
            at = kit.at(top, b.mul(s, kit.i64(TILE_BYTES)))
            _call(kit, "tileloadd64", [_tile(4 + m), at, ldx])
            for n in range(BLOCKS):
                _call(kit, "tdpbsud", [_tile(2 * m + n), _tile(4 + m), _tile(6 + n)])
        between(s)

    kit.each(kit.i64(0), kit.i64(steps), body)


def multiply_group(kit: Kit, x: Value, ldx: int, lines: Value, into: Value) -> None:
    """into int32 [16][16] = x, 16 rows of signed bytes, times signed lines."""
    line = kit.i64(TILE_BYTES)
    _call(kit, "tileloadd64", [_tile(6), lines, line])
    _call(kit, "tileloadd64", [_tile(4), x, kit.i64(ldx)])
    _call(kit, "tilezero", [_tile(0)])
    _call(kit, "tdpbssd", [_tile(0), _tile(4), _tile(6)])
    _call(kit, "tilestored64", [_tile(0), into, line])


def keep(kit: Kit, rows: int, into: Value) -> None:
    """Store the sums, int32 [2][32][16]."""
    for m in range(rows // TILE_ROWS):
        for n in range(BLOCKS):
            at = kit.at(into, (n * ROWS + m * TILE_ROWS) * LANES * 4)
            _call(kit, "tilestored64", [_tile(2 * m + n), at, kit.i64(TILE_BYTES)])
