"""In: a Shape and a Target. Out: Native, generated code that walks event tables.

The object code is kept in the cache, keyed by what generated it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openlpu import jit
from openlpu.jit import Target
from openlpu.knobs import debug, timed
from openlpu.sim.records import CODES, HEADER_SHIFT, Context, Shape
from openlpu.store import Store

_ENTRY = "walk"
_DIGEST_BYTES = 32


class Native:
    """The code of one chip's shape."""

    def __init__(self, shape: Shape, target: Target, store: Store) -> None:
        self._code = jit.Loaded(_object_code(shape, target, store), [_ENTRY])
        kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3)
        self._walk: Callable[[int, int, int], None] = kind(self._code.address(_ENTRY))

    def walk(self, table: NDArray[np.int32], context: NDArray[np.int64]) -> None:
        """Execute a table. The arrays behind the context must be alive."""
        assert len(context) == Context.SIZE and table.flags.c_contiguous
        first = table.ctypes.data
        self._walk(first, first + table.nbytes, context.ctypes.data)


@functools.cache
def native(shape: Shape, target: Target) -> Native:
    """The code, once in a process."""
    return Native(shape, target, Store())


def _object_code(shape: Shape, target: Target, store: Store) -> bytes:
    """Compiled now or read from the cache; a damaged entry is made anew."""
    version = "\0".join([jit.llvm_version(), repr(target), repr(shape), _source_hash()])
    key = hashlib.sha256(version.encode()).hexdigest()
    path = store.get("simulator", key)
    if path is not None:
        data = path.read_bytes()
        digest, code = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(code).digest() == digest:
            return code
        store.remove("simulator", key)
    with timed(1, f"simulator compiled for {target.name}"):
        text = build_ir(shape, target)
        debug(4, lambda: text)
        code = jit.compile_ir(text, target)
    with store.create("simulator", key) as new:
        new.write_bytes(hashlib.sha256(code).digest() + code)
    return code


def _source_hash() -> str:
    """Hash of the code generator: an edit of it makes every cached object stale."""
    here = Path(__file__).parent
    names = ("kernels", "lanes", "native", "planes", "records")
    files = [here / f"{name}.py" for name in names]
    files += [here.parent / name for name in ("jit.py", "isa.py", "host/emit.py")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def build_ir(shape: Shape, target: Target) -> str:
    """IR text of the handlers and of the function that walks a table."""
    # The generator is imported only where something is generated: it costs a tenth of a second.
    from llvmlite import ir

    from openlpu.host.emit import I32, I64, PTR, Kit
    from openlpu.sim import kernels, lanes, planes

    module = ir.Module(name="lpu_simulator")
    module.triple = target.triple
    kit = Kit(module, target)
    kernels.define_memory(kit, shape)
    kernels.define_sxm(kit, shape)
    lanes.define_vxm(kit, shape)
    planes.define_planes(kit, shape)
    with kit.function(_ENTRY, ir.FunctionType(ir.VoidType(), [PTR] * 3)) as (first, end, context):
        b = kit.b
        x86 = "x86_64" in target.triple
        saved, ours = kit.scratch(I32, 1), kit.scratch(I32, 1)
        if x86:  # round to nearest and keep denormals, whatever the host program had set
            kit.store(kit.i32(0x1F80), ours)
            b.call(kit.external("llvm.x86.sse.stmxcsr", ir.VoidType(), [PTR]), [saved])
            b.call(kit.external("llvm.x86.sse.ldmxcsr", ir.VoidType(), [PTR]), [ours])
        entry, head = b.block, b.append_basic_block("head")
        body, other = b.append_basic_block("body"), b.append_basic_block("other")
        done = b.append_basic_block("done")
        b.branch(head)
        b.position_at_end(head)
        at = b.phi(PTR)
        at.add_incoming(first, entry)
        b.cbranch(b.icmp_unsigned("<", at, end), body, done)
        b.position_at_end(body)
        header = kit.load(at, I32)
        code = b.lshr(header, kit.i32(HEADER_SHIFT))
        count = b.zext(b.and_(header, kit.i32((1 << HEADER_SHIFT) - 1)), I64)
        records = kit.at(at, 4)
        choice = b.switch(code, other)
        for number in range(CODES):
            block = b.append_basic_block(f"code{number}")
            choice.add_case(number, block)
            b.position_at_end(block)
            following = b.call(module.globals[f"event{number}"], [records, count, context])
            at.add_incoming(following, block)
            b.branch(head)
        b.position_at_end(other)
        b.unreachable()
        b.position_at_end(done)
        if x86:
            b.call(kit.external("llvm.x86.sse.ldmxcsr", ir.VoidType(), [PTR]), [saved])
    return str(module)
