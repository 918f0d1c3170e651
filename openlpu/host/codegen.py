"""In: kernel specs and a target. Out: LLVM IR of one module, and its object code from the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from openlpu import jit
from openlpu.host.kernels import (
    Attend,
    Elementwise,
    Embed,
    Install,
    Linear,
    Quant,
    Rmsnorm,
    RmsnormQuant,
    Rope,
    Rows,
    Slice,
    Spec,
    symbol,
)
from openlpu.jit import Target
from openlpu.knobs import debug, timed
from openlpu.store import Store

ENTRY_POINTS = ("prepare", "run", "stop", "work")


def build_ir(specs: Sequence[Spec], target: Target) -> str:
    """IR text of every kernel and of the functions that walk the task table."""
    from llvmlite import ir

    from openlpu.host import attention, gemm, grouped, rows, walk
    from openlpu.host.emit import Kit

    module = ir.Module(name="lpu_host")
    module.triple = target.triple
    kit = Kit(module, target)
    walk.define_walk(kit)
    for spec in specs:
        name = symbol(spec)
        match spec:
            case Linear(format="w8"):
                gemm.linear(kit, name, spec)
            case Linear():
                grouped.linear(kit, name, spec)
            case Install():
                attention.install(kit, name, spec)
            case Attend():
                attention.attend(kit, name, spec)
            case Quant():
                rows.quant(kit, name, spec.width, group=spec.group, hadamard=spec.hadamard)
            case RmsnormQuant():
                rows.rmsnorm_quant(
                    kit, name, spec.width, group=spec.group, eps=spec.eps, gain=spec.gain
                )
            case Rmsnorm():
                rows.rmsnorm(kit, name, spec.width, heads=spec.heads, eps=spec.eps, gain=spec.gain)
            case Elementwise():
                rows.elementwise(kit, name, spec.width, spec.kind)
            case Slice():
                rows.slice_columns(kit, name, spec.source_width, spec.start, spec.width)
            case Rope():
                attention.rope(kit, name, spec.width, heads=spec.heads)
            case Rows():
                rows.gather_rows(kit, name, spec.width)
            case Embed():
                rows.embed(kit, name, spec.width, block_format=spec.format)
    return str(module)


def _source_hash() -> str:
    """Hash of the code generator itself: an edit of it makes every cached object stale."""
    folder = Path(__file__).parent
    files = [*sorted(folder.glob("*.py")), folder.parent / "jit.py"]
    files += sorted((folder.parent / "numerics").glob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def load_kernels(
    specs: Sequence[Spec],
    target: Target,
    store: Store,
    progress: Callable[[str, int, int], None] | None,
) -> jit.Loaded:
    """The kernels in memory, compiled now or read from the cache."""
    names = [symbol(spec) for spec in specs]
    version = "\0".join([jit.llvm_version(), repr(target), _source_hash(), *names])
    key = hashlib.sha256(version.encode()).hexdigest()
    path = store.get("kernels", key)
    if path is None:
        if progress:
            progress("compiling kernels", 0, len(specs))
        with timed(1, f"{len(specs)} kernels compiled for {target.name}"):
            text = build_ir(specs, target)
            debug(4, lambda: text)
            code = jit.compile_ir(text, target)
        with store.create("kernels", key) as new:
            new.write_bytes(hashlib.sha256(code).digest() + code)
        if progress:
            progress("compiling kernels", len(specs), len(specs))
    else:
        data = path.read_bytes()
        code = data[32:]
        if hashlib.sha256(code).digest() != data[:32]:
            store.remove("kernels", key)
            return load_kernels(specs, target, store, progress)
        debug(1, lambda: f"kernels: {len(specs)} for {target.name} from {path}")
    return jit.Loaded(code, [*ENTRY_POINTS, *names])
