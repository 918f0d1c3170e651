"""In: kernels for another processor. Out: HostModels whose steps run on it, emulated by qemu.

The engine lays out everything as ever, but in one file that is mapped at the same address here and
in the emulated program, so that a pointer means the same on both sides. A step is one run of that
program: it maps the file, calls `run` with the context, and exits. It has no C library.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from llvmlite import binding as llvm

from openlpu import jit
from openlpu.engine.compiled import Compiled
from openlpu.graph import Batch
from openlpu.host import HostModel, codegen, engine
from openlpu.host.kernels import Spec
from openlpu.host.layout import Context, padded
from openlpu.host.pack import Packed
from openlpu.numerics.rope import cos_sin
from openlpu.passes.recipe import Materializer
from openlpu.store import Store

ARENA_AT = 1 << 36  # below what any of the processors can address, above where programs stand
ARENA_BYTES = 1 << 30  # the file is sparse: what nobody touches costs nothing
FIRST_FREE = 4096  # the first word holds the context's address
SHARED, FIXED, FIXED_NOREPLACE = 1, 0x10, 0x100000  # kinds of mapping; so on all three
READ_WRITE = 3

# mmap the standard input at the arena's address, spoil the modes of floating point, which `run`
# must not heed, call it, exit with 0; or with 1 if the mapping is elsewhere.
AARCH64_START = """
        .global _start
_start: mov x8, 222
        ldr x0, =ARENA_AT
        ldr x1, =ARENA_BYTES
        mov x2, READ_WRITE
        mov x3, MODE
        mov x4, 0
        mov x5, 0
        svc 0
        mov x1, x0
        mov x0, 1
        ldr x2, =ARENA_AT
        cmp x1, x2
        b.ne leave
        ldr x2, =0x01C00000  // towards zero, denormals flushed
        msr fpcr, x2
        ldr x0, [x1]
        bl run
        mov x0, 0
leave:  mov x8, 93
        svc 0

        .global memset  // LLVM zeroes scratch memory with it
memset: mov x3, x0
        add x2, x2, x0
fill:   cmp x3, x2
        b.eq filled
        strb w1, [x3], 1
        b fill
filled: ret
"""
RISCV64_START = """
        .global _start
_start: li a7, 222
        li a0, ARENA_AT
        li a1, ARENA_BYTES
        li a2, READ_WRITE
        li a3, MODE
        li a4, 0
        li a5, 0
        ecall
        mv a1, a0
        li a0, 1
        li a2, ARENA_AT
        bne a1, a2, leave
        fsrmi 1  # towards zero
        ld a0, 0(a1)
        call run
        li a0, 0
leave:  li a7, 93
        ecall

        .global memset  # LLVM zeroes scratch memory with it
memset: mv t0, a0
        add a2, a2, a0
fill:   beq t0, a2, filled
        sb a1, 0(t0)
        addi t0, t0, 1
        j fill
