"""In: LLVM IR text and a target. Out: object code, and addresses of its functions in this process.

The only file that touches llvmlite's binding layer. No fast-math flag is ever set: the optimizer
may not change a single rounding.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from openlpu.errors import UnsupportedTarget
from openlpu.knobs import KERNELS


@dataclass(frozen=True, slots=True)
class Target:
    """A kernel set: the processor features it is compiled for. An empty triple means the machine's
    own, an empty cpu a generic one."""

    name: str
    vectors: str  # the vector instructions it is written in: its own name, unless it adds to a set
    triple: str
    cpu: str
    features: str
    needs: tuple[str, ...]  # features the processor must report

    @property
    def tiles(self) -> bool:
        """Whether it has registers of 16 rows of 64 bytes, and their products."""
        return self.name == "amx"


# Linux, Documentation/arch/x86/xstate.rst
_ARCH_PRCTL, _REQUEST_STATE, _TILE_STATE = 158, 0x1023, 18

X86 = "x86_64-unknown-linux-gnu"
AARCH64 = "aarch64-unknown-linux-gnu"
RISCV64 = "riscv64-unknown-linux-gnu"
_VNNI = "+avx512vnni,-prefer-256-bit"
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "amx",
            "avx512",
            X86,
            "x86-64-v4",
            f"{_VNNI},+amx-tile,+amx-int8",
            (*_AVX512, "amx-tile", "amx-int8"),
        ),
        Target("avx512", "avx512", X86, "x86-64-v4", _VNNI, _AVX512),
        Target("avx2", "avx2", X86, "x86-64-v3", "", ("avx2", "fma", "bmi2")),
        Target("neon", "neon", AARCH64, "", "+dotprod", ("dotprod",)),
        Target("rvv", "rvv", RISCV64, "", "+m,+a,+f,+d,+c,+v", ("v",)),  # of 128 bits or more
        Target("plain", "plain", "", "", "", ()),  # this machine's own triple, generic processor
    )
}


@functools.cache
def _binding() -> Any:
    """llvmlite's binding layer, initialized once; importing it costs tens of milliseconds."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm


def llvm_version() -> str:
    """Version of the LLVM inside llvmlite, as major.minor.patch."""
    return ".".join(str(part) for part in _binding().llvm_version_info)


@functools.cache
def available() -> tuple[str, ...]:
    """Names of the kernel sets this processor can execute, best first."""
    features = _binding().get_host_cpu_features()
    return tuple(
        name
        for name, t in TARGETS.items()
        if all(features.get(need, False) for need in t.needs) and (not t.tiles or _may_use_tiles())
    )


def _may_use_tiles() -> bool:
    """Ask Linux for the state of tile registers, which a process has only after it asked; all
    threads have it then. Refused where the kernel is older than 5.16, or by a sandbox."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    return int(call(_ARCH_PRCTL, _REQUEST_STATE, _TILE_STATE)) == 0


def select(name: str | None = None) -> Target:
    """The named kernel set, or the knob's, or the best one; UnsupportedTarget if it cannot run."""
    wanted = name or KERNELS.value
    usable = available()
    if wanted == "auto":
        wanted = usable[0]
    if wanted not in TARGETS:
        raise UnsupportedTarget(f"unknown kernel set {wanted!r}; known: {', '.join(TARGETS)}")
    if wanted not in usable:
        raise UnsupportedTarget(
            f"this processor cannot run the {wanted} kernels; it can run: {', '.join(usable)}"
        )
    target = TARGETS[wanted]
    return target if target.triple else plain(_binding().get_default_triple())


def plain(triple: str) -> Target:
    """The portable kernel set for a machine. Every Linux on RISC-V asks for RV64GC, of which LLVM's
    generic processor has too little: not even floating point."""
    features = "+m,+a,+f,+d,+c" if triple.startswith("riscv64") else ""
    return replace(TARGETS["plain"], triple=triple, features=features)


def _machine(target: Target) -> Any:
    llvm = _binding()
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="pic", codemodel="small", jit=False
    )


def _optimized(ir: str, machine: Any) -> Any:
    llvm = _binding()
    module = llvm.parse_assembly(ir)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def compile_ir(ir: str, target: Target) -> bytes:
    """Optimize and compile a module to object code for `target`."""
    machine = _machine(target)
    return bytes(machine.emit_object(_optimized(ir, machine)))


class Loaded:
    """Object code mapped into this process; keeps the code alive while it is referenced."""

    def __init__(self, code: bytes, names: Sequence[str]) -> None:
        llvm = _binding()
        host = llvm.Target.from_default_triple().create_target_machine()
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), host)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        self._addresses = {name: self._engine.get_function_address(name) for name in names}

    def address(self, name: str) -> int:
        """Address of an exported function."""
        found: int = self._addresses[name]
        assert found, f"{name} is missing from the object code"
        return found
