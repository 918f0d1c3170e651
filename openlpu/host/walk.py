"""In: a Kit. Out: the functions that walk the task table: one for the caller, one for workers.

`run` is a whole step in one call: it wakes the workers, walks as thread 0 and returns when all are
done, so that nothing that happens in Python, a signal least of all, can leave a step half begun.
`work` is a worker's life. Barriers spin briefly, then yield the processor; a worker that has waited
some milliseconds for a step parks on a semaphore.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from openlpu.host.emit import I32, I64, KERNEL, PTR, Kit, Value
from openlpu.host.layout import (
    FEW_ROWS,
    LINE_WORDS,
    TASK_BARRIER,
    TASK_KERNEL,
    TASK_WORDS,
    Barrier,
    Context,
)
from openlpu.host.rows import row_count

SPIN = 4000  # pauses before a waiting thread yields
PARK = 2000  # yields before a worker parks: a few milliseconds
# How a processor's modes of floating point are read and written, and the default ones. RISC-V has
# no flushing of denormals, so there rounding is all.
MODES = {
    "aarch64": ("llvm.aarch64.get.fpcr", "llvm.aarch64.set.fpcr", I64, 0),
    "riscv64": ("llvm.get.rounding", "llvm.set.rounding", I32, 1),
}
SEMAPHORE_BYTES = 16  # where a worker's semaphore stands in its line, after the flag


def _atomic(kit: Kit, context: Value, index: Value | int) -> Value:
    return kit.item(context, index, I64)


def _get(kit: Kit, pointer: Value) -> Value:
    return kit.b.load_atomic(pointer, "acquire", 8, typ=I64)


def _pause(kit: Kit) -> None:
    if "x86_64" in kit.target.triple:
        kit.b.call(kit.external("llvm.x86.sse2.pause", ir.VoidType(), []), [])


def _yield(kit: Kit) -> None:
    kit.b.call(kit.external("sched_yield", I32, []), [])


def _define_wait(kit: Kit) -> None:
    """wait(pointer, old, yields): 1 when *pointer != old, 0 after so many yields (0: never)."""
    kind = ir.FunctionType(I64, [PTR, I64, I64])
    with kit.function("wait", kind, internal=True) as (pointer, old, most):
        b = kit.b
        entry, head = b.block, b.append_basic_block("head")
        body, slow = b.append_basic_block("body"), b.append_basic_block("slow")
        fast, changed = b.append_basic_block("fast"), b.append_basic_block("changed")
        give_up, keep = b.append_basic_block("give_up"), b.append_basic_block("keep")
        b.branch(head)
        b.position_at_end(head)
        count = b.phi(I64)
        count.add_incoming(kit.i64(0), entry)
        b.cbranch(b.icmp_signed("!=", _get(kit, pointer), old), changed, body)
        b.position_at_end(body)
        following = b.add(count, kit.i64(1))
        b.cbranch(b.icmp_signed("<", count, kit.i64(SPIN)), fast, slow)
        b.position_at_end(fast)
        _pause(kit)
        count.add_incoming(following, b.block)
        b.branch(head)
        b.position_at_end(slow)
        bounded = b.icmp_signed("!=", most, kit.i64(0))
        late = b.icmp_signed(">=", b.sub(count, kit.i64(SPIN)), most)
        b.cbranch(b.and_(bounded, late), give_up, keep)
        b.position_at_end(keep)
        _yield(kit)
        count.add_incoming(following, b.block)
        b.branch(head)
        b.position_at_end(changed)
        b.ret(kit.i64(1))
        b.position_at_end(give_up)
        b.ret(kit.i64(0))


def _define_barrier(kit: Kit) -> None:
    """barrier(context, threads): all threads of the step meet."""
    with kit.function("barrier", ir.FunctionType(ir.VoidType(), [PTR, I64]), internal=True) as args:
        context, threads = args
        b = kit.b
        arrived, phase = (
            _atomic(kit, context, Context.ARRIVED),
            _atomic(kit, context, Context.PHASE),
        )
        old = _get(kit, phase)
        before = b.atomic_rmw("add", arrived, kit.i64(1), "acq_rel")
        last = b.icmp_signed("==", b.add(before, kit.i64(1)), threads)
        with b.if_else(last) as (then, otherwise):
            with then:
                b.atomic_rmw("xchg", arrived, kit.i64(0), "acq_rel")
                b.atomic_rmw("add", phase, kit.i64(1), "acq_rel")
            with otherwise:
                b.call(kit.module.globals["wait"], [phase, old, kit.i64(0)])


class _Kernel:
    """A loaded pointer as a callee: the builder asks it for the type that opaque pointers lack."""

    function_type = KERNEL

    def __init__(self, pointer: Value) -> None:
        self.type = pointer.type
        self.get_reference = pointer.get_reference


def _define_walk(kit: Kit) -> None:
    """walk(context, thread): every task of the table, with its barrier."""
    with kit.function("walk", ir.FunctionType(ir.VoidType(), [PTR, I64]), internal=True) as args:
        context, thread = args
        b = kit.b
        threads = kit.field(context, Context.THREADS)
        tasks = kit.pointer(context, Context.TASKS)
        shared = b.icmp_signed("!=", kit.field(context, Context.SHARED_KV), kit.i64(0))
        several = b.icmp_signed(">", threads, kit.i64(1))

        def one(i: Value) -> None:
            task = kit.item(tasks, b.mul(i, kit.i64(TASK_WORDS)), I64)
            kernel = kit.pointer(task, TASK_KERNEL)
            b.call(_Kernel(kernel), [context, task, thread, threads])
            kind = kit.field(task, TASK_BARRIER)
            many = b.icmp_signed(">", row_count(kit, context, task), kit.i64(FEW_ROWS))
            needed = b.icmp_signed("==", kind, kit.i64(Barrier.ALWAYS))
            for which, condition in ((Barrier.MANY_ROWS, many), (Barrier.SHARED_KV, shared)):
                is_kind = b.icmp_signed("==", kind, kit.i64(which))
                needed = b.or_(needed, b.and_(is_kind, condition))
            with b.if_then(b.and_(needed, several)):
                b.call(kit.module.globals["barrier"], [context, threads])

        kit.each(kit.i64(0), kit.field(context, Context.TASK_COUNT), one)
        with b.if_then(several):
            b.call(kit.module.globals["barrier"], [context, threads])


def _worker(kit: Kit, context: Value, thread: Value) -> tuple[Value, Value]:
    """A worker's flag (1: parked) and its semaphore."""
    at = kit.b.add(kit.i64(Context.WORKERS), kit.b.mul(thread, kit.i64(LINE_WORDS)))
    flag = _atomic(kit, context, at)
    return flag, kit.at(flag, SEMAPHORE_BYTES)