filled: ret
"""
CONSTANTS = {
    "ARENA_AT": ARENA_AT,
    "ARENA_BYTES": ARENA_BYTES,
    "READ_WRITE": READ_WRITE,
    "MODE": SHARED | FIXED,
}
# One thread neither waits nor wakes: a call of these ends the program with a signal.
UNREACHABLE = ("sched_yield", "sem_init", "sem_post", "sem_wait")


@dataclass(frozen=True, slots=True)
class Machine:
    """A processor that qemu emulates, and how a program begins on it."""

    name: str
    triple: str
    start: str
    qemu: tuple[str, ...]

    def tool(self, what: str) -> str | None:
        """Path of the emulator, or of a tool of binutils; None where it is missing."""
        if what == "qemu":
            return shutil.which(f"qemu-{self.name}") or shutil.which(f"qemu-{self.name}-static")
        return shutil.which(f"{self.name}-linux-gnu-{what}")

    def output(self, what: str, *arguments: object) -> str:
        command = [str(self.tool(what)), *map(str, arguments)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    @property
    def missing(self) -> list[str]:
        return [what for what in ("qemu", "as", "ld", "nm", "objdump") if self.tool(what) is None]


AARCH64 = Machine("aarch64", jit.AARCH64, AARCH64_START, ("-cpu", "max"))
RISCV64 = Machine(
    "riscv64",
    jit.RISCV64,
    RISCV64_START,
    ("-cpu", "rv64,v=true,vlen=128,vext_spec=v1.0"),
)


class Arena:
    """The file, and who has taken what of it. Its arrays may not be touched after `close`."""

    def __init__(self, path: Path) -> None:
        self.path, self._used = path, FIRST_FREE
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int]]
        self._libc.mmap.argtypes += [ctypes.c_int64]
        self._libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        with path.open("wb+") as file:
            file.truncate(ARENA_BYTES)
            how = SHARED | FIXED_NOREPLACE
            at = self._libc.mmap(ARENA_AT, ARENA_BYTES, READ_WRITE, how, file.fileno(), 0)
        if at != ARENA_AT:
            raise OSError(ctypes.get_errno(), "the arena cannot be mapped at its address")

    def take(self, size_bytes: int) -> np.ndarray:
        """Zeroed bytes that start at a cache line."""
        at = ARENA_AT + self._used
        self._used += -(-max(size_bytes, 1) // 64) * 64
        assert self._used <= ARENA_BYTES, "the arena is full"
        return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(at))

    def copy(self, array: np.ndarray) -> np.ndarray:
        taken = self.take(array.nbytes).view(array.dtype).reshape(array.shape)
        taken[...] = array
        return taken

    def batch(self, batch: Batch) -> Batch:
        columns = (batch.tokens, batch.positions, batch.slots, batch.wanted, batch.pages)
        return Batch(*map(self.copy, columns))

    def close(self) -> None:
        self._libc.munmap(ARENA_AT, ARENA_BYTES)


class Linked:
    """A static program of kernels and the machine's start; says, like Loaded, where they stand."""

    def __init__(self, machine: Machine, code: bytes, folder: Path) -> None:
        source = "".join(f".equ {name}, {value}\n" for name, value in CONSTANTS.items())
        source += machine.start
        source += "".join(f".global {name}\n{name}:\n" for name in UNREACHABLE) + ".long 0\n"
        self.path = folder / "program"
        (folder / "kernels.o").write_bytes(code)
        (folder / "start.s").write_text(source)
        machine.output("as", "-o", folder / "start.o", folder / "start.s")
        objects = folder / "kernels.o", folder / "start.o"
        machine.output("ld", "-static", "-o", self.path, *objects)
        lines = machine.output("nm", self.path).splitlines()
        self._addresses = {name: int(at, 16) for at, _, name in map(str.split, lines)}

    def address(self, name: str) -> int:
        return self._addresses[name]


class EmulatedTeam:
    """What the engine takes for its threads: a step runs the linked program in qemu."""

    model: HostModel

    def __init__(self, machine: Machine, arena: Arena, code: Linked, context: np.ndarray) -> None:
        self._command = [str(machine.tool("qemu")), *machine.qemu, str(code.path)]
        self._arena, self._context = arena, context
        ctypes.c_int64.from_address(ARENA_AT).value = context.ctypes.data

    def step(self) -> None:
        """The logits, which are fresh memory of this process, go by way of the arena."""
        model = self.model
        rows = int(self._context[Context.WANTED_ROWS])
        output = self._arena.take(4 * rows * padded(model._plan.output_width))
        target = int(model._tasks[model._output_at[0]])
        model._tasks[model._output_at] = output.ctypes.data
        with self._arena.path.open("rb+") as file:
            subprocess.run(self._command, stdin=file, check=True)
        ctypes.memmove(target, output.ctypes.data, output.nbytes)

    def close(self) -> None:
        """There is nothing to end."""


def compile_for(
    target: jit.Target, specs: Sequence[Spec], change: Callable[[str], str] = str
) -> bytes:
    """Object code of kernels for a processor that need not be this one. change: of the IR."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    return jit.compile_ir(change(codegen.build_ir(specs, target)), target)


@contextmanager
def emulated(
    machine: Machine,
    kernels: str,
    compiled: Compiled,
    folder: Path,
    *,
    pages: int,
    change: Callable[[str], str] = str,
) -> Iterator[tuple[HostModel, Callable[[Batch], Batch]]]:
    """The model, built by the engine itself, on that machine; and what puts a batch into the arena,
    where it must stand."""
    target = jit.plain(machine.triple) if kernels == "plain" else jit.TARGETS[kernels]
    arena = Arena(folder / "arena")

    def linked(specs: Sequence[Spec], *_: object) -> Linked:
        return Linked(machine, compile_for(target, specs, change), folder)

    def packed(*arguments: Any) -> Packed:
        found = open_or_pack(*arguments)
        return replace(found, data=arena.copy(found.data))

    open_or_pack = engine.open_or_pack
    with (
        closing(arena),
        mock.patch.multiple(
            engine,
            _aligned=arena.take,
            cos_sin=lambda *a, **k: tuple(map(arena.copy, cos_sin(*a, **k))),
            load_kernels=linked,
            open_or_pack=packed,
            select=lambda _: target,
            Team=lambda code, context: EmulatedTeam(machine, arena, code, context),
        ),
    ):
        model = engine.build(
            compiled.graph,
            Materializer(compiled.weights),
            store=Store(folder / "store"),
            key=compiled.key,
            threads=1,
            kernels=kernels,
            pages=pages,
        )
        model._team.model = model  # type: ignore[attr-defined]
        yield model, arena.batch
