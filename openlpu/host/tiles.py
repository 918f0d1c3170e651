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
FEW_ROWS = 4  # up to which vectors keep pace with memory


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


def load(kit: Kit, tile: int, pointer: Value, stride_bytes: Value) -> None:
    """Rows that lie so many bytes apart."""
    _call(kit, "tileloadd64", [_tile(tile), pointer, stride_bytes])


def store(kit: Kit, tile: int, pointer: Value) -> None:
    """Rows side by side: int32 [16][16]."""
    _call(kit, "tilestored64", [_tile(tile), pointer, kit.i64(TILE_BYTES)])


def zero(kit: Kit, tile: int) -> None:
    _call(kit, "tilezero", [_tile(tile)])


def add_product(kit: Kit, sums: int, x: int, lines: int, *, signed: bool = False) -> None:
    """sums += x . lines: x of signed bytes, lines of unsigned ones unless they are signed."""
    name = "tdpbssd" if signed else "tdpbsud"
    _call(kit, name, [_tile(sums), _tile(x), _tile(lines)])


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
        zero(kit, number)

    def body(s: Value) -> None:
        for n in range(BLOCKS):
            at = b.add(b.mul(s, kit.i64(STEP)), kit.i64(n * steps * STEP))
            load(kit, 6 + n, kit.at(w, at), line)
        for m, top in enumerate(tops):
            at = kit.at(top, b.mul(s, kit.i64(TILE_BYTES)))
            load(kit, 4 + m, at, ldx)
            for n in range(BLOCKS):
                add_product(kit, 2 * m + n, 4 + m, 6 + n)
        between(s)

    kit.each(kit.i64(0), kit.i64(steps), body)


def multiply_group(kit: Kit, x: Value, ldx: int, lines: Value, into: Value) -> None:
    """into int32 [16][16] = x, 16 rows of signed bytes, times signed lines."""
    load(kit, 6, lines, kit.i64(TILE_BYTES))
    load(kit, 4, x, kit.i64(ldx))
    zero(kit, 0)
    add_product(kit, 0, 4, 6, signed=True)
    store(kit, 0, into)


def keep(kit: Kit, rows: int, into: Value) -> None:
    """Store the sums of `multiply`, int32 [2][32][16]."""
    for m in range(rows // TILE_ROWS):
        for n in range(BLOCKS):
            store(kit, 2 * m + n, kit.at(into, (n * ROWS + m * TILE_ROWS) * LANES * 4))