def _define_publish(kit: Kit) -> None:
    """publish(context): begin the next generation and wake whoever is parked."""
    with kit.function("publish", ir.FunctionType(ir.VoidType(), [PTR]), internal=True) as args:
        (context,) = args
        b = kit.b
        b.atomic_rmw("add", _atomic(kit, context, Context.GENERATION), kit.i64(1), "acq_rel")

        def wake(thread: Value) -> None:
            flag, semaphore = _worker(kit, context, thread)
            was = b.atomic_rmw("xchg", flag, kit.i64(0), "acq_rel")
            with b.if_then(b.icmp_signed("!=", was, kit.i64(0))):
                b.call(kit.external("sem_post", I32, [PTR]), [semaphore])

        kit.each(kit.i64(1), kit.field(context, Context.THREADS), wake)


def define_walk(kit: Kit) -> None:
    """Define the entry points: prepare, run, stop and work."""
    _define_wait(kit)
    _define_barrier(kit)
    _define_walk(kit)
    _define_publish(kit)
    plain = ir.FunctionType(ir.VoidType(), [PTR])
    publish, walk = kit.module.globals["publish"], kit.module.globals["walk"]
    with kit.function("prepare", plain) as (context,):

        def semaphore(thread: Value) -> None:
            init = kit.external("sem_init", I32, [PTR, I32, I32])
            kit.b.call(init, [_worker(kit, context, thread)[1], kit.i32(0), kit.i32(0)])

        kit.each(kit.i64(1), kit.field(context, Context.THREADS), semaphore)
    with kit.function("run", plain) as (context,):
        kit.b.call(publish, [context])
        _with_default_rounding(kit, lambda: kit.b.call(walk, [context, kit.i64(0)]))
    with kit.function("stop", plain) as (context,):
        flag = _atomic(kit, context, Context.STOPPING)
        kit.b.atomic_rmw("xchg", flag, kit.i64(1), "acq_rel")
        kit.b.call(publish, [context])
    _define_work(kit)


def _define_work(kit: Kit) -> None:
    """work(context, thread): walk with every generation until one says stop."""
    with kit.function("work", ir.FunctionType(ir.VoidType(), [PTR, I64])) as (context, thread):
        b = kit.b
        generation = _atomic(kit, context, Context.GENERATION)
        stopping = _atomic(kit, context, Context.STOPPING)
        parked, semaphore = _worker(kit, context, thread)
        blocks = ("head", "moved", "step", "park", "recheck", "sleep", "leave")
        head, moved, step, park, recheck, sleep, leave = map(b.append_basic_block, blocks)
        entry = b.block
        b.branch(head)
        b.position_at_end(head)
        last = b.phi(I64)
        last.add_incoming(kit.i64(0), entry)  # the context begins at generation 0
        came = b.call(kit.module.globals["wait"], [generation, last, kit.i64(PARK)])
        b.cbranch(b.icmp_signed("!=", came, kit.i64(0)), moved, park)
        b.position_at_end(moved)
        b.cbranch(b.icmp_signed("!=", _get(kit, stopping), kit.i64(0)), leave, step)
        b.position_at_end(step)
        walk = kit.module.globals["walk"]
        _with_default_rounding(kit, lambda: b.call(walk, [context, thread]))
        last.add_incoming(b.add(last, kit.i64(1)), b.block)
        b.branch(head)
        # Park: announce it, then look again. If the worker takes the flag back, nobody will
        # post; if the publisher did, a post has come or will.
        b.position_at_end(park)
        b.atomic_rmw("xchg", parked, kit.i64(1), "acq_rel")
        b.cbranch(b.icmp_signed("!=", _get(kit, generation), last), recheck, sleep)
        b.position_at_end(recheck)
        was = b.atomic_rmw("xchg", parked, kit.i64(0), "acq_rel")
        last.add_incoming(last, recheck)
        b.cbranch(b.icmp_signed("!=", was, kit.i64(0)), head, sleep)
        b.position_at_end(sleep)
        failed = b.call(kit.external("sem_wait", I32, [PTR]), [semaphore])  # again when interrupted
        last.add_incoming(last, sleep)
        b.cbranch(b.icmp_signed("!=", failed, kit.i32(0)), sleep, head)
        b.position_at_end(leave)
        b.ret_void()


def _with_default_rounding(kit: Kit, body: Callable[[], object]) -> None:
    """Run `body` with round-to-nearest and denormals kept, whatever the host program had set."""
    b = kit.b
    processor = kit.target.triple.split("-")[0]
    if processor == "x86_64":
        saved, ours = kit.scratch(I32, 1), kit.scratch(I32, 1)
        kit.store(kit.i32(0x1F80), ours)
        b.call(kit.external("llvm.x86.sse.stmxcsr", ir.VoidType(), [PTR]), [saved])
        b.call(kit.external("llvm.x86.sse.ldmxcsr", ir.VoidType(), [PTR]), [ours])
        body()
        b.call(kit.external("llvm.x86.sse.ldmxcsr", ir.VoidType(), [PTR]), [saved])
    elif processor in MODES:
        read, write, kind, default = MODES[processor]
        setter = kit.external(write, ir.VoidType(), [kind])
        mode = b.call(kit.external(read, kind, []), [])
        b.call(setter, [ir.Constant(kind, default)])
        body()
        b.call(setter, [mode])
    else:
        body()
